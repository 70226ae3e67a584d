"""Sums of a few separable waves, ``sum_k a_k l_{i_k} r_{j_k}^T``: what inverse transforms of sparse spectra are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["separable_sum"]

CHUNK = 1 << 17  # numbers of gathered rows at a time


class _SeparableSum(torch.autograd.Function):
    """The terms of one wave on the shorter side are added up on the longer one; one product is left, with the waves in use."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, left: Tensor, right: Tensor, learned: bool) -> Tensor:
        swapped = len(left) > len(right)
        (i, j), (waves, others) = places.long().flip(0) if swapped else places.long(), _ordered(left, right, swapped)
        order = i.argsort(stable=True)
        used, inverse, counts = i[order].unique_consecutive(return_inverse=True, return_counts=True)
        starts = counts.cumsum(0) - counts
        sums = F.embedding_bag(j[order], others.contiguous(), starts, mode="sum", per_sample_weights=values[order])
        chosen = waves.index_select(0, used)
        ctx.save_for_backward(values, i, j, torch.empty_like(order).index_copy_(0, order, inverse), chosen, left, right)
        ctx.rest = swapped, learned, places.dtype
        return sums.mT @ chosen if swapped else chosen.mT @ sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, i, j, inverse, chosen, left, right = ctx.saved_tensors
        swapped, learned, dtype = ctx.rest
        waves, others = _ordered(left, right, swapped)
        grad = grad.mT if swapped else grad
        by_value = by_place = None
        if ctx.needs_input_grad[0]:
            by_value = _dots(chosen @ grad, inverse, others, j)
        if ctx.needs_input_grad[1] and learned:
            spectrum = waves @ grad
            last, final = len(waves) - 1, len(others) - 1
            slopes = [
                _dots(spectrum, (i + 1).clamp(max=last), others, j) - _dots(spectrum, (i - 1).clamp(min=0), others, j),
                _dots(spectrum, i, others, (j + 1).clamp(max=final)) - _dots(spectrum, i, others, (j - 1).clamp(min=0)),
            ]
            by_place = (values * torch.stack(slopes[::-1] if swapped else slopes) / 2).to(dtype)
        elif ctx.needs_input_grad[1]:
            by_place = torch.zeros(2, len(values), dtype=dtype, device=values.device)
        return by_value, by_place, None, None, None


def _ordered(left: Tensor, right: Tensor, swapped: bool) -> tuple[Tensor, Tensor]:
    return (right, left) if swapped else (left, right)


def _dots(a: Tensor, i: Tensor, b: Tensor, j: Tensor) -> Tensor:
    """``<a[i_k], b[j_k]>`` (n,), some at a time: the rows' copies stay in the caches."""
    some = max(1, CHUNK // max(a.shape[1], 1))
    pairs = zip(i.split(some), j.split(some), strict=True)
    return torch.cat([a.index_select(0, first).mul_(b.index_select(0, second)).sum(1) for first, second in pairs])


def separable_sum(values: Tensor, places: Tensor, left: Tensor, right: Tensor, *, learned: bool = False) -> Tensor:
    """``sum_k a_k left[i_k]^T right[j_k]`` (m, n) for ``values`` ``a`` (c,), ``places`` ``i, j`` (2, c), frozen waves ``left``
    (p, m), ``right`` (q, n); all but the places have one dtype.

    Differentiable once in the values and, where ``learned``, in the places: by central differences, clipped at the borders.
    Takes ``min(c, p, q) m n`` multiply-adds and ``c max(m, n)`` more, and keeps ``min(c, p, q)`` waves for the backward pass.
    """
    out: Tensor = _SeparableSum.apply(values, places, left, right, learned)
    return out
