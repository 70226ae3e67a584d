"""Differences of distances between two sets of points in two heads (SNELL, 2411.01800), a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["distance_difference", "grid"]

CHUNK = 1 << 17  # distances at a time: what lies between the products stays in the caches


def grid(width: int) -> int:
    """How many rows are worked out at a time. Rows of one grid have the same bits, whichever others are asked for with them."""
    return max(1, CHUNK // max(width, 1))


class _DistanceDifference(torch.autograd.Function):
    """Saved: the points. ``d ||p - q|| / dp = (p - q) / ||p - q||``: with the gradient over the distance as weights, two thin
    products with the points, and with ones for the sums of weights."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> Tensor:
        ctx.save_for_backward(p, q)
        out = p.new_empty(p.shape[1], q.shape[1])
        for span, (first, second) in _squares(p, q):
            torch.sub(_rooted(first), _rooted(second), out=out[span])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        p, q = ctx.saved_tensors
        # Few rows first: thin products run along the contiguous side of the weights.
        p_ones, q_ones = (torch.cat([x, torch.ones_like(x[..., :1])], -1).mT.contiguous() for x in (p, q))
        by_p, by_q = torch.empty_like(p_ones), torch.zeros_like(q_ones)
        tiny = torch.finfo(p.dtype).tiny
        for span, squares in _squares(p, q):
            for head, square in enumerate(squares):
                # Where points coincide the slope is zero, not undefined.
                distance = F.threshold(square, tiny, float("inf"), inplace=True).sqrt_()
                weights = torch.div(grad[span], distance, out=distance)
                by_p[head, :, span] = q_ones[head] @ weights.mT
                by_q[head] += p_ones[head, :, span] @ weights
        signs = p.new_tensor([1.0, -1.0])[:, None, None]
        grads = [signs * (x * by[:, -1:].mT - by[:, :-1].mT) for x, by in ((p, by_p), (q, by_q))]
        return grads[0], grads[1]


def _rooted(square: Tensor) -> Tensor:
    return square.clamp_(min=torch.finfo(square.dtype).tiny).sqrt_()


def _squares(p: Tensor, q: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """``|p|^2 - 2 p q + |q|^2`` (n, in) of both heads, by rows: one product of points that carry their norms along."""
    ones = [torch.ones_like(points[0, :, :1]) for points in (p, q)]
    # A tensor for each head: products of equal heads have equal bits only at equal alignment.
    above = [torch.cat([-2 * x, x.square().sum(-1, keepdim=True), ones[0]], -1) for x in p]
    beside = [torch.cat([x, ones[1], x.square().sum(-1, keepdim=True)], -1) for x in q]
    height = grid(q.shape[1])
    for start in range(0, p.shape[1], height):
        span = slice(start, start + height)
        yield span, [a[span] @ b.mT for a, b in zip(above, beside, strict=True)]


def distance_difference(p: Tensor, q: Tensor) -> Tensor:
    """``||p_0j - q_0i|| - ||p_1j - q_1i||`` (n, in) for points ``p`` (2, n, d) and ``q`` (2, in, d).

    Differentiable once in both; the slope where points coincide is zero. Beyond the result, the memory is that of some rows.
    """
    out: Tensor = _DistanceDifference.apply(p, q)
    return out
