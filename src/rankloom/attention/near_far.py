"""Attention sums in which some keys are near and exact, and all others far and low-rank, without ``L x L`` or ``L x width``.

Queries are cut into segments and keys into blocks. A segment meets its near blocks through the exact kernel, and all other
keys through ``M (state - states of the near blocks)``, so no product of features is subtracted entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.attention.contract import Factor

__all__ = ["Plan", "near_far_sums"]

Span = tuple[int, int]


class Plan(NamedTuple):
    """Which rows meet exactly, in the order in which the rows are cut."""

    segments: Sequence[Span]
    blocks: Sequence[Span]
    near: Sequence[range]
    """For each segment its near blocks; neither end ever moves back."""
    shared: Sequence[int]
    """For each segment, so many first keys are near to it beside its blocks; those keys are in no block."""
    positions: Tensor | None = None
    """Of the keys. Where given, attention is causal: blocks after the near ones are in the future, and so are all keys
    after the query's own position."""
    heads: int = 1
    """Query row ``i`` is at position ``i // heads``."""

    def near_span(self, segment: int) -> Span:
        near = self.near[segment]
        return (self.blocks[near.start][0], self.blocks[near.stop - 1][1]) if near else (0, 0)

    def near_rows(self, segment: int, rows: Tensor) -> Tensor:
        low, high = self.near_span(segment)
        count = self.shared[segment]
        return torch.cat([rows[:count], rows[low:high]]) if count else rows[low:high]

    def near_segments(self) -> list[range]:
        """For each block the segments it is near to."""
        of: list[list[int]] = [[] for _ in self.blocks]
        for c, near in enumerate(self.near):
            for b in near:
                of[b].append(c)
        return [range(some[0], some[-1] + 1) if some else range(0) for some in of]

    def kernel(self, segment: int, q: Tensor, k: Tensor) -> Tensor:
        """The exact kernel of the segment's rows ``q`` and its near rows ``k``."""
        kernel = (q @ k.mT).exp_()
        if self.positions is not None:
            at = torch.arange(*self.segments[segment], device=q.device) // self.heads
            kernel.masked_fill_(self.near_rows(segment, self.positions) > at[:, None], 0.0)
        return kernel


def _far(
    near: Sequence[range], state: Callable[[int], Tensor], total: Tensor | None, factor: Factor
) -> Iterator[Tensor | None]:
    """For each of ``near``, ``M`` times the sum of all states but those, given their ``total``; without it, of those before.

    None where nothing is before. States are formed when needed and dropped when no longer near, so at most those of two
    overlapping windows exist.
    """
    runs = [(each, len(list(same))) for each, same in groupby(near)]
    kept: dict[int, Tensor] = {}
    past, done = None, 0
    for (each, times), (following, _) in zip(runs, [*runs[1:], (range(0), 0)], strict=True):
        if total is None:
            for j in range(done, each.start):
                past = state(j) if past is None else past + state(j)
            done, rest = each.start, past
        else:
            rest = total.clone()
            for j in each:
                kept[j] = kept[j] if j in kept else state(j)
                rest -= kept[j]
                if j not in following:
                    del kept[j]
        yield from repeat(None if rest is None else factor.mix(rest), times)


class _Sums(torch.autograd.Function):
    """Features and exact kernels are formed again in the backward pass, never stored: beyond tensors of the inputs' own shapes,
    memory is O(width m) for states, O(width x rows) for one segment or block, and one segment's exact kernel.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, u: Tensor, factor: Factor, plan: Plan) -> Tensor:
        ctx.factor, ctx.plan, total = factor, plan, None
        if plan.positions is None:
            total = sum((_state(factor, k, u, span) for span in plan.blocks), u.new_zeros(factor.width, u.shape[1]))
        z = q.new_empty(len(q), u.shape[1])
        past = _far(plan.near, lambda b: _state(factor, k, u, plan.blocks[b]), total, factor)
        for segment, far in enumerate(past):
            rows = slice(*plan.segments[segment])
            kernel = plan.kernel(segment, q[rows], plan.near_rows(segment, k))
            torch.mm(kernel, plan.near_rows(segment, u), out=z[rows])
            if far is not None:
                z[rows].addmm_(factor.features(columns(q[rows])).mT, far)
        ctx.save_for_backward(q, k, u, total)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        q, k, u, total = ctx.saved_tensors
        with torch.autocast(dz.device.type, enabled=False):
            return *_gradients(q, k, u, total, dz, ctx.factor, ctx.plan), None, None


def _gradients(
    q: Tensor, k: Tensor, u: Tensor, total: Tensor | None, dz: Tensor, factor: Factor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, du = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(u)
    total_back = None if total is None else torch.zeros_like(total)
    past = _far(plan.near, lambda b: _state(factor, k, u, plan.blocks[b]), total, factor)
    for segment, far in enumerate(past):
        rows = slice(*plan.segments[segment])
        near_k, near_u = plan.near_rows(segment, k), plan.near_rows(segment, u)
        kernel = plan.kernel(segment, q[rows], near_k)
        slopes = (dz[rows] @ near_u.mT).mul_(kernel)
        torch.mm(slopes, near_k, out=dq[rows])
        count, span = plan.shared[segment], slice(*plan.near_span(segment))
        for out, part in ((dk, slopes.mT @ q[rows]), (du, kernel.mT @ dz[rows])):
            out[:count] += part[:count]
            out[span] += part[count:]
        if far is not None:
            x = columns(q[rows])
            features = factor.features(x)
            if total_back is not None:
                total_back.addmm_(features, dz[rows])
            dq[rows] += factor.pull_back(x, features, far @ dz[rows].mT).mT
    # From a block's side near and far change places with a segment's; in causal order they also run backwards.
    blocks, near, last = range(len(plan.blocks)), plan.near_segments(), len(plan.segments) - 1
    if plan.positions is not None:
        blocks, near = blocks[::-1], [range(last - r[-1], last + 1 - r[0]) for r in reversed(near)]
    order = range(last, -1, -1) if plan.positions is not None else range(last + 1)
    future = _far(near, lambda c: _state(factor, q, dz, plan.segments[order[c]]), total_back, factor)
    for block, far in zip(blocks, future, strict=True):
        if far is not None:
            rows = slice(*plan.blocks[block])
            x = columns(k[rows])
            features = factor.features(x)
            du[rows].addmm_(features.mT, far)
            dk[rows] += factor.pull_back(x, features, far @ u[rows].mT).mT
    return dq, dk, du


def columns(rows: Tensor) -> Tensor:
    return rows.mT.contiguous()


def _state(factor: Factor, x: Tensor, u: Tensor, span: Span) -> Tensor:
    rows = slice(*span)
    return factor.features(columns(x[rows])) @ u[rows]


def near_far_sums(q: Tensor, k: Tensor, u: Tensor, factor: Factor, plan: Plan) -> Tensor:
    """``z_i = sum_j w_ij u_j`` for ``q`` (n, d), ``k`` (L, d), ``u`` (L, m), differentiable once in all three: (n, m).

    ``w_ij = exp(q_i . k_j)`` where the plan has ``i`` and ``j`` near, ``phi(q_i)^T M phi(k_j)`` elsewhere; 0 in the future.
    """
    return _Sums.apply(q, k, u, factor, plan)
