"""A head's attention through one preconditioner and one factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.attention.contract import Approximation, Factor, Rows
from rankloom.attention.engine import default_chunk, factored_attention
from rankloom.attention.polynomial import Isotropic
from rankloom.attention.precondition import Preconditioner
from rankloom.attention.sweeps import columns
from rankloom.errors import AttentionError, CompositionError

__all__ = ["Factored", "factored_kernel"]


class Factored(Approximation):
    """``softmax(scale q k^T) v`` with ``exp(q~ . k~) ~ phi(q~)^T M phi(k~)`` in a preconditioner's coordinates.

    Causal attention is exact between tokens of one chunk; ``chunk`` None is the engine's own length. Preconditioner and factor
    are constants: what they were fitted to has no gradient.

    Raises ``CompositionError`` for a factor of another dimension than the preconditioner's, or two different scales.
    """

    def __init__(
        self, preconditioner: Preconditioner, factor: Factor, *, scale: float, causal: bool, chunk: int | None = None
    ) -> None:
        if factor.dim != len(preconditioner.spectrum):
            raise CompositionError(
                f"the factor takes {factor.dim} coordinates, the preconditioner gives {len(preconditioner.spectrum)}: "
                f"make the factor for the preconditioner's spectrum"
            )
        if scale != preconditioner.scale:
            raise CompositionError(
                f"the preconditioner was fitted at scale {preconditioner.scale}, not {scale}: fit it anew"
            )
        self.preconditioner, self.factor = preconditioner, factor
        self.scale, self.causal = scale, causal
        self.chunk = chunk or default_chunk(factor, causal)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = self.preconditioner
        return factored_attention(
            p.queries(q), p.keys(k), v, p.log_weights(k), self.factor, causal=self.causal, chunk=self.chunk
        )

    def kernel(self, k: Tensor, to: Tensor, every: Tensor) -> Rows:
        if k.dim() != 2 or to.shape != k.shape[:1]:
            raise AttentionError(
                f"a kernel is of keys (n, d) at positions (n,); got {tuple(k.shape)} and {tuple(to.shape)}"
            )
        keys, weight = self.preconditioner.keys(k), self.preconditioner.log_weights(k, every).exp()
        with torch.autocast(k.device.type, enabled=False):
            far = factored_kernel(keys, self.factor)

        def rows(q: Tensor, at: Tensor) -> Tensor:
            queries = self.preconditioner.queries(q)
            with torch.autocast(q.device.type, enabled=False):
                kernel = far(queries)
                return (self._mask(kernel, queries, at, keys, to) if self.causal else kernel) * weight

        return rows

    def _mask(self, kernel: Tensor, queries: Tensor, at: Tensor, keys: Tensor, to: Tensor) -> Tensor:
        """0 after the query, exact where query and key share a chunk."""
        future = to > at[:, None]
        row, key = (to // self.chunk == at[:, None] // self.chunk).logical_and_(~future).nonzero().unbind(1)
        near = (queries.index_select(0, row) * keys.index_select(0, key)).sum(1).exp()
        return kernel.masked_fill(future, 0.0).index_put((row, key), near)

    def difficulty(self, q: Tensor) -> Tensor:
        found = super().difficulty(q)
        if self.causal:
            found[:, : self.chunk] = 0.0  # these meet all their keys exactly
        return found


class _Kernel(torch.autograd.Function):
    """``mixed^T features`` for ``mixed = M phi(q)`` and ``features = phi(k)``; the way back goes by chunks of keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, features: Tensor, factor: Factor) -> Tensor:
        mixed = factor.mix(factor.features(columns(q)))
        ctx.save_for_backward(q, k, mixed, features)
        ctx.factor = factor
        return mixed.mT @ features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, mixed, features), factor, grad_q, grad_k = ctx.saved_tensors, ctx.factor, None, None
        if ctx.needs_input_grad[0]:
            x = columns(q)
            grad_q = factor.pull_back(x, factor.features(x), factor.mix(features @ grad.mT)).mT
        if ctx.needs_input_grad[1]:
            grad_k = torch.empty_like(k)
            for a, b in _spans(k, factor):
                grad_k[a:b] = factor.pull_back(columns(k[a:b]), features[:, a:b], mixed @ grad[:, a:b]).mT
        return grad_q, grad_k, None, None


def _spans(k: Tensor, factor: Factor) -> list[tuple[int, int]]:
    step = default_chunk(factor, causal=False)
    return [(a, min(a + step, len(k))) for a in range(0, len(k), step)]


def factored_kernel(k: Tensor, factor: Factor) -> Callable[[Tensor], Tensor]:
    """``phi(q)^T M phi(k)`` densely, (m, n), of queries ``q`` (m, dim), for keys ``k`` (n, dim); differentiable in both.

    The keys' features are formed once and held, width n numbers; a polynomial of the logits needs none.
    """
    if isinstance(factor, Isotropic):
        return lambda q: factor.kernel(q @ k.mT)
    features = k.new_empty(factor.width, len(k))
    for a, b in _spans(k, factor):
        features[:, a:b] = factor.features(columns(k[a:b].detach()))

    def rows(q: Tensor) -> Tensor:
        out: Tensor = _Kernel.apply(q, k, features, factor)
        return out

    return rows
