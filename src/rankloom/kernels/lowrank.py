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

__all__ = ["Linear", "Operands", "lowrank_linear", "lowrank_linears", "products_backward", "products_forward"]


class Linear(NamedTuple):
    """One low-rank linear: ``weight`` (out, in) and ``bias`` (out,) frozen, ``a`` (r, in), ``b`` (out, r), ``scale``."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float


class Operands(NamedTuple):
    """What the products take, in the input's dtype: ``rows`` are all ``a`` on top of each other, ``columns`` every ``s b``."""

    weights: tuple[Tensor, ...]
    rows: Tensor
    columns: tuple[Tensor, ...]
    scales: tuple[float, ...]
    dtype: torch.dtype
    """Of the factors themselves, and of their gradients."""

    @property
    def ranks(self) -> list[int]:
        """The rank of each linear."""
        return [column.shape[1] for column in self.columns]


def products_forward(x: Tensor, linears: Sequence[Linear]) -> tuple[list[Tensor], Tensor, Operands]:
    """Every linear's output, the low-rank term accumulated into the frozen layer's own result; ``A x^T`` of all; operands.

    Rank-space tensors are kept as (r, tokens): the thin products then run along the contiguous side of every operand.
    """
    weights, biases, above, beside, scales = zip(*linears, strict=True)
    # The very call the frozen layer makes comes first, so a zero update leaves every bit alone.
    outs = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    rows = above[0] if len(above) == 1 else torch.cat(above)
    columns = tuple((b * scale).to(x.dtype) for b, scale in zip(beside, scales, strict=True))
    operands = Operands(weights, rows.to(x.dtype), columns, scales, rows.dtype)
    hidden = torch.mm(operands.rows, x.reshape(-1, x.shape[-1]).mT)
    for out, column, part in zip(outs, columns, hidden.split(operands.ranks), strict=True):
        out.view(-1, out.shape[-1]).addmm_(part.mT, column.mT)
    return outs, hidden, operands


def products_backward(
    grads: Sequence[Tensor], x: Tensor | None, hidden: Tensor | None, operands: Operands, needs_x: bool
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Gradients of :func:`products_forward` in the input (tokens, in) where needed, in every ``a`` and in every ``b``.

    Without ``x`` the ``a`` are frozen and get none, without ``hidden`` the ``b``.
    """
    ranks = operands.ranks
    grad_as: Sequence[Tensor | None] = [None] * len(grads)
    grad_bs, grad_x = grad_as, None
    down = grads[0].new_empty(len(operands.rows), len(grads[0]))  # the gradient in rank space
    for grad, column, part in zip(grads, operands.columns, down.split(ranks), strict=True):
        torch.mm(column.mT, grad.mT, out=part)
    if needs_x:
        grad_x = torch.mm(grads[0], operands.weights[0])
        for grad, weight in zip(grads[1:], operands.weights[1:], strict=True):
            grad_x.addmm_(grad, weight)
        grad_x.addmm_(down.mT, operands.rows)
    if x is not None:
        grad_as = torch.mm(down, x.reshape(-1, x.shape[-1])).to(operands.dtype).split(ranks)
    if hidden is not None:
        grad_bs = [
            torch.mm(part, grad).to(operands.dtype).mul_(scale).mT
            for part, grad, scale in zip(hidden.split(ranks), grads, operands.scales, strict=True)
        ]
    return grad_x, grad_as, grad_bs


class _LowRankLinears(torch.autograd.Function):
    """Forward and backward with every full-width update in place.

    The scale acts on the factors and the low-rank products accumulate into results the frozen layers make anyway, so no
    (tokens, out) or (tokens, in) temporary is added. Saved: ``x``, which ``dA`` cannot do without, unless ``A`` is frozen;
    ``A x^T``, which is r/in of ``x``'s size and would take another reading of all of ``x`` to form again, unless ``B`` is
    frozen; and the factors as multiplied. Wider factors are brought to ``x``'s dtype here: one node in the graph, whatever
    the number of casts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        outs, hidden, operands = products_forward(x, _linears(scales, tensors))
        trains_a, trains_b = any(ctx.needs_input_grad[4::4]), any(ctx.needs_input_grad[5::4])
        ctx.save_for_backward(
            x if trains_a else None, hidden if trains_b else None, operands.rows, *operands.columns, *operands.weights
        )
        ctx.shape, ctx.scales, ctx.dtype = x.shape, scales, operands.dtype
        # Detached: a 3-D linear's result is a view, which autograd would not let later code change in place.
        return tuple(out.detach() for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, rows, *rest = ctx.saved_tensors
        operands = Operands(rest[len(grads) :], rows, rest[: len(grads)], ctx.scales, ctx.dtype)
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_x, grad_as, grad_bs = products_backward(flat, x, hidden, operands, ctx.needs_input_grad[0])
        each = [(None, None, a, b) for a, b in zip(grad_as, grad_bs, strict=True)]
        return None if grad_x is None else grad_x.view(ctx.shape), None, *(grad for four in each for grad in four)


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
