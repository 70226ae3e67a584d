"""SBoRA (2407.05413): LoRA with one factor frozen to standard basis vectors, so that a few columns or rows of ``W`` learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rankloom.adapters.base import AdapterPart, Dtype, adapter_dtype
from rankloom.adapters.factored import FactoredAdapter, dropout, frozen_operands
from rankloom.errors import RecipeError, TargetError
from rankloom.kernels.selected import Side, selected_linear
from rankloom.layers import Conv1DLayer, Layer, LinearLayer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["Selected", "SelectedAdapter"]

Policy = Literal["random", "norm"]


class SelectedAdapter(FactoredAdapter):
    """``delta[:, index] = s B`` (``side="in"``) or ``delta[index, :] = s A`` (``"out"``), zero elsewhere.

    ``index`` (r,) are r distinct features, kept in order as integers. Linears gather and scatter; only convolutions and
    look-up tables go through the one-hot factor itself.
    """

    shares_input: ClassVar[bool] = False
    needs_base: ClassVar[Literal["never", "init", "merge", "every_step"]] = "init"
    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B"}
    A: Tensor
    B: Tensor
    index: Tensor

    def __init__(
        self, layer: Layer, rank: int, scale: float, side: Side, policy: Policy, rate: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.side, self.policy, self.dropout = rank, scale, side, policy, rate
        self.shape = layer.out_features, layer.in_features
        size = (layer.out_features, rank) if side == "in" else (rank, layer.in_features)
        factor = nn.Parameter(torch.zeros(size, dtype=dtype, device=layer.device))
        self.register_parameter("B" if side == "in" else "A", factor)
        self.register_buffer("index", torch.arange(rank, device=layer.device))

    @property
    def factor(self) -> Tensor:
        """The trained factor: ``B`` (out, r) or ``A`` (r, in)."""
        return self.B if self.side == "in" else self.A

    @torch.no_grad()
    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """The trained factor at zero; the features drawn without replacement, or those of the largest norm in ``W``."""
        self.factor.zero_()
        if self.policy == "random":
            chosen = torch.randperm(self.shape[self.side == "in"], generator=generator)[: self.rank]
        else:
            norms = torch.linalg.vector_norm(base.weight(), dim=int(self.side == "out"), dtype=self.factor.dtype)
            chosen = norms.topk(self.rank).indices
        self.index.copy_(chosen.sort().values)

    def effective(self) -> tuple[Tensor, Tensor]:
        width = self.shape[self.side == "in"]
        basis = nn.functional.one_hot(self.index, width).to(self.factor.dtype)
        return (self.factor, basis) if self.side == "in" else (basis.mT, self.factor)

    def delta(self, base: Layer) -> Tensor:
        zero = self.factor.new_zeros(self.shape)
        return zero.index_copy(int(self.side == "in"), self.index, self.scale * self.factor)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        dropping = self.training and self.dropout > 0
        if not dropping and (frozen := frozen_operands(x, base)) is not None:
            return selected_linear(x, *frozen, self.factor, self.index, self.scale, self.side)
        if not isinstance(base, LinearLayer | Conv1DLayer):
            return super().forward(x, base)
        y = base(x)
        inner = dropout(x, self.dropout) if dropping else x
        factor = (self.scale * self.factor).to(x.dtype)
        if self.side == "in":
            return y + nn.functional.linear(inner.index_select(-1, self.index), factor).to(y.dtype)
        return y.index_add(-1, self.index, nn.functional.linear(inner, factor).to(y.dtype))


@part("adapter", "selected")
@dataclass(frozen=True)
class Selected(AdapterPart):
    """``y = x W^T + b + s x[idx] B^T`` (``side="in"``, SBoRA-FA) or ``y[idx] += s x A^T`` (``"out"``, SBoRA-FB).

    Here ``s = alpha / r`` and ``idx`` are r distinct features.

    ``select``: the r features are drawn at ``random``, or those of the largest ``norm`` of their column or row of ``W``. Own
    start: the trained factor at zero. Parameters per target: ``r out``, or ``r in`` for rows; the file holds r integers more.
    """

    rank: int = 8
    alpha: float = 16.0
    side: Side = "in"
    select: Policy = "random"
    dropout: float = 0.0
    dtype: Dtype = "auto"

    def check(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"adapter rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"adapter dropout must be in [0, 1), got {self.dropout}")

    def check_on(self, targets: list[Target]) -> None:
        for target in targets:
            if self.rank > (width := target.shape[self.side == "in"]):
                raise TargetError(
                    f"{target.name} has {width} features on its {self.side}put side, fewer than the {self.rank} to select: "
                    f"lower adapter.rank to at most {width}, or exclude this module"
                )

    def build(self, target: Target) -> SelectedAdapter:
        dtype, scale = adapter_dtype(self.dtype, target.layer), self.alpha / self.rank
        return SelectedAdapter(target.layer, self.rank, scale, self.side, self.select, self.dropout, dtype)
