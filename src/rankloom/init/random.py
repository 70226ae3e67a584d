"""Starts that look at no data: LoRA's Kaiming and a small Gaussian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankloom.adapters import LowRankAdapter
from rankloom.init.base import InitContext, InitPart
from rankloom.layers import EmbeddingLayer, Layer
from rankloom.parts import part

__all__ = ["Gaussian", "Kaiming", "kaiming_rows", "start_at_zero"]


def kaiming_rows(like: Tensor, layer: Layer, generator: torch.Generator) -> Tensor:
    """Rows of ``A``: uniform in +-1/sqrt(in), or standard normal for a look-up table, whose inputs are one-hot."""
    cpu = torch.empty(like.shape, dtype=like.dtype)
    if isinstance(layer, EmbeddingLayer):
        return cpu.normal_(generator=generator)
    bound = layer.in_features**-0.5
    return cpu.uniform_(-bound, bound, generator=generator)


def start_at_zero(adapter: LowRankAdapter, rows: Tensor, generator: torch.Generator) -> None:
    """``delta = 0`` on given rows (r, in): ``B = 0``, or, where ``B`` is frozen, random columns before a zero core or, where
    ``A`` alone is trained, before a zero ``A``.

    The columns are ``N(0, 1 / out)``, orthonormal in expectation.
    """
    one = torch.ones(adapter.rank, dtype=rows.dtype)
    if "B" in adapter.trained():
        adapter.write(torch.zeros_like(adapter.B), rows, one)
    else:
        columns = torch.randn(adapter.B.shape, generator=generator, dtype=adapter.B.dtype) * len(adapter.B) ** -0.5
        adapter.write(columns, rows if adapter.core is not None else torch.zeros_like(rows), 0 * one)


@part("init", "kaiming")
@dataclass(frozen=True)
class Kaiming(InitPart):
    """LoRA's start (2106.09685): ``A ~ U(-1/sqrt(in), 1/sqrt(in))``, ``B = 0``; a core starts at one.

    Where ``B`` is frozen it is random as well, and the core starts at zero.

    On an embedding ``A`` is standard normal, where the released code has ``A = 0`` and ``B`` normal: the same delta, zero,
    and the factor that starts at zero is again the one on the output side.
    """

    repeatable: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"factors"})

    def apply(self, context: InitContext) -> None:
        for binding in context.bindings:
            generator = context.generator(binding)
            start_at_zero(binding.adapter, kaiming_rows(binding.adapter.A, binding.layer, generator), generator)


@part("init", "gaussian")
@dataclass(frozen=True)
class Gaussian(InitPart):
    """``A, B ~ N(0, std^2)`` with the core at zero (AdaLoRA, 2303.10512); without a core ``B = 0``, or ``A = 0`` if
    ``B`` is frozen."""

    repeatable: ClassVar[bool] = True

    std: float = 0.02

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"factors"})

    def apply(self, context: InitContext) -> None:
        for binding in context.bindings:
            adapter: LowRankAdapter = binding.adapter
            generator = context.generator(binding)
            a = torch.randn(adapter.A.shape, generator=generator) * self.std
            b = torch.randn(adapter.B.shape, generator=generator) * self.std
            if adapter.core is None:  # one factor at zero, and never the one that could not leave it
                a, b = (a, torch.zeros_like(b)) if "B" in adapter.trained() else (torch.zeros_like(a), b)
            adapter.write(b, a, torch.zeros(adapter.rank))
