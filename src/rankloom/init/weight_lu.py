"""LoLDU's start (2410.13618): the weight's triangular factors around a diagonal core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankloom.adapters import LowRankAdapter
from rankloom.errors import RecipeError
from rankloom.init.base import InitContext, InitPart
from rankloom.parts import part

__all__ = ["WeightLU", "leading_ldu"]


def leading_ldu(matrix: Tensor, rank: int, tiny: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """``P L_r`` (m, r), ``d`` (r,), ``U_r`` (r, n): the first r steps of ``W = P L diag(d) U`` with partial pivoting.

    ``L`` is unit lower trapezoidal, ``U`` unit upper trapezoidal. Only the first r columns are eliminated, which costs
    ``(m + n) r^2``: later steps permute rows below and change none of these. Where a pivot is at most ``tiny`` times the
    largest, its row of ``U`` stays undivided and ``d_i = 1``: the same product, without rows that blow up.
    """
    packed, pivots, _ = torch.linalg.lu_factor_ex(matrix[:, :rank])
    order = torch.arange(len(matrix))
    for step, other in enumerate((pivots - 1).tolist()):
        order[[step, other]] = order[[other, step]]
    order = order.to(matrix.device)
    lower = packed.tril(-1)
    lower.diagonal().fill_(1)
    solved = torch.linalg.solve_triangular(lower[:rank], matrix[order[:rank], rank:], upper=False, unitriangular=True)
    upper = torch.cat([packed[:rank].triu(), solved], 1)
    pivot = packed.diagonal().clone()
    pivot[pivot.abs() <= tiny * pivot.abs().max()] = 1
    return torch.empty_like(lower).index_copy_(0, order, lower), pivot, upper / pivot[:, None]


@part("init", "weight-lu")
@dataclass(frozen=True)
class WeightLU(InitPart):
    """LoLDU: ``B = P L_r``, ``A = U_r`` (unit rows) from ``W = P L diag(d) U``, and what trains between them at zero.

    With a diagonal core ``z - z0``, the update is ``s P L_r diag(z - z0) U_r``; with a trained ``B`` that factor starts at
    zero (and a core at one), with ``A`` alone trained, ``A`` does. ``tiny``: the share of the largest pivot up to which a
    pivot is not divided by.
    """

    tiny: float = 1e-6

    evidence: ClassVar[Literal["none", "weight", "gradient", "activations"]] = "weight"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"factors"})

    def check(self) -> None:
        if not 0 <= self.tiny < 1:
            raise RecipeError(f"init tiny is a share of the largest pivot in [0, 1), got {self.tiny}")

    def apply(self, context: InitContext) -> None:
        for binding in context.bindings:
            adapter: LowRankAdapter = binding.adapter
            weight = binding.layer.weight().to(torch.promote_types(binding.layer.dtype, torch.float32))
            lower, pivots, upper = leading_ldu(weight, adapter.rank, self.tiny)
            adapter.start(lower, torch.zeros_like(pivots), upper)
