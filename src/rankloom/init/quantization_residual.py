"""LoftQ (2310.08659): start with what quantising the weight has lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankloom.adapters import LowRankAdapter
from rankloom.errors import CompositionError
from rankloom.init.base import InitContext, InitPart
from rankloom.init.reference import Reference
from rankloom.layers import Layer
from rankloom.linalg import leading_svd
from rankloom.parts import part

__all__ = ["QuantizationResidual"]


def residual(layer: Layer, reference: Tensor) -> Tensor:
    """``W - deq(Q)`` (out, in) in float32 or wider."""
    dtype = torch.promote_types(torch.promote_types(reference.dtype, layer.dtype), torch.float32)
    return reference.to(dtype) - layer.weight().to(dtype)


@part("init", "quantization-residual")
@dataclass(frozen=True)
class QuantizationResidual(InitPart):
    """LoftQ's start: with ``Q`` the base's weight as stored and ``W`` the one it was quantised from,

    ``W - deq(Q) = U diag(S) V^T``, ``B = U_r diag(sqrt(S_r / s))``, ``A = diag(sqrt(S_r / s)) V_r^T``,

    so that ``deq(Q) + s B A`` is as close to ``W`` as rank r allows: the first of the paper's alternations, and the best one
    for a stored ``Q``, which is never edited here. A core takes ``S_r / s``.

    ``reference``: the safetensors file, or the folder of them, with the weights before quantisation. The report has, by
    target, how much of ``||W - deq(Q)||_F`` is left.
    """

    reference: str = ""

    evidence: ClassVar[Literal["none", "weight", "gradient", "activations"]] = "weight"

    @property
    def moves_output(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"factors"})

    def apply(self, context: InitContext) -> None:
        if not self.reference:
            raise CompositionError(
                "init 'quantization-residual' compares with the weights before quantisation: set init.reference to their "
                "safetensors file or folder, or use init='kaiming'"
            )
        reference, left = Reference(Path(self.reference), "init.reference to the model before it was quantised"), {}
        for binding in context.bindings:
            adapter: LowRankAdapter = binding.adapter
            lost = residual(binding.layer, reference.matrix(binding))
            u, s, v, _ = leading_svd(lost, adapter.rank, generator=context.generator(binding))
            adapter.start(u, s / adapter.scale, v.mT)
            energy = float(lost.double().square().sum())
            rest = max(0.0, 1 - float(s.double().square().sum()) / energy) if energy else 0.0
            left[binding.name] = rest**0.5
        context.report.update(residual=left)
