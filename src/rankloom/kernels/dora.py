"""The DoRA linear: ``y = g * (x W^T + s (x A^T) B^T) + bias`` with a per-output gain ``g = m / ||V||`` (norm constant)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.kernels.lowrank import Linear, Operands, products_backward, products_forward

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
        gained = gain.to(x.dtype)
        (out,), hidden, operands = products_forward(x, [Linear(weight, bias, a, b, scale)])
        out.mul_(gained)
        if bias is not None:
            # (1 - g) * bias is exactly zero at g = 1: step 0 is bit-identical to the frozen layer, which fuses its bias.
            out.add_((1 - gained) * bias)
        ctx.save_for_backward(x, weight, bias, a, b, gain, out, hidden, operands.rows, *operands.columns)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, a, b, gain, out, hidden, rows, column = ctx.saved_tensors
        operands = Operands((weight,), rows, (column,), (ctx.scale,), a.dtype)
        grad = grad.reshape(-1, grad.shape[-1])
        grad_gain = None
        if ctx.needs_input_grad[5]:
            if bool((gain.abs() > 1e-6).all()):
                y = out.view(-1, out.shape[-1])
                grad_gain = _column_dots(grad, y if bias is None else y - bias, gain.dtype) / gain
            else:
                (u,), *_ = products_forward(x, [Linear(weight, None, a, b, ctx.scale)])
                grad_gain = _column_dots(grad, u.view_as(grad), gain.dtype)
        scaled = grad * gain.to(x.dtype)
        needs_x, trains_a, trains_b = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        grad_x, (grad_a,), (grad_b,) = products_backward(
            [scaled], x if trains_a else None, hidden if trains_b else None, operands, needs_x
        )
        return None if grad_x is None else grad_x.view(x.shape), None, None, grad_a, grad_b, grad_gain, None


def _column_dots(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Dot products of matching columns (tokens, n) -> (n,) in ``dtype``."""
    return torch.sum(left * right, 0).to(dtype)  # sums of halves accumulate in float32 by themselves


def dora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor, scale: float
) -> Tensor:
    """``gain * (x W^T + scale * (x A^T) B^T) + bias``.

    Shapes and dtypes as :func:`rankloom.kernels.lowrank_linear`; ``gain (out,)`` may be wider as well. Differentiable once
    in ``x``, ``a``, ``b``, ``gain``. With ``b = 0`` and ``gain = 1`` the result is bit-identical to the frozen layer's.
    """
    out: Tensor = _DoRALinear.apply(x, weight, bias, a, b, gain, scale)
    return out
