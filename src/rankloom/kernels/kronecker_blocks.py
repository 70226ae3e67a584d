"""A sum of Kronecker products that meets many rows: ``Y = X (sum_k U_k (x) V_k + I (x) E)^T``, in blocks that stay in the caches.

A block lies with its rows innermost, as (n, q, rows). So both sides are wide products, and no index is ever moved between them:

    H = [U_1 .. U_t] X  (m, t q, rows),    Y = [V_1 .. V_t] H + E X  (m, p, rows).

Where the terms take longer than one product with their sum, the sum is formed for the moment, and formed again for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.linalg import kronecker_sum

__all__ = ["kronecker_rows", "kronecker_rows_macs"]

THIN = 1.8  # a multiplication in a thin product takes the time of about so many in a large one
THIN_IN_HALF = 2.6
BLOCK = 1 << 17  # numbers of a block of rows
LANES = 64  # rows come in multiples of it: products over other widths are slower


def kronecker_rows(x: Tensor, left: Tensor, right: Tensor, alone: Tensor, *, keep: bool = False) -> Tensor:
    """``x (sum_k U_k (x) V_k + I (x) E)^T`` for rows ``x`` (rows, N), ``left`` (t, m, m), ``right`` (t, p, p), ``alone`` (p, p).

    Where ``m p > N`` the sum is cut to (N, N). The factors may be wider than ``x``, in whose dtype all is multiplied, and get
    their gradients in their own. Differentiable once in everything; of what it takes only ``x`` is kept for the backward pass.
    ``keep``: ``H`` too, which is t times as large, for a graph that is gone in a moment.
    """
    out: Tensor = _KroneckerRows.apply(x, keep and torch.is_grad_enabled(), left, right, alone)
    return out


def kronecker_rows_macs(rows: int, terms: int, m: int, p: int, dtype: torch.dtype) -> int:
    """Multiply-adds, those of thin products counted as what a large one does in their time."""
    return min(_ways(rows, terms, m, p, dtype))


def _ways(rows: int, terms: int, m: int, p: int, dtype: torch.dtype) -> tuple[int, int]:
    """Term by term, and with the sum."""
    thin = THIN_IN_HALF if dtype.itemsize < 4 else THIN
    return int(thin * rows * m * p * (terms * (m + p) + p)), (rows + terms + 1) * (m * p) ** 2


class _KroneckerRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: bool, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *factors)
        if _summed(x, *factors):
            return x @ _sum(x, *factors).mT
        sides = _Sides(x.dtype, *factors)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        kept = []
        for span in _spans(x):
            across = sides.across(x[span])
            between = sides.between(across)
            out[span] = sides.product(across, between).flatten(0, 1)[: x.shape[1]].mT
            kept += [between] * keep
        ctx.save_for_backward(x, *factors, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right, alone, *kept = ctx.saved_tensors
        factors = left, right, alone
        needs_x = ctx.needs_input_grad[0]
        if _summed(x, *factors):
            leaves = [factor.detach().requires_grad_() for factor in factors]
            with torch.enable_grad():
                whole = _sum(x, *leaves)
            grads = torch.autograd.grad(whole, leaves, grad.mT @ x)
            return grad @ whole.detach() if needs_x else None, None, *grads
        sides = _Sides(x.dtype, *factors)
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        for index, span in enumerate(_spans(x)):
            across = sides.across(x[span])
            between = kept[index] if kept else sides.between(across)
            down = sides.pull(across, between, sides.across(grad[span]), needs_x)
            if grad_x is not None and down is not None:
                grad_x[span] = down.flatten(0, 1)[: x.shape[1]].mT
        return grad_x, None, *sides.gradients()


def _summed(x: Tensor, left: Tensor, right: Tensor, alone: Tensor) -> bool:
    """Whether one product with the sum is cheaper."""
    apart, summed = _ways(len(x), len(left), left.shape[1], len(alone), x.dtype)
    return summed < apart


def _sum(x: Tensor, left: Tensor, right: Tensor, alone: Tensor) -> Tensor:
    """The sum, cut to (N, N)."""
    eye = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
    whole = kronecker_sum(torch.cat([left, eye[None]]).to(x.dtype), torch.cat([right, alone[None]]).to(x.dtype))
    return whole[: x.shape[1], : x.shape[1]]


class _Sides:
    """``[U_1 .. U_t]`` (m t, m), ``[V_1 .. V_t]`` (p, t p) and ``E`` (p, p), with their gradients' sums."""

    def __init__(self, dtype: torch.dtype, left: Tensor, right: Tensor, alone: Tensor) -> None:
        (self.terms, self.m, _), (_, self.p, _) = left.shape, right.shape
        flat = left.transpose(0, 1).flatten(0, 1), right.transpose(0, 1).flatten(1), alone
        self.left, self.right, self.alone = (side.to(dtype) for side in flat)
        self.sums = [torch.zeros_like(side) for side in flat]

    def across(self, rows: Tensor) -> Tensor:
        """Rows (n, N) as (m, p, n), padded with zeros."""
        across = rows.new_empty(self.m * self.p, len(rows))
        across[: rows.shape[1]] = rows.mT
        across[rows.shape[1] :] = 0
        return across.view(self.m, self.p, len(rows))

    def between(self, x: Tensor) -> Tensor:
        """``H`` (m, t p, n)."""
        return (self.left @ x.flatten(1)).view(self.m, self.terms * self.p, x.shape[2])

    def product(self, x: Tensor, between: Tensor) -> Tensor:
        return torch.bmm(_each(self.alone, x), x).baddbmm_(_each(self.right, x), between)

    def pull(self, x: Tensor, between: Tensor, grad: Tensor, needs_x: bool) -> Tensor | None:
        """Adds up the factors' gradients; returns the block's."""
        above = torch.bmm(_each(self.right.mT, grad), grad).view(len(self.left), self.p * x.shape[2])
        self.sums[0] += above @ x.flatten(1).mT
        self.sums[1] += torch.bmm(grad, between.mT).sum(0)
        self.sums[2] += torch.bmm(grad, x.mT).sum(0)
        if not needs_x:
            return None
        return torch.bmm(_each(self.alone.mT, grad), grad).flatten(1).addmm_(self.left.mT, above).view(x.shape)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        left, right, alone = self.sums
        left = left.view(self.m, self.terms, self.m).transpose(0, 1)
        return left, right.view(self.p, self.terms, self.p).transpose(0, 1), alone


def _each(matrix: Tensor, batch: Tensor) -> Tensor:
    return matrix.expand(len(batch), *matrix.shape)


def _spans(x: Tensor) -> Iterator[slice]:
    some = max(BLOCK // x.shape[1] // LANES, 1) * LANES
    return (slice(start, start + some) for start in range(0, len(x), some))
