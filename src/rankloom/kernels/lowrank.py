"""The low-rank linear, ``y = x W^T + b + s (x A^T) B^T`` for a frozen ``W`` and trainable ``A`` (r, in), ``B`` (out, r).

Several of them that read one input (q, k, v; gate, up) run as one function: their thin products with ``x`` are stacked, and
their input gradients accumulate into one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Linear", "lowrank_linear", "lowrank_linears", "products_backward", "products_forward"]


class Linear(NamedTuple):
    """One low-rank linear: ``weight`` (out, in) and ``bias`` (out,) frozen, ``a`` (r, in), ``b`` (out, r), ``scale``."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float


def _stacked(linears: Sequence[Linear], dtype: torch.dtype) -> Tensor:
    """All ``a`` on top of each other (sum of ranks, in), in the dtype the products run in."""
    rows = [linear.a.to(dtype) for linear in linears]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def products_forward(x: Tensor, linears: Sequence[Linear]) -> tuple[list[Tensor], Tensor]:
    """Every linear's output, the low-rank term accumulated into the frozen layer's own result, and ``A x^T`` of all.

    Rank-space tensors are kept as (r, tokens): the thin products then run along the contiguous side of every operand.
    """
    # The very call the frozen layer makes comes first, so a zero update leaves every bit alone.
    outs = [F.linear(x, linear.weight, linear.bias) for linear in linears]
    hidden = torch.mm(_stacked(linears, x.dtype), x.reshape(-1, x.shape[-1]).mT)
    for out, linear, part in zip(outs, linears, hidden.split([len(linear.a) for linear in linears]), strict=True):
        out.view(-1, out.shape[-1]).mT.addmm_(linear.b.to(x.dtype), part, alpha=linear.scale)
    return outs, hidden


def products_backward(
    grads: Sequence[Tensor], x: Tensor, hidden: Tensor, linears: Sequence[Linear], needs_x: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of :func:`products_forward` in ``x`` (where needed), every ``a`` and every ``b``."""
    flat, ranks = x.reshape(-1, x.shape[-1]), [len(linear.a) for linear in linears]
    stack = _stacked(linears, x.dtype)
    down = torch.empty(len(stack), len(flat), dtype=x.dtype, device=x.device)  # the gradient in rank space
    grad_x = None
    for grad, linear, part in zip(grads, linears, down.split(ranks), strict=True):
        torch.mm(linear.b.to(x.dtype).mT, grad.mT, out=part).mul_(linear.scale)
        if needs_x:
            grad_x = torch.mm(grad, linear.weight) if grad_x is None else grad_x.addmm_(grad, linear.weight)
    if grad_x is not None:
        grad_x.mT.addmm_(stack.mT, down)
        grad_x = grad_x.view(x.shape)
    grad_as = torch.mm(down, flat).split(ranks)
    grad_bs = [
        torch.mm(part, grad).mul_(linear.scale).mT
        for part, grad, linear in zip(hidden.split(ranks), grads, linears, strict=True)
    ]
    wide = [linear.a.dtype for linear in linears]
    return (
        grad_x,
        [g.to(d) for g, d in zip(grad_as, wide, strict=True)],
        [g.to(d) for g, d in zip(grad_bs, wide, strict=True)],
    )


class _LowRankLinears(torch.autograd.Function):
    """Forward and backward with every full-width update in place.

    The scale acts in rank space and the low-rank products accumulate into results the frozen layers make anyway, so no
    (tokens, out) or (tokens, in) temporary is added. Saved: ``x``, which ``dA`` cannot do without, references to the
    parameters, and ``A x^T``, which is r/in of ``x``'s size and would take another reading of all of ``x`` to form again.
    Wider factors are brought to ``x``'s dtype here: one node in the graph, whatever the number of casts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        outs, hidden = products_forward(x, _linears(scales, tensors))
        ctx.save_for_backward(x, hidden, *tensors)
        ctx.scales = scales
        # Detached: a 3-D linear's result is a view, which autograd would not let later code change in place.
        return tuple(out.detach() for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, *tensors = ctx.saved_tensors
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        linears = _linears(ctx.scales, tensors)
        grad_x, grad_as, grad_bs = products_backward(flat, x, hidden, linears, ctx.needs_input_grad[0])
        each = [(None, None, a, b) for a, b in zip(grad_as, grad_bs, strict=True)]
        return grad_x, None, *(grad for four in each for grad in four)


def _linears(scales: Sequence[float], tensors: Sequence[Any]) -> list[Linear]:
    weights, biases, a, b = (tensors[i::4] for i in range(4))
    return [Linear(*linear) for linear in zip(weights, biases, a, b, scales, strict=True)]


def lowrank_linears(x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
    """The outputs of several low-rank linears on one input: ``x W^T + bias + scale * (x A^T) B^T`` each.

    ``x (..., in)``, weights and biases have one dtype; the factors may be wider and get their gradients in their own. Half
    precision multiplies in half and accumulates in float32, with no cast of ``x``. Differentiable once in ``x`` and the
    factors. With ``b = 0`` an output is bit-identical to the frozen layer's.
    """
    tensors = [t for linear in linears for t in linear[:4]]
    outs: tuple[Tensor, ...] = _LowRankLinears.apply(x, tuple(linear.scale for linear in linears), *tensors)
    return outs


def lowrank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """:func:`lowrank_linears` for one."""
    return lowrank_linears(x, [Linear(weight, bias, a, b, scale)])[0]
