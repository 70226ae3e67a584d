"""The low-rank linear with its update formed: ``W + s B A`` once for all tokens, where the factors are too wide to meet each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.kernels.materialized import row_blocks

__all__ = ["digits_worth", "formed_linear", "forming_pays"]

IN_HALF = 0.6


def digits_worth(dtype: torch.dtype) -> float:
    """The share of the multiply-adds of applying factors that forming may take to be preferred.

    In half precision ``W + s B A`` is rounded, and what is below half a unit of ``W``'s last place is lost until it has grown:
    there, forming has to save two fifths.
    """
    return 1.0 if dtype.itemsize >= 4 else IN_HALF


def forming_pays(shape: tuple[int, int], rank: int, tokens: int, trained: int, worth: float = 1.0) -> bool:
    """Whether forming an update of rank ``k`` of a weight (out, in) takes fewer multiply-adds than applying its factors.

    Applied: ``k (out + in)`` a token forward, the same for the gradient of the input, and ``k out`` or ``k in`` for that of a
    factor, which is counted as half of both. Formed: ``k out in`` forward and again in the backward pass, and, where factors are
    trained (``trained``: 0, 1 or 2 of them), ``out in`` a token for the weight's gradient and ``k out in`` for each of theirs.
    ``worth``: how small a share of the former the latter has to be.
    """
    out, into = shape
    applied = tokens * rank * (out + into) * (2 + trained / 2)
    return out * into * (tokens * (trained > 0) + rank * (2 + trained)) < worth * applied


class _FormedLinear(torch.autograd.Function):
    """Saved: ``x``, unless neither factor is trained, and the factors as multiplied. The sum is formed again, by blocks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        above, beside = a.to(x.dtype), b.to(x.dtype)
        trained = any(ctx.needs_input_grad[3:5])
        ctx.save_for_backward(x if trained else None, weight, above, beside)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, a.dtype
        # Detached: a 3-D linear's result is a view, which autograd would not let later code change in place.
        return F.linear(x, torch.addmm(weight, beside, above, alpha=scale), bias).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        needs_x, (needs_a, needs_b) = ctx.needs_input_grad[0], ctx.needs_input_grad[3:5]
        grad = grad.reshape(-1, grad.shape[-1])
        flat = None if x is None else x.reshape(-1, x.shape[-1])
        grad_x = grad.new_zeros(len(grad), weight.shape[1]) if needs_x else None
        grad_a = torch.zeros_like(a) if needs_a else None
        grad_b = torch.empty_like(b) if needs_b else None
        for span in row_blocks((weight.shape[0], weight.shape[1])):
            part, beside = grad[:, span], b[span]
            if grad_x is not None:
                grad_x.addmm_(part, torch.addmm(weight[span], beside, a, alpha=ctx.scale))
            if flat is None:
                continue
            whole = part.mT @ flat
            if grad_b is not None:
                grad_b[span] = whole @ a.mT
            if grad_a is not None:
                grad_a.addmm_(beside.mT, whole)
        return (
            None if grad_x is None else grad_x.view(ctx.shape),
            None,
            None,
            None if grad_a is None else grad_a.to(ctx.dtype).mul_(ctx.scale),
            None if grad_b is None else grad_b.to(ctx.dtype).mul_(ctx.scale),
            None,
        )


def formed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``x (W + scale * B A)^T + bias`` for a frozen ``W`` (out, in), ``a`` (k, in), ``b`` (out, k); ``x`` (..., in).

    Dtypes as in :func:`rankloom.kernels.lowrank_linears`: half precision multiplies in half, and ``W + scale * B A`` is
    rounded to it. Differentiable once in ``x`` and the factors. With ``b = 0`` bit-identical to the frozen layer.
    """
    out: Tensor = _FormedLinear.apply(x, weight, bias, a, b, scale)
    return out
