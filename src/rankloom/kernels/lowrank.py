"""The low-rank linear: ``y = x W^T + b + s (x A^T) B^T`` for a frozen ``W`` and trainable ``A`` (r, in), ``B`` (out, r)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["lowrank_linear"]


class _LowRankLinear(torch.autograd.Function):
    """Forward and backward with every full-width update in place.

    The scale acts on the (tokens, r) product and both low-rank products accumulate into the frozen layer's own result
    (``beta = 1``), so no (tokens, out) or (tokens, in) temporary exists besides what the frozen layer makes anyway.
    Saved: ``x``, which ``dA`` cannot do without, and the factors. ``x A^T`` is formed again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        out = F.linear(x, weight, bias)  # the very call the frozen layer makes, so a zero update leaves every bit alone
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(torch.mm(x.reshape(-1, x.shape[-1]), a.mT), b.mT, alpha=scale)
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        down = torch.mm(grad, b).mul_(ctx.scale)  # (tokens, r): the gradient in rank space
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight).addmm_(down, a).view(x.shape)
        if ctx.needs_input_grad[3]:
            grad_a = torch.mm(down.mT, flat)
        if ctx.needs_input_grad[4]:
            grad_b = torch.mm(grad.mT, torch.mm(flat, a.mT).mul_(ctx.scale))
        return grad_x, None, None, grad_a, grad_b, None


def lowrank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``x W^T + bias + scale * (x A^T) B^T``.

    Shapes: ``x (..., in)``, ``weight (out, in)`` frozen, ``bias (out,)`` frozen or None, ``a (r, in)``, ``b (out, r)``; all
    of one dtype (half precision multiplies in half and accumulates in float32, with no cast of ``x``). Differentiable once
    in ``x``, ``a`` and ``b``. With ``b = 0`` the result is bit-identical to the frozen layer's.
    """
    out: Tensor = _LowRankLinear.apply(x, weight, bias, a, b, scale)
    return out
