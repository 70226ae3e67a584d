"""Attention through a factor of its kernel, forward and backward in a time that grows linearly with the length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.attention.contract import Factor
from rankloom.errors import DataError

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
    Raises ``DataError`` for shapes that do not match, or a chunk below 1.
    """
    _check(q, k, v, log_weight, factor, causal)
    if chunk is not None and chunk < 1:
        raise DataError(f"a chunk has at least one token, got {chunk}: leave it out for the engine's own length")
    chunk = chunk or default_chunk(factor, causal, q.element_size())
    heads = q if causal else q.reshape(1, -1, q.shape[-1])  # without a mask, heads are but more queries
    out, denominators = _Factored.apply(heads, k, v, log_weight, factor, causal, chunk)
    return out.view(*q.shape[:2], v.shape[1]), denominators.view(q.shape[:2])


def _check(q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, factor: Factor, causal: bool) -> None:
    length = len(k)
    if q.dim() != 3 or k.dim() != 2 or v.dim() != 2 or q.shape[-1] != factor.dim or k.shape[-1] != factor.dim:
        raise DataError(
            f"factored attention takes q (g, L, {factor.dim}), k (L, {factor.dim}) and v (L, d_v); "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if len(v) != length or log_weight.shape != (length,) or (causal and q.shape[1] != length):
        raise DataError(
            f"{length} keys need as many values and log-weights, and as many queries where causal; "
            f"got {len(v)}, {tuple(log_weight.shape)} and {q.shape[1]}"
        )
    if not q.dtype == k.dtype == log_weight.dtype or q.dtype not in (torch.float32, torch.float64):
        raise DataError(
            f"queries, keys and log-weights are all float32 or all float64; got {q.dtype}, {k.dtype}, {log_weight.dtype}"
        )


class _Head(NamedTuple):
    """What is attended to, by chunks [a, b) of tokens.

    A chunk is laid out with its tokens along the contiguous side, and a state as (d_v + 1, width): thin products run fastest so.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_weight: Tensor
    factor: Factor
    chunk: int

    def spans(self, x: Tensor) -> list[tuple[int, int]]:
        length = x.shape[-2]
        return [(a, min(a + self.chunk, length)) for a in range(0, length, self.chunk)]

    def queries(self, a: int, b: int) -> Tensor:
        """(dim, g c)."""
        return _columns(self.q[:, a:b])

    def keys(self, a: int, b: int) -> Tensor:
        """(dim, c)."""
        return _columns(self.k[a:b])

    def values(self, a: int, b: int) -> Tensor:
        """``U^T``, (d_v + 1, c)."""
        u = self.k.new_empty(self.v.shape[1] + 1, b - a)
        torch.exp(self.log_weight[a:b], out=u[-1])
        torch.mul(self.v[a:b].mT, u[-1], out=u[:-1])
        return u

    def empty_state(self) -> Tensor:
        return self.k.new_zeros(self.v.shape[1] + 1, self.factor.width)

    def mix(self, state: Tensor) -> Tensor:
        return self.factor.mix(state.mT).mT.contiguous()

    def mask(self) -> Tensor:
        """-inf where a key comes after its query, 0 elsewhere: (c keys, g, c queries)."""
        c = min(self.chunk, len(self.k))
        return self.k.new_full((c, c), -torch.inf).tril_(-1)[:, None].repeat(1, len(self.q), 1)


class _Gradients(NamedTuple):
    """Gradients of a head's tensors, accumulated by chunks; None for what needs none."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    log_weight: Tensor | None

    def add_queries(self, a: int, b: int, dx: Tensor) -> None:
        if self.q is not None:
            self.q[:, a:b] += dx.mT.view(len(self.q), b - a, -1)

    def add_keys(self, a: int, b: int, dx: Tensor) -> None:
        if self.k is not None:
            self.k[a:b] += dx.mT

    def add_values(self, a: int, b: int, u: Tensor, du: Tensor) -> None:
        if self.v is not None:
            self.v[a:b] += (du[:-1] * u[-1]).mT
        if self.log_weight is not None:
            self.log_weight[a:b] += du.mul_(u).sum(0)


def _columns(x: Tensor) -> Tensor:
    """(..., c, n) as (n, ... c)."""
    return x.reshape(-1, x.shape[-1]).mT.contiguous()


def _forward(h: _Head, emit: Callable[[int, int, Tensor], None]) -> Tensor:
    """Give ``Z^T`` (d_v + 1, c) of every chunk of queries to ``emit``; return the mixed state."""
    state = h.empty_state()
    for a, b in h.spans(h.k):
        state.addmm_(h.values(a, b), h.factor.features(h.keys(a, b)).mT)
    state = h.mix(state)
    for a, b in h.spans(h.q):
        emit(a, b, state @ h.factor.features(h.queries(a, b)))
    return state


def _backward(h: _Head, pull: Callable[[int, int], Tensor], into: _Gradients, state: Tensor) -> None:
    """With ``dZ^T`` of a chunk of queries from ``pull``."""
    back = h.empty_state()
    for a, b in h.spans(h.q):
        x, dz = h.queries(a, b), pull(a, b)
        phi = h.factor.features(x)
        back.addmm_(dz, phi.mT)
        if into.q is not None:
            into.add_queries(a, b, h.factor.pull_back(x, phi, state.mT @ dz))
    back = h.mix(back)
    for a, b in h.spans(h.k):
        _through_keys(h, a, b, h.keys(a, b), h.values(a, b), back, into)


def _through_keys(h: _Head, a: int, b: int, x: Tensor, u: Tensor, back: Tensor, into: _Gradients) -> None:
    """The way back from the mixed gradient of the state to a chunk of keys and values."""
    if into.k is None and into.v is None and into.log_weight is None:
        return
    phi = h.factor.features(x)
    du = back @ phi
    if into.k is not None:
        into.add_keys(a, b, h.factor.pull_back(x, phi, back.mT @ u))
    into.add_values(a, b, u, du)


def _exact(xq: Tensor, xk: Tensor, mask: Tensor) -> Tensor:
    """``exp(k . q)`` inside a chunk, 0 for keys after their query: (c, g c)."""
    c = xk.shape[1]
    return torch.addmm(mask[:c, :, :c].reshape(c, -1), xk.mT, xq).exp_()


def _forward_causal(h: _Head, emit: Callable[[int, int, Tensor], None]) -> None:
    state, mask = h.empty_state(), h.mask()
    for a, b in h.spans(h.k):
        xq, xk, u = h.queries(a, b), h.keys(a, b), h.values(a, b)
        z = u @ _exact(xq, xk, mask)
        if a:
            z.addmm_(h.mix(state), h.factor.features(xq))
        emit(a, b, z)
        if b < len(h.k):
            state.addmm_(u, h.factor.features(xk).mT)


def _backward_causal(h: _Head, pull: Callable[[int, int], Tensor], into: _Gradients) -> None:
    """One sweep forward for the queries and the diagonal blocks, one in reverse for the keys and values before them.

    A single sweep would have to take chunks out of the whole state again. That loses all digits where later keys outweigh
    earlier ones, and compensated sums cost as much as the features that the second sweep forms again.
    """
    state, mask = h.empty_state(), h.mask()
    for a, b in h.spans(h.k):
        xq, xk, u, dz = h.queries(a, b), h.keys(a, b), h.values(a, b), pull(a, b)
        kernel = _exact(xq, xk, mask)
        into.add_values(a, b, u, dz @ kernel.mT)
        logits = kernel.mul_(u.mT @ dz)
        into.add_queries(a, b, xk @ logits)
        into.add_keys(a, b, xq @ logits.mT)
        if into.q is None:
            continue
        if a:
            into.add_queries(a, b, h.factor.pull_back(xq, h.factor.features(xq), h.mix(state).mT @ dz))
        if b < len(h.k):
            state.addmm_(u, h.factor.features(xk).mT)
    back = h.empty_state()
    for a, b in reversed(h.spans(h.k)):
        if b < len(h.k):
            _through_keys(h, a, b, h.keys(a, b), h.values(a, b), h.mix(back), into)
        if a:
            back.addmm_(pull(a, b), h.factor.features(h.queries(a, b)).mT)


class _Factored(torch.autograd.Function):
    """See :func:`factored_attention`. Saved: the inputs, the output, the denominators and, without a mask, the state."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, factor: Factor, causal: bool, chunk: int
    ) -> tuple[Tensor, Tensor]:
        head = _Head(q, k, v, log_weight, factor, chunk)
        out, denominators = v.new_empty(*q.shape[:2], v.shape[1]), q.new_empty(q.shape[:2])

        def normalise(a: int, b: int, z: Tensor) -> None:
            denominators[:, a:b] = z[-1].view(len(q), -1)
            out[:, a:b] = z[:-1].div_(z[-1]).mT.view(len(q), b - a, -1)

        with torch.autocast(q.device.type, enabled=False):
            state = (_forward_causal if causal else _forward)(head, normalise)
        ctx.save_for_backward(q, k, v, log_weight, out, denominators, state)
        ctx.rest = factor, chunk
        ctx.mark_non_differentiable(denominators)
        return out, denominators

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        *inputs, out, denominators, state = ctx.saved_tensors
        head = _Head(*inputs, *ctx.rest)
        # Sums over chunks stay wide where the values are half precision.
        sums = _Gradients(
            *(
                torch.zeros_like(t, dtype=head.k.dtype) if needs else None
                for t, needs in zip(inputs, ctx.needs_input_grad, strict=False)
            )
        )

        def pull(a: int, b: int) -> Tensor:
            g, o = _columns(grad[:, a:b]), _columns(out[:, a:b])
            dz = head.k.new_empty(len(g) + 1, g.shape[1])
            torch.div(g, denominators[:, a:b].reshape(-1), out=dz[:-1])
            torch.sum(dz[:-1] * o, 0, out=dz[-1])
            dz[-1].neg_()
            return dz

        with torch.autocast(grad.device.type, enabled=False):
            if state is None:
                _backward_causal(head, pull, sums)
            else:
                _backward(head, pull, sums, state)
        return *(None if s is None else s.to(t.dtype) for s, t in zip(sums, inputs, strict=True)), None, None, None
