"""The real part of the inverse Fourier transform of a few real coefficients (FourierFT, 2405.03003)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["fourier_sum"]


class _FourierSum(torch.autograd.Function):
    """For a real ``S`` the real part of ``fft2(S)`` is that of ``conj ifft2(S)`` times the size, and its own adjoint: both ways
    are one real transform of half the columns; the other half are those of (-p, -q)."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape, ctx.dtype = shape, c.dtype
        out, width = shape
        wide = torch.promote_types(c.dtype, torch.float32)
        spectrum = torch.zeros(shape, dtype=wide, device=c.device)
        spectrum.view(-1).scatter_add_(0, places[0] * width + places[1], c.to(wide) / (out * width))
        half = torch.fft.rfft2(spectrum).real
        made, kept = spectrum, half.shape[1]
        made[:, :kept] = half
        if rest := width - kept:
            made[0, kept:] = half[0, 1 : rest + 1].flip(0)
            made[1:, kept:] = half[1:, 1 : rest + 1].flip(0, 1)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        (out, width), (i, j) = ctx.shape, places
        half = torch.fft.rfft2(grad).real
        high = 2 * j > width
        i, j = torch.where(high, (out - i) % out, i), torch.where(high, width - j, j)
        return (half[i, j] / (out * width)).to(ctx.dtype), None, None


def fourier_sum(c: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """``Re(ifft2(S))`` (out, in) with ``S[i_k, j_k] = c_k`` for real ``c`` (n,) and ``places`` (2, n); float32 at least.

    Differentiable once in ``c``. Coefficients at one place add up.
    """
    made: Tensor = _FourierSum.apply(c, places, shape)
    return made
