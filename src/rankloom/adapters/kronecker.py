"""Forms whose update is a sum of Kronecker products: ``delta = s * sum_k U_k (x) V_k``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rankloom.adapters.base import Adapter
from rankloom.adapters.factored import frozen_operands
from rankloom.kernels import (
    Step,
    Terms,
    Update,
    contraction,
    contraction_macs,
    digits_worth,
    kronecker_linear,
    kronecker_product,
    materialized_linear,
)
from rankloom.layers import Conv2dLayer, EmbeddingLayer, Layer
from rankloom.linalg import kronecker_sum

__all__ = ["KroneckerAdapter"]


class KroneckerAdapter(Adapter):
    """``delta = s * sum_k U_k (x) V_k`` with ``U_k`` (m, n), ``V_k`` (p, q), out = m p and in = n q, given by :meth:`terms`.

    A linear layer's tokens meet the factors one after the other, in the cheaper order; where there are so many terms that the
    update takes less to form, it is formed. A look-up takes a column of each factor. A convolution is run with the dense update.
    What is formed is formed again in the backward pass instead of being kept.
    """

    @abstractmethod
    def terms(self) -> Terms:
        """The factors as kernels see them, the scale not folded in, differentiable."""

    def delta(self, base: Layer) -> Tensor:
        return self.scale * _dense(*self.terms())

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        terms = self.terms()
        if (frozen := frozen_operands(x, base)) is not None:
            steps = contraction(terms, _tokens(x))
            if forming_kronecker_pays(terms, steps, _tokens(x), digits_worth(x.dtype)):
                return self._formed(x, base, terms)
            return kronecker_linear(x, *frozen, steps, self.scale)
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

    def _formed(self, x: Tensor, base: Layer, terms: Terms) -> Tensor:
        left, right, up = terms
        height = right.shape[1] if up is None else len(up)

        def rows(_: Tensor | None, span: slice, left: Tensor, right: Tensor) -> Tensor:
            return kronecker_sum(left[:, span.start // height : span.stop // height], right)

        factors = self.scale * left, right if up is None else up @ right
        update = Update((base.out_features, base.in_features), rows, base.weight, multiple=height)
        return materialized_linear(x, update, [factor.to(x.dtype) for factor in factors], base.apply)


def forming_kronecker_pays(terms: Terms, steps: Sequence[Step], tokens: int, worth: float = 1.0) -> bool:
    """Whether the dense update takes fewer multiply-adds in a step of training than the tokens' way through the factors.

    Through the factors: three times the same products, forward, for the gradient of the input and for those of the factors.
    Formed, of ``t`` terms: ``out in`` a token for the gradient of the weight, and ``t out in`` forward, backward, and for each
    factor's gradient. ``worth``: how small a share of the former the latter has to be.
    """
    (t, m, n), (_, p, q) = terms.left.shape, terms.right.shape
    out, into = m * (p if terms.up is None else len(terms.up)), n * q
    return out * into * (tokens + 4 * t) < worth * 3 * tokens * contraction_macs(steps, into)


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
