"""LoRA-GA (2407.05000): two different blocks of the full gradient's singular vectors, one for each factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankloom.adapters import Binding, LowRankAdapter
from rankloom.calibration import GradientReport
from rankloom.errors import RecipeError
from rankloom.init.base import InitContext
from rankloom.init.from_gradient import FromGradient
from rankloom.linalg import leading_svd
from rankloom.parts import part

__all__ = ["GradientBlocks", "block_indices"]

Blocks = Literal["ArB2r", "A2rBr", "ArBr", "random"]


def block_indices(
    blocks: Blocks, rank: int, available: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Which of the leading triplets ``A`` (r,) and ``B`` (r,) take, out of ``available``.

    ``ArB2r``: the first r and the next r; ``A2rBr``: the other way round; ``ArBr``: every second one from the second, and
    from the first; ``random``: the same r of 2r for both. With fewer than 2r available, the first r and the last r.
    """
    count = min(2 * rank, available)
    if blocks == "random":
        picked = torch.randperm(count, generator=generator)[:rank]
        return picked, picked
    order = torch.arange(count)
    first, second = order[:rank], order[count - rank :]
    if blocks == "ArBr" and count == 2 * rank:
        return order[1::2], order[0::2]
    return (second, first) if blocks == "A2rBr" else (first, second)


@part("init", "gradient-blocks")
@dataclass(frozen=True)
class GradientBlocks(FromGradient):
    """LoRA-GA's start: with the full gradient ``G = U diag(S) V^T`` on the calibration data and two index blocks,

    ``A0 = c V[:, block_A]^T``, ``B0 = c U[:, block_B]``, and ``s B0 A0`` is subtracted.

    Disjoint blocks of the leading 2r make the first step of gradient descent the best rank-2r approximation of a full one:
    ``B0 B0^T G + G A0^T A0 = c^2 G_2r``. The gradient's size does not matter, nor does its sign.

    ``scale``: ``"stable"``, ``c^2 = sqrt(out) / gamma``, which with rsLoRA's ``s`` makes the output's scale independent of r,
    in and out; ``"gd"``, ``c = 1 / s``; ``"unit"``, ``c = 1``; ``"weight"``, ``c`` the mean of ``sqrt(S_i(W) / s)`` over the
    leading r. ``blocks``: see :func:`block_indices`. A core takes ``c^2``. The other settings are those of
    every start from the gradient, of which this one takes the leading 2r triplets.
    """

    scale: Literal["stable", "gd", "unit", "weight"] = "stable"
    gamma: float = 16.0
    blocks: Blocks = "ArB2r"

    offset: ClassVar[bool] = True
    triplets: ClassVar[int] = 2

    def check(self) -> None:
        super().check()
        if self.gamma <= 0:
            raise RecipeError(f"init gamma must be positive, got {self.gamma}")

    def apply(self, context: InitContext) -> None:
        gathered: GradientReport = context.evidence
        for binding in context.bindings:
            adapter: LowRankAdapter = binding.adapter
            generator = context.generator(binding)
            u, _, v = gathered.svds[binding.name].top(2 * adapter.rank)
            for_a, for_b = block_indices(self.blocks, adapter.rank, u.shape[1], generator)
            squared = torch.full((adapter.rank,), self._squared(binding, generator), dtype=u.dtype)
            adapter.start(u[:, for_b], squared, v[:, for_a].mT)
        context.report.update(gathered.summary())

    def _squared(self, binding: Binding, generator: torch.Generator) -> float:
        """``c^2``."""
        adapter: LowRankAdapter = binding.adapter
        if self.scale == "stable":
            return float(binding.layer.out_features**0.5 / self.gamma)
        if self.scale == "gd":
            return float(adapter.scale**-2)
        if self.scale == "unit":
            return 1.0
        weight = binding.layer.weight().to(torch.promote_types(binding.layer.dtype, torch.float32))
        return float((leading_svd(weight, adapter.rank, generator=generator)[1] / adapter.scale).sqrt().mean() ** 2)
