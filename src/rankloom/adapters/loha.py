"""LoHa (FedPara, 2108.06098): the elementwise product of two low-rank matrices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankloom.adapters.base import Dtype, adapter_dtype
from rankloom.adapters.factored import FactoredAdapter
from rankloom.adapters.materialized import MaterializedAdapter
from rankloom.adapters.patterned import PatternedPart
from rankloom.layers import EmbeddingLayer, Layer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["LoHa", "LoHaAdapter"]


class LoHaAdapter(FactoredAdapter, MaterializedAdapter):
    """``delta = s (w1_a w1_b) * (w2_a w2_b)``, elementwise, with ``wi_a`` (out, r) and ``wi_b`` (r, in).

    A Hadamard product of rank-r matrices is a product of factors of width ``r^2``: their rows' and columns' products. Where
    these are thin they are what runs; where they are not, the update is formed, and formed again by blocks in the backward
    pass.
    """

    halves: ClassVar[bool] = True
    roles: ClassVar[dict[str, str]] = dict.fromkeys(("w1_a", "w1_b", "w2_a", "w2_b"), "hadamard")
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor

    def __init__(self, layer: Layer, rank: int, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        for name in ("w1", "w2"):
            for side, shape in (("a", (layer.out_features, rank)), ("b", (rank, layer.in_features))):
                tensor = torch.zeros(shape, dtype=dtype, device=layer.device)
                self.register_parameter(f"{name}_{side}", nn.Parameter(tensor))

    @torch.no_grad()
    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """``w2_b`` at zero, all else uniform in +-1/sqrt(columns)."""
        for parameter in (self.w1_a, self.w1_b, self.w2_a):
            bound = parameter.shape[1] ** -0.5
            cpu = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter.copy_(cpu.uniform_(-bound, bound, generator=generator))
        self.w2_b.zero_()

    def effective(self) -> tuple[Tensor, Tensor]:
        columns = self.w1_a[:, :, None] * self.w2_a[:, None, :]
        rows = self.w1_b[:, None] * self.w2_b[None]
        return columns.flatten(1), rows.flatten(0, 1)

    def rows(self, weight: Tensor | None, span: slice, *tensors: Tensor) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = tensors
        return ((self.scale * w1_a[span]) @ w1_b) * (w2_a[span] @ w2_b)

    def delta(self, base: Layer) -> Tensor:
        return MaterializedAdapter.delta(self, base)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        out, into = len(self.w1_a), self.w1_b.shape[1]
        if self.rank**2 <= min(out, into):
            return super().factors()
        delta = self.rows(None, slice(None), *self.tensors())
        eye = torch.eye(min(out, into), dtype=delta.dtype, device=delta.device)
        return (eye, delta) if out < into else (delta, eye)

    def thin(self, base: Layer) -> bool:
        """Whether the factors of width ``r^2`` take fewer multiplications in training than forming the update.

        They are passed three times (forward, input, factors), where a formed update adds the weight's gradient only. A
        look-up never needs more than its own rows.
        """
        out, into = base.out_features, base.in_features
        return isinstance(base, EmbeddingLayer) or 3 * self.rank**2 * (out + into) <= out * into

    def operands(self, x: Tensor, base: Layer) -> Any:
        return super().operands(x, base) if self.thin(base) else None

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        return (FactoredAdapter if self.thin(base) else MaterializedAdapter).forward(self, x, base)


@part("adapter", "loha")
@dataclass(frozen=True)
class LoHa(PatternedPart):
    """``y = x (W + s (w1_a w1_b) * (w2_a w2_b))^T + b`` with ``s = alpha / r`` (2108.06098, Prop. 1), of rank up to ``r^2``.

    ``w2_b`` starts at zero. ``rank_pattern`` and ``alpha_pattern`` override rank and alpha for the targets a pattern matches
    (last match wins); all other settings mean what they do in PEFT. Parameters per target: ``2 r (in + out)``.
    """

    rank: int = 8
    alpha: float = 8.0
    dtype: Dtype = "auto"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def build(self, target: Target) -> LoHaAdapter:
        rank, scale = self.rank_of(target.name), self.scale_of(target.name)
        return LoHaAdapter(target.layer, rank, scale, adapter_dtype(self.dtype, target.layer))
