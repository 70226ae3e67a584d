"""Attention through a factor of its kernel, forward and backward in a time that grows linearly with the length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.attention.contract import Factor
from rankloom.attention.sweeps import Gradients, Head, backward, backward_causal, columns, forward, forward_causal
from rankloom.errors import AttentionError

__all__ = ["default_chunk", "factored_attention"]

_CACHE = 1_500_000  # bytes that the features of one chunk may take, so that they stay in a core's L2 cache
_CHUNK = 1024  # beyond it a chunk's other tensors leave the cache
_CAUSAL_CHUNK = 256  # the exact diagonal block costs chunk^2: longer chunks pay only where the features are many


def default_chunk(factor: Factor, causal: bool, itemsize: int = 4) -> int:
    """Tokens whose features are held at a time, a multiple of 32."""
    fits = max(_CACHE // (itemsize * factor.width) // 32 * 32, 64)
    return min(fits, _CAUSAL_CHUNK if causal else _CHUNK)


def factored_attention(
    q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, factor: Factor, *, causal: bool, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention with the kernel ``exp(q . k) ~ phi(q)^T M phi(k)``, by chunks of tokens: output and denominators.

        U = e^lw [V, 1],   Z = (phi(Q)^T M phi(K)) U,   out = Z_:-1 / Z_-1,   denominators = Z_-1

    The sum over keys is the state ``phi(K) U``, of ``width (d_v + 1)`` numbers. Causal: within a chunk the kernel is the
    exact exponential, and only the state of the chunks before goes through the factor. The way back differentiates this
    very map: with ``dZ = [G, -G . out] / den`` the state's gradient is ``M phi(Q) dZ``, in the causal case summed over later
    chunks, and each set of features gets its gradient from it and pulls it back. Features are recomputed per chunk, never
    stored: memory O(width (dim + d_v) + g chunk^2) beside tensors of the inputs' own size; time O(L width (dim + d_v)).

    ``q`` (g, L_q, dim) and ``k`` (L, dim) in the factor's coordinates, ``v`` (L, d_v), ``log_weight`` (L,): ``g`` query heads
    share the key head, whose features are computed once. Returns (g, L_q, d_v) in ``v``'s dtype and (g, L_q), which has no
    gradient; features and state are float32 at least, also under autocast. Differentiable once.
    Raises ``AttentionError`` for shapes that do not match, or a chunk below 1.
    """
    _check(q, k, v, log_weight, factor, causal)
    if chunk is not None and chunk < 1:
        raise AttentionError(f"a chunk has at least one token, got {chunk}: leave it out for the engine's own length")
    chunk = chunk or default_chunk(factor, causal, q.element_size())
    heads = q if causal else q.reshape(1, -1, q.shape[-1])  # without a mask, heads are but more queries
    out, denominators = _Factored.apply(heads, k, v, log_weight, factor, causal, chunk)
    return out.view(*q.shape[:2], v.shape[1]), denominators.view(q.shape[:2])


def _check(q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, factor: Factor, causal: bool) -> None:
    length = len(k)
    if q.dim() != 3 or k.dim() != 2 or v.dim() != 2 or q.shape[-1] != factor.dim or k.shape[-1] != factor.dim:
        raise AttentionError(
            f"factored attention takes q (g, L, {factor.dim}), k (L, {factor.dim}) and v (L, d_v); "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if len(v) != length or log_weight.shape != (length,) or (causal and q.shape[1] != length):
        raise AttentionError(
            f"{length} keys need as many values and log-weights, and as many queries where causal; "
            f"got {len(v)}, {tuple(log_weight.shape)} and {q.shape[1]}"
        )
    if not q.dtype == k.dtype == log_weight.dtype or q.dtype not in (torch.float32, torch.float64):
        raise AttentionError(
            f"queries, keys and log-weights are all float32 or all float64; got {q.dtype}, {k.dtype}, {log_weight.dtype}"
        )


class _Factored(torch.autograd.Function):
    """See :func:`factored_attention`. Saved: the inputs, the output, the denominators and, without a mask, the state."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, factor: Factor, causal: bool, chunk: int
    ) -> tuple[Tensor, Tensor]:
        head = Head(q, k, v, log_weight, factor, chunk)
        out, denominators = v.new_empty(*q.shape[:2], v.shape[1]), q.new_empty(q.shape[:2])

        def normalise(a: int, b: int, z: Tensor) -> None:
            denominators[:, a:b] = z[-1].view(len(q), -1)
            out[:, a:b] = z[:-1].div_(z[-1]).mT.view(len(q), b - a, -1)

        with torch.autocast(q.device.type, enabled=False):
            state = (forward_causal if causal else forward)(head, normalise)
        ctx.save_for_backward(q, k, v, log_weight, out, denominators, state)
        ctx.rest = factor, chunk
        ctx.mark_non_differentiable(denominators)
        return out, denominators

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        *inputs, out, denominators, state = ctx.saved_tensors
        head = Head(*inputs, *ctx.rest)
        # Sums over chunks stay wide where the values are half precision.
        sums = Gradients(
            *(
                torch.zeros_like(t, dtype=head.k.dtype) if needs else None
                for t, needs in zip(inputs, ctx.needs_input_grad, strict=False)
            )
        )

        def pull(a: int, b: int) -> Tensor:
            g, o = columns(grad[:, a:b]), columns(out[:, a:b])
            dz = head.k.new_empty(len(g) + 1, g.shape[1])
            torch.div(g, denominators[:, a:b].reshape(-1), out=dz[:-1])
            torch.sum(dz[:-1] * o, 0, out=dz[-1])
            dz[-1].neg_()
            return dz

        with torch.autocast(grad.device.type, enabled=False):
            if state is None:
                backward_causal(head, pull, sums)
            else:
                backward(head, pull, sums, state)
        return *(None if s is None else s.to(t.dtype) for s, t in zip(sums, inputs, strict=True)), None, None, None
