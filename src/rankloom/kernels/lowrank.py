"""The low-rank linear: ``y = x W^T + b + s (x A^T) B^T`` for a frozen ``W`` and trainable ``A`` (r, in), ``B`` (out, r)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["backward_products", "forward_product", "lowrank_linear"]


def forward_product(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``x W^T + bias + scale (x A^T) B^T`` with the low-rank term accumulated into the frozen layer's own result.

    Rank-space tensors are kept as (r, tokens): the thin products then run along the contiguous side of every operand.
    """
    out = F.linear(x, weight, bias)  # the very call the frozen layer makes, so a zero update leaves every bit alone
    hidden = torch.mm(a, x.reshape(-1, x.shape[-1]).mT)
    out.view(-1, out.shape[-1]).mT.addmm_(b, hidden, alpha=scale)
    return out


def backward_products(
    grad: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`forward_product` in ``x``, ``a`` and ``b``, those that are needed; ``grad`` is (tokens, out).

    ``A x^T`` is formed again here rather than kept.
    """
    flat = x.reshape(-1, x.shape[-1])
    down = torch.mm(b.mT, grad.mT).mul_(scale)  # (r, tokens): the gradient in rank space
    grad_x = grad_a = grad_b = None
    if needs[0]:
        grad_x = torch.mm(grad, weight)
        grad_x.mT.addmm_(a.mT, down)
        grad_x = grad_x.view(x.shape)
    if needs[1]:
        grad_a = torch.mm(down, flat)
    if needs[2]:
        grad_b = torch.mm(torch.mm(a, flat.mT).mul_(scale), grad).mT
    return grad_x, grad_a, grad_b


class _LowRankLinear(torch.autograd.Function):
    """Forward and backward with every full-width update in place.

    The scale acts on the (tokens, r) product and both low-rank products accumulate into results the frozen layer makes
    anyway, so no (tokens, out) or (tokens, in) temporary is added. Saved: ``x``, which ``dA`` cannot do without, and
    references to the parameters. Wider factors are brought to ``x``'s dtype here: one node in the graph, not five.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        out = forward_product(x, weight, bias, a.to(x.dtype), b.to(x.dtype), scale)
        return out.detach()  # a 3-D linear's result is a view, which autograd would not let later code change in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x, grad_a, grad_b = backward_products(grad, x, weight, a.to(x.dtype), b.to(x.dtype), ctx.scale, needs)
        return grad_x, None, None, _as(grad_a, a), _as(grad_b, b), None


def _as(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    return None if grad is None else grad.to(parameter.dtype)


def lowrank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``x W^T + bias + scale * (x A^T) B^T``.

    Shapes: ``x (..., in)``, ``weight (out, in)`` frozen, ``bias (out,)`` frozen or None, ``a (r, in)``, ``b (out, r)``.
    ``x``, ``weight`` and ``bias`` have one dtype; the factors may be wider and get their gradients in their own. Half
    precision multiplies in half and accumulates in float32, with no cast of ``x``. Differentiable once in ``x``, ``a``
    and ``b``. With ``b = 0`` the result is bit-identical to the frozen layer's.
    """
    out: Tensor = _LowRankLinear.apply(x, weight, bias, a, b, scale)
    return out
