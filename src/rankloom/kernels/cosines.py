"""Waves of the orthonormal DCT-II, and learned places among them (LoCA, 2502.06820).

``c_i[p] = w_i cos(pi (p + 1/2) i / n)`` with ``w_0 = sqrt(1 / n)`` and ``w_i = sqrt(2 / n)`` else. A place is an integer; its
gradient is the central difference of what depends on it, clipped at the borders.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["cosine_rows", "cosine_waves", "snapped"]

CHUNK = 1 << 20  # entries whose angles are worked out at a time


@lru_cache(maxsize=32)
def cosine_waves(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All waves ``c_i`` of the DCT-II (length, length), made once and kept for all layers of this length."""
    index = torch.arange(length)
    weights = torch.full((length, 1), (2 / length) ** 0.5, dtype=torch.float64)
    weights[0] = length**-0.5
    values = torch.cos(torch.arange(4 * length, dtype=torch.float64) * (math.pi / (2 * length)))
    out, step = torch.empty(length, length, dtype=dtype), max(1, CHUNK // length)
    for start in range(0, length, step):
        span = slice(start, start + step)
        # Reduced as integers, so that large angles lose nothing.
        out[span] = values[index[span, None] * (2 * index + 1) % (4 * length)] * weights[span]
    return out.to(device)


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


class _CosineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Tensor, length: int, learned: bool) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rest = length, learned
        return cosine_waves(length, places.dtype, places.device).index_select(0, places.long())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        length, learned = ctx.rest
        if not learned:
            return torch.zeros_like(places), None, None
        waves, index = cosine_waves(length, places.dtype, places.device), places.long()
        above, below = (waves.index_select(0, at.clamp(0, length - 1)) for at in (index + 1, index - 1))
        return (grad * (above - below)).sum(1) / 2, None, None


def cosine_rows(places: Tensor, length: int, learned: bool = True) -> Tensor:
    """The DCT's waves (n, length) at ``places`` (n,); a zero gradient where nothing is learned."""
    out: Tensor = _CosineRows.apply(places, length, learned)
    return out
