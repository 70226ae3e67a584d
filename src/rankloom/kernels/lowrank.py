"""The low-rank linear, ``y = x W^T + b + s (x A^T) B^T`` for a frozen ``W`` and trainable ``A`` (r, in), ``B`` (out, r).

Several of them that read one input (q, k, v; gate, up) run as one function: their thin products with ``x`` are stacked, and
their input gradients accumulate into one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.kernels.formed import digits_worth, formed_linear, forming_pays

__all__ = ["Linear", "Operands", "lowrank_linear", "lowrank_linears", "products_backward", "products_forward"]


class Linear(NamedTuple):
    """One low-rank linear: ``weight`` (out, in) and ``bias`` (out,) frozen, ``a`` (r, in), ``b`` (out, r), ``scale``."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float


class Operands(NamedTuple):
    """What the products take, in the input's dtype: ``rows`` are all ``a`` on top of each other, ``columns`` are the ``b``."""

    weights: Sequence[Tensor]
    rows: Tensor
    columns: Sequence[Tensor]
    scales: Sequence[float]
    ranks: Sequence[int]
    dtype: torch.dtype
    """Of the factors themselves, and of their gradients."""


def products_forward(
    x: Tensor, linears: Sequence[Linear], finish: Callable[[int, Tensor], object] | None = None
) -> tuple[list[Tensor], Tensor, Operands]:
    """Every linear's output, the low-rank term accumulated into the frozen layer's own result; ``A x^T`` of all; operands.

    Rank-space tensors are kept as (r, tokens): the thin products then run along the contiguous side of every operand. The
    scale is a factor of the products themselves, which takes no pass over anything. Each output is completed, with
    ``finish(index, output)`` last, before the next begins: it is still in the caches then.
    """
    weights, _, above, beside, scales = zip(*linears, strict=True)
    rows = above[0].to(x.dtype) if len(above) == 1 else torch.cat(above, out=x.new_empty(0))
    columns = [b.to(x.dtype) for b in beside]
    ranks = [len(a) for a in above]
    hidden = rows @ x.reshape(-1, x.shape[-1]).mT
    outs = []
    for i, (linear, column, part) in enumerate(zip(linears, columns, hidden.split(ranks), strict=True)):
        # The very call the frozen layer makes, so a zero update leaves every bit alone.
        out = F.linear(x, linear.weight, linear.bias)
        out.view(-1, out.shape[-1]).addmm_(part.mT, column.mT, alpha=linear.scale)
        if finish is not None:
            finish(i, out)
        outs.append(out)
    return outs, hidden, Operands(weights, rows, columns, scales, ranks, above[0].dtype)


def products_backward(
    grads: Iterable[Tensor], x: Tensor | None, hidden: Tensor | None, operands: Operands, needs_x: bool
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Gradients of :func:`products_forward` in the input (tokens, in) where needed, in every ``a`` and in every ``b``.

    ``grads`` are taken one by one, each (tokens, out), and done with before the next. Without ``x`` the ``a`` are frozen and
    get none, without ``hidden`` the ``b``.
    """
    weights, rows, columns, scales, ranks, dtype = operands
    beside = [None] * len(ranks) if hidden is None else hidden.split(ranks)
    down = []  # the gradient in rank space
    grad_as: Sequence[Tensor | None] = [None] * len(ranks)
    grad_bs: list[Tensor | None] = []
    grad_x = None
    for grad, weight, column, scale, part in zip(grads, weights, columns, scales, beside, strict=True):
        down.append(_product(column.mT, grad.mT, scale))
        # Laid out as b is: what accumulates gradients then takes them as they are, instead of copying.
        layout = torch.contiguous_format
        grad_bs.append(None if part is None else _product(part, grad, scale).mT.to(dtype, memory_format=layout))
        if needs_x:
            grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
    below = down[0] if len(down) == 1 else torch.cat(down)
    if grad_x is not None:
        grad_x.addmm_(below.mT, rows)
    if x is not None:
        grad_as = (below @ x.reshape(-1, x.shape[-1])).to(dtype).split(ranks)
    return grad_x, grad_as, grad_bs


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return left.new_empty(len(left), right.shape[1]).addmm_(left, right, beta=0, alpha=scale)


class _LowRankLinears(torch.autograd.Function):
    """Forward and backward with every full-width update in place.

    The scale acts on the low-rank products, and those accumulate into results the frozen layers make anyway, so no
    (tokens, out) or (tokens, in) temporary is added. Saved: ``x``, which ``dA`` cannot do without, unless ``A`` is frozen;
    ``A x^T``, which is r/in of ``x``'s size and would take another reading of all of ``x`` to form again, unless ``B`` is
    frozen; and the factors as multiplied. Wider factors are brought to ``x``'s dtype here: one node in the graph, whatever
    the number of casts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        outs, hidden, operands = products_forward(x, _linears(scales, tensors))
        weights, rows, columns, *ctx.rest = operands
        trains_a, trains_b = any(ctx.needs_input_grad[4::4]), any(ctx.needs_input_grad[5::4])
        ctx.save_for_backward(x if trains_a else None, hidden if trains_b else None, rows, *columns, *weights)
        ctx.shape = x.shape
        # Detached: a 3-D linear's result is a view, which autograd would not let later code change in place.
        return tuple([out.detach() for out in outs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, rows, *both = ctx.saved_tensors
        operands = Operands(both[len(grads) :], rows, both[: len(grads)], *ctx.rest)
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
    factors. With ``b = 0`` an output is bit-identical to the frozen layer's. Where forming ``W + scale * b a`` takes fewer
    multiply-adds for this many tokens than applying the factors (in half precision: three fifths of them), that is what is done.
    """
    tokens = x.numel() // max(x.shape[-1], 1)
    if any(_forms(linear, tokens) for linear in linears):
        return tuple([(formed_linear if _forms(linear, tokens) else lowrank_linear)(x, *linear) for linear in linears])
    tensors = [t for linear in linears for t in linear[:4]]
    outs: tuple[Tensor, ...] = _LowRankLinears.apply(x, tuple(linear.scale for linear in linears), *tensors)
    return outs


def _forms(linear: Linear, tokens: int) -> bool:
    # Without gradients it is what training does: there, W + delta is rounded or it is not.
    trained = max(linear.a.requires_grad + linear.b.requires_grad, 1)
    worth = digits_worth(linear.weight.dtype)
    return forming_pays((len(linear.b), linear.a.shape[1]), len(linear.a), tokens, trained, worth)


def lowrank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """:func:`lowrank_linears` for one."""
    return lowrank_linears(x, [Linear(weight, bias, a, b, scale)])[0]
