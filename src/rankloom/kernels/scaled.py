"""A small random basis under learned row and column scales (RandLoRA, 2502.00987), without the broadcast intermediates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["scaled_bases"]


class _ScaledBases(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(a, rows, columns)
        return (a * columns[:, None]).mul_(rows.mT[:, :, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, rows, columns = ctx.saved_tensors
        weighed = grad * a
        grad_rows = torch.bmm(weighed, columns[:, :, None])[:, :, 0].mT
        grad_columns = torch.bmm(rows.mT[:, None], weighed)[:, 0]
        return None, grad_rows, grad_columns


def scaled_bases(a: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``diag(rows_j) A diag(columns_j)`` (n, r, d) for a frozen ``A`` (r, d), ``rows`` (r, n) and ``columns`` (n, d).

    Differentiable once in both scales; for the backward pass only the three arguments are kept.
    """
    out: Tensor = _ScaledBases.apply(a, rows, columns)
    return out
