"""The DoRA linear: ``y = g * (x W^T + s (x A^T) B^T) + bias`` with a per-output gain ``g = m / ||V||`` (norm constant)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.kernels.lowrank import Linear, Operands, products_backward, products_forward

__all__ = ["dora_linear", "dora_linears"]


class _DoRALinears(torch.autograd.Function):
    """One function for the gains, the frozen layers and the low-rank terms of all linears on one input.

    A gain's gradient needs ``u = x V^T``; it is read back from the saved output, ``u = (y - bias) / g``, which whatever
    follows usually holds anyway, instead of keeping a second (tokens, out) tensor. Rows whose gain is (near) zero lose that
    way back; only then is ``u`` formed again from ``x``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        linears, gains = _linears(scales, tensors)

        def finish(i: int, out: Tensor) -> None:
            gain, bias = gains[i].to(x.dtype), linears[i].bias
            out.mul_(gain)
            if bias is not None:
                # (1 - g) * bias is exactly zero at g = 1: step 0 is bit-identical to the frozen layer, which fuses its bias.
                out.add_((1 - gain) * bias)

        outs, hidden, operands = products_forward(x, linears, finish)
        _, rows, columns, *ctx.rest = operands
        ctx.save_for_backward(x, hidden, rows, *columns, *outs, *tensors)
        ctx.scales = scales
        # Detached, as the low-rank linear's; what is saved shares its memory.
        return tuple(out.detach() for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(grads)
        x, hidden, rows, *rest = ctx.saved_tensors
        columns, outs = rest[:count], rest[count : 2 * count]
        linears, gains = _linears(ctx.scales, rest[2 * count :])
        operands = Operands([linear.weight for linear in linears], rows, columns, *ctx.rest)
        trains_a, trains_b, trains_gain = (any(ctx.needs_input_grad[i::5]) for i in (4, 5, 6))
        grad_gains: list[Tensor | None] = [None] * count
        readable = trains_gain and bool((torch.cat(gains).abs() > 1e-6).all())

        def scaled(i: int) -> Tensor:
            """The gradient in the output before its gain; the gain's own gradient on the way."""
            grad, out, linear, gain = grads[i].reshape(-1, grads[i].shape[-1]), outs[i], linears[i], gains[i]
            product = None
            if trains_gain:
                gained = _without_bias(out, linear.bias) if readable else _formed_again(x, linear)
                product = grad * gained.view_as(grad)
                dots = product.sum(0).to(gain.dtype)  # sums of halves accumulate in float32 by themselves
                grad_gains[i] = dots / gain if readable else dots
            # Into memory that has served its purpose and is still in the caches.
            return torch.mul(grad, gain.to(x.dtype), out=product)

        grad_x, grad_as, grad_bs = products_backward(
            map(scaled, range(count)),
            x if trains_a else None,
            hidden if trains_b else None,
            operands,
            ctx.needs_input_grad[0],
        )
        each = [(None, None, a, b, gain) for a, b, gain in zip(grad_as, grad_bs, grad_gains, strict=True)]
        return None if grad_x is None else grad_x.view(x.shape), None, *(grad for five in each for grad in five)


def _linears(scales: Sequence[float], tensors: Sequence[Any]) -> tuple[list[Linear], list[Tensor]]:
    weights, biases, a, b, gains = (tensors[i::5] for i in range(5))
    return [Linear(*linear) for linear in zip(weights, biases, a, b, scales, strict=True)], list(gains)


def _without_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """``g u``, read back from the output."""
    return out if bias is None else out - bias


def _formed_again(x: Tensor, linear: Linear) -> Tensor:
    """``u`` itself."""
    return products_forward(x, [linear._replace(bias=None)])[0][0]


def dora_linears(x: Tensor, linears: Sequence[Linear], gains: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of several DoRA linears on one input: ``gain * (x W^T + scale * (x A^T) B^T) + bias`` each.

    Shapes and dtypes as :func:`rankloom.kernels.lowrank_linears`; ``gain (out,)`` may be wider as well. Differentiable once
    in ``x``, ``a``, ``b``, ``gain``. With ``b = 0`` and ``gain = 1`` an output is bit-identical to the frozen layer's.
    """
    tensors = [t for linear, gain in zip(linears, gains, strict=True) for t in (*linear[:4], gain)]
    outs: tuple[Tensor, ...] = _DoRALinears.apply(x, tuple(linear.scale for linear in linears), *tensors)
    return outs


def dora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor, scale: float
) -> Tensor:
    """:func:`dora_linears` for one."""
    return dora_linears(x, [Linear(weight, bias, a, b, scale)], [gain])[0]
