"""The Kronecker linear, ``y = x W^T + b + s x (sum_k U_k (x) V_k)^T`` for a frozen ``W``, without forming the sum.

With a token as a matrix ``X`` (n, q), a term is ``U X V^T``: one product from the left, one from the right. The terms of a
sum stack into the factors of the same two products, and a right factor ``V = P Q`` of low rank may stay apart, so that the
left factor acts between them, where the token is smallest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import mul
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Step", "Terms", "contraction", "contraction_macs", "kronecker_linear", "kronecker_product"]


class Terms(NamedTuple):
    """``sum_k U_k (x) V_k`` of ``left`` (t, m, n) and ``right`` (t, p, q); or, with ``up`` ``P`` (o, p), ``U (x) P V`` of one."""

    left: Tensor
    right: Tensor
    up: Tensor | None = None


class Step(NamedTuple):
    """One product with every token: ``M X`` where ``left``, else ``X M^T``; ``X`` is the token reshaped to fit."""

    left: bool
    matrix: Tensor


def contraction(terms: Terms, tokens: int) -> list[Step]:
    """The products that apply the terms to a number of tokens with the fewest multiplications."""
    left, right, up = terms
    at, whole = _cheapest(tuple(left.shape), tuple(right.shape), None if up is None else len(up), tokens)
    rights = [right] if up is None else [up @ right] if whole else [right, up[None]]
    # The first product splits off the terms' index, and the second sums over it.
    if at == 0:
        first, *rest = [left.transpose(0, 1).flatten(0, 1), rights[0].transpose(0, 1).flatten(1)]
        rest += [other[0] for other in rights[1:]]
    else:
        first, *rest = [rights[0].flatten(0, 1), *(other[0] for other in rights[1:])]
        rest.insert(at - 1, left.permute(1, 2, 0).flatten(1))
    return [Step(index == at, matrix) for index, matrix in enumerate([first, *rest])]


def contraction_macs(steps: Sequence[Step], width: int) -> int:
    """Multiply-adds of the products for a token of the given width."""
    total = 0
    for _, matrix in steps:
        total += len(matrix) * width
        width = len(matrix) * width // matrix.shape[1]
    return total


@lru_cache(maxsize=4096)
def _cheapest(left: tuple[int, int, int], right: tuple[int, int, int], up: int | None, tokens: int) -> tuple[int, bool]:
    """Where the left product comes among the right ones, and whether ``P V`` is multiplied out before."""
    (t, m, n), (_, p, q) = left, right
    widths = {False: [q, p]} if up is None else {False: [q, p, up], True: [q, up]}

    def cost(order: tuple[int, bool]) -> float:
        at, whole = order
        growth = [fan_out / fan_in for fan_in, fan_out in pairwise(widths[whole])]
        heights = widths[whole][1:]
        growth.insert(at, m / n)
        heights.insert(at, m)
        growth[0], heights[0], growth[1] = t * growth[0], t * heights[0], growth[1] / t
        sizes = accumulate([n * q, *growth], mul)  # of a token before each product
        once = up * p * q / tokens if whole and up is not None else 0.0
        return sum(size * height for size, height in zip(sizes, heights, strict=False)) + once

    return min(((at, whole) for whole, w in widths.items() for at in range(len(w))), key=cost)


def kronecker_product(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """``x (sum_k U_k (x) V_k)^T`` for ``x`` (..., in), by plain differentiable products."""
    h = x.reshape(-1, x.shape[-1]).contiguous()
    for step in steps:
        h = _applied(h, *step)
    return h.view(*x.shape[:-1], -1)


def kronecker_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, steps: Sequence[Step], scale: float = 1.0
) -> Tensor:
    """``x W^T + bias + scale * x (sum_k U_k (x) V_k)^T`` for steps from :func:`contraction`; ``x`` (..., in).

    ``x``, weight and bias have one dtype; the factors may be wider and get their gradients in their own. Differentiable once
    in ``x`` and the factors. With a factor of zeros the output is bit-identical to the frozen layer's.
    """
    sides = tuple(step.left for step in steps)
    out: Tensor = _KroneckerLinear.apply(x, weight, bias, scale, sides, *(step.matrix for step in steps))
    return out


class _KroneckerLinear(torch.autograd.Function):
    """The last product accumulates into the frozen layer's own result, and the first one's gradient into the input's.

    Saved: ``x``, unless the factor that meets it is frozen, and what lies between the products where it is at most half as
    wide as ``x``; wider states are formed again, which costs less than keeping them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        sides: tuple[bool, ...],
        *matrices: Tensor,
    ) -> Tensor:
        # The very call the frozen layer makes, so a zero update leaves every bit alone.
        out = F.linear(x, weight, bias)
        cast = [matrix.to(x.dtype) for matrix in matrices]
        cast[-1] = scale * cast[-1]
        states = [x.reshape(-1, x.shape[-1]).contiguous()]
        for left, matrix in zip(sides[:-1], cast, strict=False):
            states.append(_applied(states[-1], left, matrix))
        _accumulate(out.view(-1, out.shape[-1]), states[-1], sides[-1], cast[-1])
        trained = ctx.needs_input_grad[5:]
        kept = [
            state if wanted and (index == 0 or not trained[0] or 2 * state.shape[1] <= x.shape[-1]) else None
            for index, (state, wanted) in enumerate(zip(states, trained, strict=True))
        ]
        ctx.save_for_backward(weight, *kept, *cast)
        ctx.sides, ctx.scale, ctx.shape, ctx.dtypes = sides, scale, x.shape, [m.dtype for m in matrices]
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.sides)
        weight, *both = ctx.saved_tensors  # once: a checkpoint forms them again for each access
        states, cast = both[:count], both[count:]
        needs_x, trained = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        missing = [index for index in range(count) if trained[index] and states[index] is None]
        for index in range(1, max(missing, default=0) + 1):  # only where x is there to start from
            if states[index] is None:
                states[index] = _applied(states[index - 1], ctx.sides[index - 1], cast[index - 1])
        flat = grad.reshape(-1, grad.shape[-1]).contiguous()
        grads: list[Tensor | None] = [None] * count
        down = flat
        for index in reversed(range(count)):
            if (state := states[index]) is not None and trained[index]:
                found = _outer(down, state, ctx.sides[index], cast[index])
                grads[index] = (ctx.scale * found if index == count - 1 else found).to(ctx.dtypes[index])
            if index and (needs_x or any(trained[:index])):
                down = _applied(down, ctx.sides[index], cast[index].mT)
        grad_x = None
        if needs_x:
            grad_x = flat @ weight
            _accumulate(grad_x, down, ctx.sides[0], cast[0].mT)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, None, None, *grads


