"""Forms whose update is a sum of Kronecker products: ``delta = s * sum_k U_k (x) V_k``."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rankloom.adapters.base import Adapter
from rankloom.adapters.factored import frozen_operands
from rankloom.kernels import Terms, contraction, kronecker_linear, kronecker_product
from rankloom.linalg import kronecker_sum
from rankloom.targets import Conv2dLayer, EmbeddingLayer, Layer

__all__ = ["KroneckerAdapter"]


class KroneckerAdapter(Adapter):
    """``delta = s * sum_k U_k (x) V_k`` with ``U_k`` (m, n), ``V_k`` (p, q), out = m p and in = n q, given by :meth:`terms`.

    A linear layer's tokens meet the factors one after the other, in the cheaper order, and the update is never formed. A
    look-up takes a column of each factor. A convolution is run with the dense update, which is formed again in the backward
    pass instead of being kept.
    """

    @abstractmethod
    def terms(self) -> Terms:
        """The factors as kernels see them, the scale not folded in, differentiable."""

    def delta(self, base: Layer) -> Tensor:
        return self.scale * _dense(*self.terms())

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        terms = self.terms()
        if (frozen := frozen_operands(x, base)) is not None:
            return kronecker_linear(x, *frozen, contraction(terms, _tokens(x)), self.scale)
        y = base(x)
        dtype = x.dtype if x.is_floating_point() else y.dtype
        left, right, up = terms
        narrow = Terms(left.to(dtype), right.to(dtype), None if up is None else up.to(dtype))
        if isinstance(base, EmbeddingLayer):
            update = _looked_up(x, base, narrow)
        elif isinstance(base, Conv2dLayer):
            update = checkpoint(_convolved, x, base, *narrow, use_reentrant=False, preserve_rng_state=False)
        else:
            update = kronecker_product(x, contraction(narrow, _tokens(x)))
        return y + (self.scale * update).to(y.dtype)


def _tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _dense(left: Tensor, right: Tensor, up: Tensor | None) -> Tensor:
    return kronecker_sum(left, right if up is None else up @ right)


def _convolved(x: Tensor, base: Layer, left: Tensor, right: Tensor, up: Tensor | None) -> Tensor:
    return base.down(x, _dense(left, right, up))


def _looked_up(x: Tensor, base: Layer, terms: Terms) -> Tensor:
    """Column ``c q + d`` of a Kronecker product is column ``c`` of its left factor by column ``d`` of its right one."""
    left, right, up = terms
    t, q = len(left), right.shape[2]
    slow = base.down(x // q, left.flatten(0, 1)).unflatten(-1, (t, -1))  # with the layer's own scale on look-ups
    fast = F.embedding(x % q, right.flatten(0, 1).mT).unflatten(-1, (t, -1))
    column = torch.einsum("...ta,...tb->...ab", slow, fast)
    return (column if up is None else column @ up.mT).flatten(-2)
