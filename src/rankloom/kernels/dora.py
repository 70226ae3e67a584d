"""The DoRA linear: ``y = g * (x W^T + s (x A^T) B^T) + bias`` with a per-output gain ``g = m / ||V||`` (norm held constant)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["dora_linear"]


class _DoRALinear(torch.autograd.Function):
    """One function for the gain, the frozen layer and the low-rank term.

    The gain's gradient needs ``u = x V^T``; it is read back from the saved output, ``u = (y - bias) / g``, which whatever
    follows usually holds anyway, instead of keeping a second (tokens, out) tensor. Rows whose gain is (near) zero lose that
    way back; only then is ``u`` formed again from ``x``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor, scale: float
    ) -> Tensor:
        out = F.linear(x, weight, bias)  # the very call the frozen layer makes, so a zero update leaves every bit alone
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(torch.mm(x.reshape(-1, x.shape[-1]), a.mT), b.mT, alpha=scale)
        # (1 - g) * bias is exactly zero at g = 1: step 0 is bit-identical to the frozen layer even where its bias is fused.
        out.mul_(gain) if bias is None else out.mul_(gain).add_((1 - gain) * bias)
        ctx.save_for_backward(x, weight, bias, a, b, gain, out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, a, b, gain, result = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_gain = None
        if ctx.needs_input_grad[5]:
            if bool((gain.abs() > 1e-6).all()):
                out = result.reshape(-1, result.shape[-1])
                product = grad * (out if bias is None else out - bias)
                grad_gain = product.sum(0, dtype=torch.promote_types(gain.dtype, torch.float32)) / gain
            else:
                pre = torch.mm(flat, weight.mT).addmm_(torch.mm(flat, a.mT), b.mT, alpha=ctx.scale)
                grad_gain = (grad * pre).sum(0, dtype=torch.promote_types(gain.dtype, torch.float32))
            grad_gain = grad_gain.to(gain.dtype)
        grad = grad * gain
        down = torch.mm(grad, b).mul_(ctx.scale)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight).addmm_(down, a).view(x.shape)
        if ctx.needs_input_grad[3]:
            grad_a = torch.mm(down.mT, flat)
        if ctx.needs_input_grad[4]:
            grad_b = torch.mm(grad.mT, torch.mm(flat, a.mT).mul_(ctx.scale))
        return grad_x, None, None, grad_a, grad_b, grad_gain, None


def dora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor, scale: float
) -> Tensor:
    """``gain * (x W^T + scale * (x A^T) B^T) + bias``.

    Shapes as :func:`rankloom.kernels.lowrank_linear`, ``gain (out,)``. Differentiable once in ``x``, ``a``, ``b``, ``gain``.
    With ``b = 0`` and ``gain = 1`` the result is bit-identical to the frozen layer's.
    """
    out: Tensor = _DoRALinear.apply(x, weight, bias, a, b, gain, scale)
    return out
