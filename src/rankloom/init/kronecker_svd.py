"""A start from the weight's own Kronecker terms: SoKA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankloom.adapters import Binding, SoKAAdapter
from rankloom.errors import RecipeError
from rankloom.init.base import InitContext, InitPart
from rankloom.layers import Layer
from rankloom.linalg import balanced_sides, elbow, energy_rank, kronecker_svd, rearranged
from rankloom.parts import part

__all__ = ["KroneckerSVD"]


@part("init", "kronecker-svd")
@dataclass(frozen=True)
class KroneckerSVD(InitPart):
    """SoKA (2506.15251): the best sum ``sum_{k <= r} sigma_k U_k (x) V_k`` of the weight itself, which is subtracted.

    The SVD of the rearranged weight, see :func:`rankloom.linalg.kronecker_svd`; factors that train take ``sqrt(sigma)`` each.
    ``terms`` says how many a target gets, at most the adapter's rank: ``"energy"``, the fewest that hold the share ``energy``
    of ``||W||_F^2``; ``"elbow"``, those before the spectrum bends; ``"both"``, the smaller of the two; ``"fixed"``, the
    adapter's rank.
    """

    terms: Literal["both", "energy", "elbow", "fixed"] = "both"
    energy: float = 0.9

    evidence: ClassVar[Literal["none", "weight", "gradient", "activations"]] = "weight"
    offset: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"kronecker terms"})

    def check(self) -> None:
        if not 0 < self.energy <= 1:
            raise RecipeError(f"init energy is a share in (0, 1], got {self.energy}")

    def count(self, values: Tensor) -> int:
        """How many terms a spectrum asks for."""
        rules = {"energy": lambda: energy_rank(values, self.energy), "elbow": lambda: elbow(values)}
        return min(rule() for name, rule in rules.items() if self.terms in (name, "both"))

    def ranks(self, bindings: list[Binding], evidence: Any) -> dict[str, int] | None:
        if self.terms == "fixed":
            return None
        return {b.name: min(b.adapter.rank, self.count(_spectrum(b.layer))) for b in bindings}

    def apply(self, context: InitContext) -> None:
        lowest = 1.0
        for binding in context.bindings:
            adapter: SoKAAdapter = binding.adapter
            m, n = balanced_sides(*binding.target.shape)
            u, s, v, captured = kronecker_svd(
                _weight(binding.layer), m, n, adapter.rank, generator=context.generator(binding)
            )
            adapter.start(u, s, v)
            lowest = min(lowest, captured)
        context.report.update(captured=lowest, terms={b.name: b.adapter.rank for b in context.bindings})


def _weight(layer: Layer) -> Tensor:
    return layer.weight().to(torch.promote_types(layer.dtype, torch.float32))


def _spectrum(layer: Layer) -> Tensor:
    """The singular values of the rearranged weight, from its smaller Gram matrix: the rules need their squares."""
    matrix = rearranged(_weight(layer), *balanced_sides(layer.out_features, layer.in_features))
    gram = (matrix if matrix.shape[0] < matrix.shape[1] else matrix.mT).double()
    return torch.linalg.eigvalsh(gram @ gram.mT).flip(0).clamp_(min=0).sqrt()
