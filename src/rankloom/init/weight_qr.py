"""OLoRA (2406.01775): start from the QR decomposition of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rankloom.adapters import LowRankAdapter
from rankloom.init.base import InitContext, InitPart
from rankloom.linalg import orthonormal
from rankloom.parts import part

__all__ = ["WeightQR"]


@part("init", "weight-qr")
@dataclass(frozen=True)
class WeightQR(InitPart):
    """With ``W = Q R``: ``B0 = Q[:, :r]`` (orthonormal), ``A0 = R[:r]``, and ``s B0 A0`` is subtracted.

    The leading columns of ``Q`` depend on the leading columns of ``W`` alone, so only those are decomposed and
    ``R[:r] = Q[:, :r]^T W``: one thin product. A core starts at one.
    """

    evidence: ClassVar[Literal["none", "weight", "gradient", "activations"]] = "weight"
    offset: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"factors"})

    def apply(self, context: InitContext) -> None:
        for binding in context.bindings:
            adapter: LowRankAdapter = binding.adapter
            weight = binding.layer.weight().to(torch.promote_types(binding.layer.dtype, torch.float32))
            q = orthonormal(weight[:, : adapter.rank])
            adapter.write(q, q.mT @ weight, torch.ones(adapter.rank))
