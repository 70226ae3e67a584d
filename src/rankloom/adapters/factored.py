"""Forms whose update is a product of two factors, whatever those are made of: ``delta = s * L R``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankloom.adapters.base import Adapter
from rankloom.kernels import Linear, lowrank_linears
from rankloom.layers import Layer, LinearLayer

__all__ = ["FactoredAdapter", "dropout", "frozen_operands"]


class FactoredAdapter(Adapter):
    """``delta = s * L R`` with ``L`` (out, k) and ``R`` (k, in) given by :meth:`effective`: trained, frozen or generated.

    A form is its factors: everything else (the fused kernel, layers that have none, merging and export) is here. What the
    factors are functions of gets its gradient through them, and no (tokens, in) tensor is kept where ``R`` needs none.
    """

    shares_input: ClassVar[bool] = True
    dropout: float = 0.0

    @abstractmethod
    def effective(self) -> tuple[Tensor, Tensor]:
        """``(L, R)`` as kernels see them, the scale not folded in: (out, k) and (k, in), differentiable."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        b, a = self.effective()
        return self.scale * b, a

    def delta(self, base: Layer) -> Tensor:
        b, a = self.effective()
        return (self.scale * b) @ a

    def operands(self, x: Tensor, base: Layer) -> Any:
        """What :meth:`together` takes of this layer for this input; None where the call cannot run as a fused kernel."""
        if (self.dropout > 0 and self.training) or (frozen := frozen_operands(x, base)) is None:
            return None
        b, a = self.effective()
        return Linear(*frozen, a, b, self.scale)

    @classmethod
    def together(cls, x: Tensor, operands: Sequence[Any]) -> tuple[Tensor, ...]:
        """The outputs of several adapted linears on one input, in one kernel."""
        return lowrank_linears(x, operands)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if (operands := self.operands(x, base)) is not None:
            return self.together(x, [operands])[0]
        dtype = x.dtype if x.is_floating_point() else base.dtype
        y = base(x)
        inner = dropout(x, self.dropout) if self.training and self.dropout else x
        b, a = self.effective()
        return y + base.lowrank(inner, a.to(dtype), (self.scale * b).to(dtype)).to(y.dtype)


def dropout(x: Tensor, rate: float) -> Tensor:
    """Dropout on the low-rank path; the look-ups of an embedding (integers) have none."""
    return nn.functional.dropout(x, rate) if x.is_floating_point() else x


def frozen_operands(x: Tensor, base: Layer) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias for the fused kernels, which take a plain frozen linear of the input's own dtype, without autocast;
    None for every other layer."""
    if not (isinstance(base, LinearLayer) and base.ordinary):
        return None
    weight, bias = base.weight(), base.bias()
    if weight.dtype != x.dtype or base.stored.requires_grad or torch.is_autocast_enabled(x.device.type):
        return None
    if bias is not None and bias.requires_grad:  # a bias trained beside the adapter needs its own gradient
        return None
    return weight, bias
