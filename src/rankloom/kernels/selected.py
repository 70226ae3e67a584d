"""The linear with an update in a few of its columns or rows: ``y = x W^T + b + s x[idx] B^T``, or ``y[idx] += s x A^T``."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Side", "selected_linear"]

Side = Literal["in", "out"]


class _Columns(torch.autograd.Function):
    """``x W^T + b + s x[idx] B^T``. Saved: the r chosen features of ``x``, ``B`` and ``W``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, index: Tensor, scale: float
    ) -> Tensor:
        chosen, factor = x.reshape(-1, x.shape[-1]).index_select(1, index), b.to(x.dtype)
        out = F.linear(x, weight, bias)
        out.view(-1, out.shape[-1]).addmm_(chosen, factor.mT, alpha=scale)
        ctx.save_for_backward(chosen if ctx.needs_input_grad[3] else None, weight, factor, index)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, b.dtype
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chosen, weight, factor, index = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (flat @ weight).index_add_(1, index, flat @ factor, alpha=ctx.scale).view(ctx.shape)
        if chosen is not None:
            grad_b = (flat.mT @ chosen).mul_(ctx.scale).to(ctx.dtype)
        return grad_x, None, None, grad_b, None, None


class _Rows(torch.autograd.Function):
    """``x W^T + b`` with ``s x A^T`` added to the outputs ``idx``. Saved: ``x``, ``A`` and ``W``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, index: Tensor, scale: float
    ) -> Tensor:
        factor = a.to(x.dtype)
        out = F.linear(x, weight, bias)
        flat = x.reshape(-1, x.shape[-1])
        out.view(-1, out.shape[-1]).index_add_(1, index, flat @ factor.mT, alpha=scale)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, factor, index)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, a.dtype
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor, index = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        chosen = flat.index_select(1, index)
        grad_x = grad_a = None
        if ctx.needs_input_grad[0]:
            grad_x = (flat @ weight).addmm_(chosen, factor, alpha=ctx.scale).view(ctx.shape)
        if x is not None:
            grad_a = (chosen.mT @ x.reshape(-1, x.shape[-1])).mul_(ctx.scale).to(ctx.dtype)
        return grad_x, None, None, grad_a, None, None


def selected_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor, index: Tensor, scale: float, side: Side
) -> Tensor:
    """``x W^T + b`` with an update of the columns (``side="in"``) or rows (``"out"``) ``index`` (r,) of ``W`` (out, in).

    ``x (..., in)``, ``weight`` and ``bias`` have one dtype and are frozen; ``factor`` is (out, r), or (r, in) for rows, may be
    wider, and gets its gradient in its own dtype. Indices are distinct. Differentiable once in ``x`` and ``factor``. With a
    zero factor the output is bit-identical to the frozen layer's.
    """
    function = _Columns if side == "in" else _Rows
    out: Tensor = function.apply(x, weight, bias, factor, index, scale)
    return out
