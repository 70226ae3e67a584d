"""The sweeps over chunks of tokens that :mod:`rankloom.attention.engine` is made of, with and without a causal mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rankloom.attention.contract import Factor

__all__ = ["Gradients", "Head", "backward", "backward_causal", "columns", "forward", "forward_causal"]


class Head(NamedTuple):
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
        return columns(self.q[:, a:b])

    def keys(self, a: int, b: int) -> Tensor:
        """(dim, c)."""
        return columns(self.k[a:b])

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


class Gradients(NamedTuple):
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


def columns(x: Tensor) -> Tensor:
    """(..., c, n) as (n, ... c)."""
    return x.reshape(-1, x.shape[-1]).mT.contiguous()


def forward(h: Head, emit: Callable[[int, int, Tensor], None]) -> Tensor:
    """Give ``Z^T`` (d_v + 1, c) of every chunk of queries to ``emit``; return the mixed state."""
    state = h.empty_state()
    for a, b in h.spans(h.k):
        state.addmm_(h.values(a, b), h.factor.features(h.keys(a, b)).mT)
    state = h.mix(state)
    for a, b in h.spans(h.q):
        emit(a, b, state @ h.factor.features(h.queries(a, b)))
    return state


def backward(h: Head, pull: Callable[[int, int], Tensor], into: Gradients, state: Tensor) -> None:
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


def _through_keys(h: Head, a: int, b: int, x: Tensor, u: Tensor, back: Tensor, into: Gradients) -> None:
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


def forward_causal(h: Head, emit: Callable[[int, int, Tensor], None]) -> None:
    """Give ``Z^T`` (d_v + 1, g c) of every chunk to ``emit``: exact inside it, through the factor for the keys before."""
    state, mask = h.empty_state(), h.mask()
    for a, b in h.spans(h.k):
        xq, xk, u = h.queries(a, b), h.keys(a, b), h.values(a, b)
        z = u @ _exact(xq, xk, mask)
        if a:
            z.addmm_(h.mix(state), h.factor.features(xq))
        emit(a, b, z)
        if b < len(h.k):
            state.addmm_(u, h.factor.features(xk).mT)


def backward_causal(h: Head, pull: Callable[[int, int], Tensor], into: Gradients) -> None:
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
