"""Linear combinations of random matrices that are never all there: ``sum_i c_i M_i`` from a seed (NOLA, 2310.02556)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.kernels.bank import Bank

__all__ = ["combine"]

CHUNK = 1 << 20  # numbers of a bank that is not kept in memory at a time


class _Combine(torch.autograd.Function):
    """Nothing is saved for backward: ``dc_i = scale <M_i, dA>`` goes through the same chunks again."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, bank: Bank, shape: tuple[int, int], scale: float, chunk: int) -> Tensor:
        ctx.rest, ctx.like = (bank, len(c), scale, chunk), (c.device, c.dtype)
        out = c.new_zeros(shape[0] * shape[1])
        with torch.autocast(c.device.type, enabled=False):
            for span, basis in _chunks(bank, len(c), len(out), ctx.like, chunk):
                out.addmv_(basis.mT, c[span], alpha=scale)
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bank, count, scale, chunk = ctx.rest
        flat = grad.reshape(-1)
        grad_c = flat.new_empty(count)
        with torch.autocast(flat.device.type, enabled=False):
            for span, basis in _chunks(bank, count, len(flat), ctx.like, chunk):
                torch.mv(basis, flat, out=grad_c[span])
        return grad_c.mul_(scale), None, None, None, None


def _chunks(
    bank: Bank, count: int, size: int, like: tuple[torch.device, torch.dtype], chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        yield slice(start, stop), bank.rows(start, stop, size, *like)


def combine(c: Tensor, bank: Bank, shape: tuple[int, int], scale: float = 1.0, chunk: int | None = None) -> Tensor:
    """``scale * sum_i c_i M_i`` for ``c`` (k,) and ``M_i`` (m, n), row i of a bank; differentiable once in ``c``.

    A bank that is not kept is generated ``chunk`` matrices at a time, here and again in backward: beyond the result, the
    memory is that of one chunk. The coefficients' dtype is that of all arithmetic.
    """
    size = shape[0] * shape[1]
    every = len(c) if bank.kept else max(1, CHUNK // size)
    out: Tensor = _Combine.apply(c, bank, shape, scale, every if chunk is None else chunk)
    return out
