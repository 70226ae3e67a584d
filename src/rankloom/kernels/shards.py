"""The shared-shard linear, ``y = x W^T + b + S D`` with ``S`` (tokens, r) the sum of ``x``'s consecutive slices of width ``r``.

It is a low-rank linear whose ``A`` is the identity repeated along the input, and no such matrix is formed or multiplied with.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["add_repeated", "shard_linear", "shard_sum"]


def shard_sum(x: Tensor, rank: int) -> Tensor:
    """The sum (..., r) of the slices of width ``r`` of ``x`` (..., in); a last, shorter one counts as padded with zeros.

    Sums of halves accumulate in float32 by themselves. Nothing of ``x``'s width is kept for the backward pass.
    """
    width = x.shape[-1]
    even = width - width % rank
    total = x[..., :even].unflatten(-1, (-1, rank)).sum(-2)
    return total if even == width else total + F.pad(x[..., even:], (0, rank - width + even))


def add_repeated(y: Tensor, short: Tensor) -> Tensor:
    """``y`` (..., out) plus ``short`` (..., m) repeated along the output, in place."""
    if short.shape[-1] == y.shape[-1]:
        return y.add_(short)
    y.unflatten(-1, (-1, short.shape[-1])).add_(short.unsqueeze(-2))
    return y


class _ShardLinear(torch.autograd.Function):
    """Forward and backward with every full-width update in place; saved are ``S`` and ``D``, not ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shard: Tensor) -> Tensor:
        rank, own = shard.shape
        narrow = shard.to(x.dtype)
        total = shard_sum(x, rank).reshape(-1, rank)
        # The very call the frozen layer makes, so a zero update leaves every bit alone.
        out = F.linear(x, weight, bias)
        flat = out.view(-1, out.shape[-1])
        if own == flat.shape[1]:
            flat.addmm_(total, narrow)
        else:
            add_repeated(flat, total @ narrow)
        ctx.save_for_backward(total if ctx.needs_input_grad[3] else None, narrow, weight)
        ctx.shape, ctx.dtype = x.shape, shard.dtype
        # Detached: a 3-D linear's result is a view, which autograd would not let later code change in place.
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, shard, weight = ctx.saved_tensors
        rank, own = shard.shape
        grad = grad.reshape(-1, grad.shape[-1])
        short = grad if own == grad.shape[1] else grad.unflatten(-1, (-1, own)).sum(-2)
        grad_x = grad_shard = None
        if total is not None:
            grad_shard = (total.mT @ short).to(ctx.dtype)
        if ctx.needs_input_grad[0]:
            grad_x, down = grad @ weight, short @ shard.mT
            even = grad_x.shape[1] - grad_x.shape[1] % rank
            add_repeated(grad_x[:, :even], down)
            grad_x[:, even:].add_(down[:, : grad_x.shape[1] - even])
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_shard


def shard_linear(x: Tensor, weight: Tensor, bias: Tensor | None, shard: Tensor) -> Tensor:
    """``x W^T + bias`` plus, repeated along the output, ``S D`` for ``shard`` ``D`` (r, m) with ``m`` dividing ``out``.

    Half precision multiplies in half and accumulates in float32; ``D`` may be wider and gets its gradient in its own dtype.
    Differentiable once in ``x`` and ``D``. With ``D = 0`` the output is bit-identical to the frozen layer's.
    """
    return cast(Tensor, _ShardLinear.apply(x, weight, bias, shard))
