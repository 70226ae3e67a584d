"""NOLA (2310.02556): both factors are learned combinations of random matrices that a seed gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rankloom.adapters.base import Dtype, adapter_dtype
from rankloom.adapters.factored import FactoredAdapter
from rankloom.adapters.seeded import BankedPart, SeededAdapter, require_dropout, require_rank
from rankloom.errors import RecipeError
from rankloom.kernels.bank import Bank
from rankloom.kernels.combine import combine
from rankloom.layers import EmbeddingLayer, Layer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["NOLA", "NOLAAdapter"]


class NOLAAdapter(FactoredAdapter, SeededAdapter):
    """``delta = s * B A`` with ``A = A_0 + sum_i a_i M_i / sqrt k`` (r, in) and ``B = sum_j b_j N_j / sqrt k`` (out, r)."""

    roles: ClassVar[dict[str, str]] = {"a": "coefficients", "b": "coefficients"}
    offset: Tensor

    def __init__(
        self, layer: Layer, rank: int, scale: float, dropout: float, banks: tuple[Bank, ...], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.offsets, self.below, self.above = banks
        self.shapes = (layer.out_features, rank), (rank, layer.in_features)
        self.a, self.b = (
            nn.Parameter(torch.zeros(bank.shape[0], dtype=dtype, device=layer.device)) for bank in banks[1:]
        )
        # A look-up reads single columns of A: they have to be of size one by themselves.
        self.size = 1.0 if isinstance(layer, EmbeddingLayer) else (3 * layer.in_features) ** -0.5
        sizes = (rank * layer.in_features, rank * layer.in_features, rank * layer.out_features)
        self.prove(*(b.digest(b.shape[0], size) for b, size in zip(banks, sizes, strict=True)), device=layer.device)

    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """All coefficients zero: ``A = A_0`` and ``B = 0``."""
        nn.init.zeros_(self.a)
        nn.init.zeros_(self.b)

    def effective(self) -> tuple[Tensor, Tensor]:
        beside, above = self.shapes
        start = self.offsets.corner(1, above[0] * above[1], self.a).view(above)
        spread = (3 * len(self.a)) ** -0.5  # a bank's entries have variance 1, U(-1, 1) has 1 / 3
        a = combine(self.a, self.below, above, spread) + self.size * start
        return combine(self.b, self.above, beside, spread), a


@part("adapter", "nola")
@dataclass(frozen=True)
class NOLA(BankedPart):
    """``y = x (W + s B A)^T + b``, ``A = A_0 + sum_i a_i M_i / sqrt k``, ``B = sum_j b_j N_j / sqrt k``, ``s = alpha / r``.

    ``M_i`` (r, in), ``N_j`` (out, r) are ``U(-1, 1)`` and ``A_0`` is LoRA's uniform start; all are frozen, come from
    ``seed``, and all layers share them. ``a`` and ``b`` start at zero: ``B = 0``. ``bank="cache"`` keeps ``k r max(in) + k r
    max(out)`` numbers in memory for the whole model; ``"regenerate"`` keeps none, at the price of making those of each layer
    anew in every forward and every backward pass. Parameters per target: ``2 k`` with ``k = bases``, whatever its shape.

    Raises:
        RecipeError: rank or number of bases below 1, or dropout outside [0, 1).
        TargetError: a rank above a target's shape.
    """

    rank: int = 8
    alpha: float = 8.0
    bases: int = 512
    seed: int = 0
    bank: Literal["cache", "regenerate"] = "cache"
    dropout: float = 0.0
    dtype: Dtype = "auto"

    def check(self) -> None:
        require_dropout(self.dropout)
        if min(self.rank, self.bases) < 1:
            raise RecipeError(f"NOLA needs adapter.rank >= 1 and adapter.bases >= 1, got {self.rank} and {self.bases}")

    def check_on(self, targets: list[Target]) -> None:
        require_rank(self.rank, targets)

    def banks(self, targets: list[Target]) -> tuple[Bank, ...]:
        out, fan_in = (self.rank * max(target.shape[side] for target in targets) for side in (0, 1))
        kept = self.bank == "cache"
        return (
            Bank(self.seed, "nola.A0", 1, fan_in),
            Bank(self.seed, "nola.A", self.bases, fan_in, kept=kept),
            Bank(self.seed, "nola.B", self.bases, out, kept=kept),
        )

    def on_banks(self, target: Target, banks: tuple[Bank, ...]) -> NOLAAdapter:
        dtype = adapter_dtype(self.dtype, target.layer)
        return NOLAAdapter(target.layer, self.rank, self.alpha / self.rank, self.dropout, banks, dtype)
