"""A stack of weights plus low-rank updates, ``W_e + L_e R_e``, that is not kept for the backward pass but formed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["UpdatedStack", "formed_again", "updated_stack"]


class UpdatedStack(NamedTuple):
    """``made`` (n, a, b), and what it is made of: ``weight`` (n, a, b) frozen, at ``experts`` plus ``left @ right``."""

    made: Tensor
    weight: Tensor
    left: Tensor
    right: Tensor
    experts: Sequence[int]

    def between(self, first: int, last: int) -> Tensor:
        """The matrices ``first`` to ``last`` (not included), formed again."""
        inside = [at for at, e in enumerate(self.experts) if first <= e < last]
        if not inside:
            return self.weight[first:last].clone()
        at = slice(inside[0], inside[-1] + 1)
        return _sum(self.weight[first:last], self.left[at], self.right[at], [self.experts[i] - first for i in inside])


def _sum(weight: Tensor, left: Tensor, right: Tensor, experts: Sequence[int]) -> Tensor:
    if len(experts) == len(weight):
        return torch.baddbmm(weight, left, right)
    out = weight.clone()
    out[list(experts)] = torch.baddbmm(weight[list(experts)], left, right)
    return out


class _Updated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, left: Tensor, right: Tensor, experts: Sequence[int]) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.experts = list(experts)
        return _sum(weight, left, right, experts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        if len(ctx.experts) < len(grad):
            grad = grad[ctx.experts]
        return None, grad @ right.mT, left.mT @ grad, None


def updated_stack(weight: Tensor, left: Tensor, right: Tensor, experts: Sequence[int]) -> UpdatedStack:
    """``weight`` (n, a, b) with ``left @ right``, (m, a, k) and (m, k, b) of its dtype, added to the m matrices ``experts``,
    ascending. Differentiable once in the factors; with ``left @ right = 0`` it is the weight bit for bit.

    Cost: one (n, a, b) tensor in the forward pass and its gradient in the backward pass, both of them transient.
    """
    made: Tensor = _Updated.apply(weight, left, right, experts)
    return UpdatedStack(made, weight, left.detach(), right.detach(), list(experts))


class _Piece(NamedTuple):
    stack: UpdatedStack
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def formed(self) -> Tensor:
        each = self.stack.weight[0].numel()
        reach = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        first, last = self.offset // each, (self.offset + reach) // each + 1
        return self.stack.between(first, last).as_strided(self.size, self.stride, self.offset - first * each)


@contextmanager
def formed_again(stacks: Sequence[UpdatedStack]) -> Iterator[None]:
    """Operations inside the block that would keep ``made``, or a view of it, for their backward keep its factors instead.

    Under activation checkpointing nothing is kept in the first place, and checkpointing is left to do so.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        yield
        return
    # The stacks live as long as the block, so an address is one tensor's; what is kept must not hold `made` itself.
    owners = {s.made.untyped_storage().data_ptr(): s._replace(made=s.weight) for s in stacks if s.made.requires_grad}

    def pack(tensor: Tensor) -> Any:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            return tensor
        owner = owners.get(tensor.untyped_storage().data_ptr())
        return (
            tensor
            if owner is None
            else _Piece(owner, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        )

    def unpack(kept: Any) -> Tensor:
        return kept.formed() if isinstance(kept, _Piece) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
