"""Linears whose update has to be formed: ``y = x (W + delta)^T + b`` for a ``delta`` (out, in) given by blocks of its rows.

For forms that are no product of two thin factors. Left to autograd, ``W + delta`` and whatever ``delta`` was made of, each
(out, in), would be kept for the backward pass of every layer at once. Here nothing of that size is: the sum is formed without
a graph, multiplied, and let go; the backward pass forms it again, one block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Update", "materialize", "materialized_linear", "row_blocks"]

BLOCK = 1 << 21  # entries of a block: large enough for the products to run at full speed, far below a large weight


class Update(NamedTuple):
    """An update of a frozen weight, by blocks of rows.

    ``rows(weight, span, *parameters)`` is ``delta[span]`` (n, in), differentiable torch code; ``weight`` is ``W[span]``, or None
    where there is no ``weight`` to read. ``weight()`` is the frozen ``W`` (out, in), read anew in every pass, so that a quantised
    one is dense only for the moment. ``added``: what is formed is ``W + delta``, not ``delta`` alone. Spans begin at multiples
    of ``multiple``.

    ``parameters`` are all tensors that ``rows`` depends on and that may have changed by the time of the backward pass:
    trained ones, what was computed from them with a graph, and what was decided without one.
    """

    shape: tuple[int, int]
    rows: Callable[..., Tensor]
    weight: Callable[[], Tensor] | None = None
    added: bool = True
    multiple: int = 1

    def spans(self) -> Iterator[slice]:
        """The blocks of rows."""
        return row_blocks(self.shape, self.multiple)


def row_blocks(shape: tuple[int, int], multiple: int = 1) -> Iterator[slice]:
    """Consecutive blocks of rows of a matrix, each of at most ``BLOCK`` entries, or of ``multiple`` rows."""
    out, width = shape
    height = max(BLOCK // max(width, 1) // multiple, 1) * multiple
    return (slice(start, min(start + height, out)) for start in range(0, out, height))


def _formed(update: Update, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``W + delta``, or ``delta``, in the storage order of ``W``: an update of zero leaves every bit of its products alone."""
    weight = None if update.weight is None else update.weight()
    if weight is None or not update.added:
        formed = torch.empty(update.shape, dtype=dtype, device=parameters[0].device)
    else:
        formed = torch.empty_like(weight, dtype=dtype)
    for span in update.spans():
        above = None if weight is None else weight[span]
        rows = update.rows(above, span, *parameters)
        if update.added and above is not None:
            torch.add(rows, above, out=formed[span])
        else:
            formed[span] = rows
    return formed


class _Pull:
    """A backward pass over the blocks: forms each again with a graph, and adds up its gradients in the parameters."""

    def __init__(self, update: Update, parameters: Sequence[Tensor], needed: Sequence[bool]) -> None:
        self.update, self.weight = update, None if update.weight is None else update.weight()
        self.leaves = [p.detach().requires_grad_(n) for p, n in zip(parameters, needed, strict=True)]
        self.wanted = [leaf for leaf in self.leaves if leaf.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(self.wanted)

    def form(self, span: slice, dtype: torch.dtype) -> Tensor:
        """The block of ``W + delta`` (or ``delta``), detached."""
        above = None if self.weight is None else self.weight[span]
        with torch.enable_grad():
            self.rows = self.update.rows(above, span, *self.leaves)
        rows = self.rows.detach()
        return (rows + above if self.update.added and above is not None else rows).to(dtype)

    def add(self, grad: Tensor) -> None:
        """Take the gradient in the block that was formed last."""
        if not self.rows.requires_grad:
            return
        found = torch.autograd.grad(self.rows, self.wanted, grad.to(self.rows.dtype), allow_unused=True)
        for i, (total, more) in enumerate(zip(self.sums, found, strict=True)):
            if more is not None:
                self.sums[i] = more if total is None else total + more

    def grads(self) -> tuple[Tensor | None, ...]:
        """The gradients, None where none is needed or nothing depends on a parameter."""
        sums = iter(self.sums)
        return tuple(next(sums) if leaf.requires_grad else None for leaf in self.leaves)


class _MaterializedLinear(torch.autograd.Function):
    """Saved: ``x``, unless no parameter is trained, and the parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Update, product: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
        ctx.update, ctx.shape = update, x.shape
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *parameters)
        # Detached: a 3-D linear's result is a view, which autograd would not let later code change in place.
        return product(x, _formed(update, parameters, x.dtype)).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        pull = _Pull(ctx.update, parameters, ctx.needs_input_grad[3:])
        flat = None if x is None else x.reshape(-1, x.shape[-1])
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        for span in ctx.update.spans():
            formed, part = pull.form(span, grad.dtype), grad[:, span]
            if ctx.needs_input_grad[0]:
                grad_x = part @ formed if grad_x is None else grad_x.addmm_(part, formed)
            if flat is not None:
                pull.add(part.mT @ flat)
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, *pull.grads()


def materialized_linear(
    x: Tensor, update: Update, parameters: Sequence[Tensor], product: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """``product(x, W + delta)``, where ``product(x, V)`` is ``x V^T``, plus a frozen bias if there is one.

    The update's block is formed in the dtype its ``rows`` give, the sum is rounded to ``x``'s. Parameters may be wider than
    ``x`` and get their gradients in their own dtype. Differentiable once in ``x`` and the parameters; ``W`` gets no gradient.
    At the peak of the backward pass one block of ``W + delta``, its graph and its gradient are held.
    """
    out: Tensor = _MaterializedLinear.apply(x, update, product, *parameters)
    return out


class _Materialize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, update: Update, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
        ctx.update = update
        ctx.save_for_backward(*parameters)
        return _formed(update, parameters, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pull = _Pull(ctx.update, ctx.saved_tensors, ctx.needs_input_grad[2:])
        for span in ctx.update.spans():
            pull.form(span, grad.dtype)
            pull.add(grad[span])
        return None, None, *pull.grads()


def materialize(update: Update, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``W + delta`` (or ``delta``) itself in ``dtype``, differentiable once in the parameters: for layers that are no linear.

    What it was made of is not kept; what a layer keeps of it is the layer's affair.
    """
    formed: Tensor = _Materialize.apply(update, dtype, *parameters)
    return formed