def _applied(h: Tensor, left: bool, matrix: Tensor) -> Tensor:
    """One product with every token of ``h`` (tokens, width)."""
    if left:
        inner = h.view(len(h), matrix.shape[1], -1)
        return torch.bmm(matrix.expand(len(h), *matrix.shape), inner).flatten(1)
    return (h.reshape(-1, matrix.shape[1]) @ matrix.mT).view(len(h), -1)


def _accumulate(out: Tensor, h: Tensor, left: bool, matrix: Tensor) -> None:
    """As :func:`_applied`, added to ``out`` (tokens, width) in place."""
    if left:
        inner = h.view(len(h), matrix.shape[1], -1)
        out.view(len(h), len(matrix), -1).baddbmm_(matrix.expand(len(h), *matrix.shape), inner)
    else:
        out.view(-1, len(matrix)).addmm_(h.view(-1, matrix.shape[1]), matrix.mT)


def _outer(grad: Tensor, state: Tensor, left: bool, matrix: Tensor) -> Tensor:
    """The gradient of a step's matrix from those of its result, summed over tokens."""
    rows, columns = matrix.shape
    if not left:
        return grad.view(-1, rows).mT @ state.view(-1, columns)
    g, h = grad.view(len(grad), rows, -1), state.view(len(state), columns, -1)
    if rows * columns <= 2 * state.shape[1]:  # a matrix a token is no larger than the token
        return torch.bmm(g, h.mT).sum(0)
    return torch.tensordot(g, h, ([0, 2], [0, 2]))
