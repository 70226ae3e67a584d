"""Rows of the orthonormal DCT-II at learned places, and its fast inverse (LoCA, 2502.06820).

``c_i[p] = w_i cos(pi (p + 1/2) i / n)`` with ``w_0 = sqrt(1 / n)`` and ``w_i = sqrt(2 / n)`` else. A place is an integer; its
gradient is the central difference of what depends on it, clipped at the borders.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["cosine_rows", "inverse_dct", "placed", "snapped"]


class _Snapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, sizes: Tensor) -> Tensor:
        ctx.save_for_backward(sizes)
        return torch.round(u.clamp(0, 0.999) * (sizes - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (sizes,) = ctx.saved_tensors
        return grad.clamp(-1, 1) * (sizes - 1), None


def snapped(u: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Places (2, n) in a matrix of given sizes for ``u`` (2, n) in [0, 1].

    The gradient by a place is clamped to [-1, 1] before it is scaled to ``u``; it passes where ``u`` has left [0, 1] too, so that
    a place can come back from the border.
    """
    out: Tensor = _Snapped.apply(u, torch.tensor(sizes, dtype=u.dtype, device=u.device)[:, None])
    return out


def _rows(places: Tensor, length: int, span: slice) -> Tensor:
    """Entries ``span`` of the DCT's rows at integer places (n,), through a table of the cosine's ``4 length`` values."""
    index = places.long().clamp(0, length - 1)
    angles = torch.arange(4 * length, dtype=torch.float64, device=places.device) * (math.pi / (2 * length))
    at = torch.arange(span.start, span.stop, device=places.device)
    found = angles.cos().mul_((2 / length) ** 0.5).to(places.dtype)[(index[:, None] * (2 * at + 1)) % (4 * length)]
    return found.mul_(torch.where(index == 0, found.new_tensor(0.5**0.5), found.new_tensor(1.0))[:, None])


class _CosineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Tensor, length: int, span: slice, learned: bool) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rest = length, span, learned
        return _rows(places, length, span)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        length, span, learned = ctx.rest
        if not learned:
            return torch.zeros_like(places), None, None, None
        slope = _rows(places + 1, length, span) - _rows(places - 1, length, span)
        return (grad * slope).sum(1) / 2, None, None, None


def cosine_rows(places: Tensor, length: int, span: slice | None = None, learned: bool = True) -> Tensor:
    """The DCT's rows (n, length) at ``places`` (n,), or some of their entries; a zero gradient where nothing is learned."""
    out: Tensor = _CosineRows.apply(places, length, slice(0, length) if span is None else span, learned)
    return out


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(values, places)
        return values.new_zeros(length, values.shape[1]).index_add_(0, places.long(), values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        values, places = ctx.saved_tensors
        index, last = places.long(), len(grad) - 1
        by_place = None
        if ctx.needs_input_grad[1]:
            slope = grad[(index + 1).clamp(max=last)] - grad[(index - 1).clamp(min=0)]
            by_place = (values * slope).sum(1) / 2
        return grad[index], by_place, None


def placed(values: Tensor, places: Tensor, length: int) -> Tensor:
    """Rows ``values`` (n, h) added into a zero matrix (length, h) at ``places`` (n,)."""
    out: Tensor = _Placed.apply(values, places, length)
    return out


def inverse_dct(spectrum: Tensor) -> Tensor:
    """The inverse of the orthonormal DCT-II along the first dimension, by a real FFT of twice the length."""
    n = len(spectrum)
    turn = torch.arange(n, dtype=torch.float64, device=spectrum.device) * (math.pi / (2 * n))
    size = torch.full_like(turn, (2 / n) ** 0.5 * n)
    size[0] = 2 * n**0.5
    phase = torch.polar(size, turn).to(torch.promote_types(spectrum.dtype, torch.complex64))
    return torch.fft.irfft(spectrum * phase[:, None], n=2 * n, dim=0)[:n]
