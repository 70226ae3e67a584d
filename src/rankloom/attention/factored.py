"""A head's attention through one preconditioner and one factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.attention.contract import Approximation, Factor
from rankloom.attention.engine import default_chunk, factored_attention
from rankloom.attention.polynomial import Isotropic
from rankloom.attention.precondition import Preconditioner
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

    def weights(self, q: Tensor, at: Tensor, k: Tensor) -> Tensor:
        if q.dim() != 2 or k.dim() != 2 or at.shape != q.shape[:1]:
            raise AttentionError(
                f"rows of attention are of queries (m, d) at positions (m,) over keys (L, d); "
                f"got {tuple(q.shape)}, {tuple(at.shape)} and {tuple(k.shape)}"
            )
        queries, keys = self.preconditioner.queries(q), self.preconditioner.keys(k)
        with torch.autocast(q.device.type, enabled=False):
            kernel = factored_kernel(queries, keys, self.factor)
            if self.causal:
                kernel = self._mask(kernel, queries, keys, at)
            kernel = kernel * self.preconditioner.log_weights(k).exp()
            return kernel / kernel.sum(-1, keepdim=True)

    def _mask(self, kernel: Tensor, queries: Tensor, keys: Tensor, at: Tensor) -> Tensor:
        """0 after the query, exact where query and key share a chunk."""
        kernel = kernel.masked_fill(torch.arange(len(keys), device=keys.device) > at[:, None], 0.0)
        within = at % self.chunk
        row, offset = (torch.arange(self.chunk, device=at.device) <= within[:, None]).nonzero().unbind(1)
        key = (at - within)[row] + offset
        near = (queries.index_select(0, row) * keys.index_select(0, key)).sum(1).exp()
        return kernel.index_put((row, key), near)

    def difficulty(self, q: Tensor) -> Tensor:
        return self.preconditioner.queries(q.detach()).norm(dim=-1)


class _Kernel(torch.autograd.Function):
    """See :func:`factored_kernel`. Features of the keys are formed by chunk, in both directions."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, factor: Factor) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.factor = factor
        mixed = factor.mix(factor.features(q.mT.contiguous()))
        out = q.new_empty(len(q), len(k))
        for a in range(0, len(k), step := default_chunk(factor, causal=False)):
            out[:, a : a + step] = mixed.mT @ factor.features(k[a : a + step].mT.contiguous())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (q, k), factor = ctx.saved_tensors, ctx.factor
        x = q.mT.contiguous()
        phi = factor.features(x)
        mixed, back, grad_k = factor.mix(phi), torch.zeros_like(phi), torch.empty_like(k)
        for a in range(0, len(k), step := default_chunk(factor, causal=False)):
            keys, g = k[a : a + step].mT.contiguous(), grad[:, a : a + step]
            features = factor.features(keys)
            if ctx.needs_input_grad[0]:
                back.addmm_(features, g.mT)
            grad_k[a : a + step] = factor.pull_back(keys, features, mixed @ g).mT
        grad_q = factor.pull_back(x, phi, factor.mix(back)).mT if ctx.needs_input_grad[0] else None
        return grad_q, grad_k, None


def factored_kernel(q: Tensor, k: Tensor, factor: Factor) -> Tensor:
    """``phi(q)^T M phi(k)`` densely, (m, L), for a few queries ``q`` (m, dim) and many keys ``k`` (L, dim), differentiable."""
    if isinstance(factor, Isotropic):
        return factor.kernel(q @ k.mT)
    out: Tensor = _Kernel.apply(q, k, factor)
    return out
