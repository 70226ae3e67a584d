"""VeRA (2310.11454): one random pair of factors for the whole model; layers learn two vectors that scale them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankloom.adapters.base import Dtype, adapter_dtype
from rankloom.adapters.factored import FactoredAdapter
from rankloom.adapters.seeded import BankedPart, Basis, SeededAdapter, require_dropout, require_seed, stored_banks
from rankloom.errors import RecipeError
from rankloom.kernels.bank import Bank, StoredBank
from rankloom.layers import EmbeddingLayer, Layer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["VeRA", "VeRAAdapter"]


class VeRAAdapter(FactoredAdapter, SeededAdapter):
    """``delta = s * diag(b) B diag(d) A`` with frozen ``A`` (r, in) and ``B`` (out, r), ``b`` (out,) and ``d`` (r,) trained.

    Both vectors act on the output side, ``(diag(b) B diag(d)) A``: their gradients then need ``A x`` (tokens, r), not ``x``.
    """

    roles: ClassVar[dict[str, str]] = {"b": "scales", "d": "scales"}

    def __init__(
        self,
        layer: Layer,
        rank: int,
        d_initial: float,
        dropout: float,
        banks: tuple[Bank | StoredBank, ...],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.rank, self.d_initial, self.dropout = rank, d_initial, dropout
        self.below, self.above = banks
        self.shape = layer.out_features, layer.in_features
        # The banks' entries have variance 1, Kaiming's uniform 1 / (3 fan_in); a look-up's inputs are one-hot.
        fan_in = 1 if isinstance(layer, EmbeddingLayer) else layer.in_features
        self.scale = 1.0 if isinstance(self.below, StoredBank) else (9 * fan_in * rank) ** -0.5
        self.b = nn.Parameter(torch.zeros(layer.out_features, dtype=dtype, device=layer.device))
        self.d = nn.Parameter(torch.zeros(rank, dtype=dtype, device=layer.device))
        out, width = self.shape
        self.prove_corners((self.below, rank, width), (self.above, rank, out), device=layer.device)

    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """``b = 0`` and ``d = d_initial``."""
        require_seed(self.below, self.above)
        nn.init.zeros_(self.b)
        nn.init.constant_(self.d, self.d_initial)

    def effective(self) -> tuple[Tensor, Tensor]:
        out, width = self.shape
        beside = self.above.corner(self.rank, out, self.b).mT
        return self.b[:, None] * beside * self.d, self.below.corner(self.rank, width, self.b)


@part("adapter", "vera")
@dataclass(frozen=True)
class VeRA(BankedPart):
    """``y = x (W + diag(b) B diag(d) A)^T + bias``; ``A`` and ``B`` are frozen, from ``seed``, and shared by all layers.

    ``A ~ U(-1, 1) / sqrt(in)`` and ``B ~ U(-1, 1) / sqrt(r)`` are corners of banks for the largest layer. ``basis="stored"``:
    the banks, with their scale, are in the adapter's file, as where it was PEFT's. ``b`` starts at zero, ``d`` at
    ``d_initial``. Parameters per target: ``out + r``.

    Raises:
        RecipeError: a rank below 1, dropout outside [0, 1), or ``d_initial`` of zero, from where neither vector could move.
    """

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0
    basis: Basis = "seeded"
    dropout: float = 0.0
    dtype: Dtype = "auto"

    def check(self) -> None:
        require_dropout(self.dropout)
        if self.rank < 1 or not self.d_initial:
            raise RecipeError(
                f"VeRA needs adapter.rank >= 1 and a d_initial other than 0, got {self.rank}, {self.d_initial}"
            )

    def banks(self, targets: list[Target]) -> tuple[Bank | StoredBank, ...]:
        out, fan_in = (max(target.shape[side] for target in targets) for side in (0, 1))
        if self.basis == "stored":
            return stored_banks(self.dtype, targets, (self.rank, fan_in), (self.rank, out))
        return Bank(self.seed, "vera.A", self.rank, fan_in), Bank(self.seed, "vera.B", self.rank, out)

    def on_banks(self, target: Target, banks: tuple[Any, ...]) -> VeRAAdapter:
        dtype = adapter_dtype(self.dtype, target.layer)
        return VeRAAdapter(target.layer, self.rank, self.d_initial, self.dropout, banks, dtype)
