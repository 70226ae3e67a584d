"""MiSS (2409.15371, first DiSHA): one matrix, shared by all slices of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankloom.adapters.base import AdapterPart, Dtype, adapter_dtype
from rankloom.adapters.factored import FactoredAdapter, frozen_operands
from rankloom.errors import RecipeError, TargetError
from rankloom.kernels import shard_linear, shard_sum
from rankloom.layers import Conv1DLayer, EmbeddingLayer, Layer, LinearLayer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["MiSS", "MiSSAdapter"]


class MiSSAdapter(FactoredAdapter):
    """``delta = D^T [I I ... I]``: ``D`` (r, out), or (r, m) repeated ``out / m`` times along the output."""

    shares_input: ClassVar[bool] = False  # the sum of slices is cheap, and has its own kernel
    roles: ClassVar[dict[str, str]] = {"D": "shard"}

    def __init__(self, layer: Layer, rank: int, mini: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.rank, self.shape = rank, (layer.out_features, layer.in_features)
        self.D = nn.Parameter(torch.zeros(rank, mini or layer.out_features, dtype=dtype, device=layer.device))

    def reset(self, base: Layer, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.D.zero_()

    def repeated(self) -> Tensor:
        """``D`` over the whole output (r, out)."""
        return self.D.repeat(1, self.shape[0] // self.D.shape[1])

    def effective(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(self.rank, dtype=self.D.dtype, device=self.D.device)
        return self.repeated().mT, eye.repeat(1, -(-self.shape[1] // self.rank))[:, : self.shape[1]]

    def operands(self, x: Tensor, base: Layer) -> Any:
        return None

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if (frozen := frozen_operands(x, base)) is not None:
            return shard_linear(x, *frozen, self.D)
        y = base(x)
        if isinstance(base, EmbeddingLayer):
            return y + base.down(x % self.rank, self.repeated().mT.to(y.dtype))  # the one-hot's slices sum to x mod r
        if isinstance(base, (LinearLayer, Conv1DLayer)):
            return y + (shard_sum(x, self.rank) @ self.repeated().to(x.dtype)).to(y.dtype)
        b, a = self.effective()
        return y + base.lowrank(x, a.to(x.dtype), b.to(x.dtype)).to(y.dtype)


@part("adapter", "miss")
@dataclass(frozen=True)
class MiSS(AdapterPart):
    """``y = x W^T + b + (sum_b x_b) D`` with ``x_b`` the consecutive slices of ``x`` of width ``r`` and ``D`` (r, out) from zero.

    That is LoRA with ``A = [I I ... I]`` fixed and ``B = D^T``, without a scale: the update has rank ``r``, exports to plain LoRA
    exactly, and only the slices' sum (tokens, r) is kept for the gradient. A last, shorter slice counts as padded with zeros.
    ``mini``: ``D`` has that many columns, repeated along the output (it has to divide ``out``). Which input channels share a
    row of ``D`` depends on their order. Parameters per target: ``r out``, or ``r mini``.
    """

    rank: int = 64
    mini: int | None = None
    dtype: Dtype = "auto"

    def check(self) -> None:
        if self.rank < 1 or (self.mini is not None and self.mini < 1):
            raise RecipeError(f"adapter rank and mini must be at least 1, got {self.rank} and {self.mini}")

    def check_on(self, targets: list[Target]) -> None:
        for target in targets:
            out, width = target.shape
            if self.rank > width:
                raise TargetError(
                    f"adapter rank {self.rank} is above the {width} inputs of {target.name}: lower it to at most {width}"
                )
            if self.mini is not None and out % self.mini:
                raise TargetError(
                    f"adapter mini {self.mini} does not divide the {out} outputs of {target.name}: choose a divisor"
                )

    def build(self, target: Target) -> MiSSAdapter:
        return MiSSAdapter(target.layer, self.rank, self.mini, adapter_dtype(self.dtype, target.layer))
