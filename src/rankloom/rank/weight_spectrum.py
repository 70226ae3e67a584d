"""LaMDA++'s ranks (2406.12832): more where the weight's spectrum is flat, before training and without data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankloom.adapters import Binding
from rankloom.errors import RecipeError
from rankloom.parts import part
from rankloom.rank.base import RankPart

__all__ = ["WeightSpectrum", "energies", "fill"]


def energies(weight: Tensor) -> Tensor:
    """``E(0), E(1), ..., E(k - 1)``: the share of ``||W||_F^2`` in the q leading singular components, q below k."""
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    small = work if work.shape[0] <= work.shape[1] else work.mT
    squares = torch.linalg.eigvalsh(small @ small.mT).flip(0).clamp_min(0).double().cpu()
    before = torch.cumsum(squares, 0) - squares
    return before / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)


def fill(spectra: list[Tensor], budget: int, least: list[int], most: list[int]) -> list[int]:
    """Ranks that sum to ``budget``: ``r_l = min{q : E_l(q) >= tau}`` for the threshold that spends it, within the bounds.

    Component q of layer l is wanted while ``E_l(q - 1) < tau``, so the budget's worth of smallest ``E_l(q - 1)`` are taken:
    no threshold has to be searched and ties, which fall to the earlier layer, cannot miss the budget.
    """
    wanted = []
    for layer, (spectrum, low, high) in enumerate(zip(spectra, least, most, strict=True)):
        wanted += [(-1.0 if q < low else share, layer) for q, share in enumerate(spectrum[:high].tolist())]
    ranks = [0] * len(spectra)
    for _, layer in sorted(wanted)[:budget]:
        ranks[layer] += 1
    return ranks


@part("rank", "weight-spectrum")
@dataclass(frozen=True)
class WeightSpectrum(RankPart):
    """The sum of all ranks stays; each layer takes the leading components it needs for the same share of ``||W||_F^2``.

    Flatter spectra get higher ranks, from ``r / spread`` to ``r spread`` for the mean rank r. Alpha follows in proportion.
    Ranks are fixed from then on.
    """

    spread: float = 2.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"factors"})

    def check(self) -> None:
        if self.spread < 1:
            raise RecipeError(f"rank spread must be at least 1, got {self.spread}")

    def ranks(self, bindings: list[Binding]) -> dict[str, int]:
        ranks, shapes = [b.adapter.rank for b in bindings], [b.target.shape for b in bindings]
        mean = sum(ranks) / len(ranks)
        # A rank set beyond the bounds moves them: the budget can always be met, and an allocation repeats itself.
        least = [min(rank, max(1, int(mean / self.spread))) for rank in ranks]
        most = [min(max(rank, int(mean * self.spread)), *shape) for rank, shape in zip(ranks, shapes, strict=True)]
        found = fill([energies(b.layer.weight()) for b in bindings], sum(ranks), least, most)
        return {b.name: rank for b, rank in zip(bindings, found, strict=True)}

    def build(self, bindings: list[Binding], total_steps: int | None) -> None:
        return None
