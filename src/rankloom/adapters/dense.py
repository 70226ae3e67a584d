"""The dense form: the weight itself is trained. Full fine-tuning, and what projected optimizers (GaLore) work on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.adapters.base import Adapter, AdapterPart, Dtype, adapter_dtype
from rankloom.layers import Layer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["Dense", "DenseAdapter"]


class DenseAdapter(Adapter):
    """``delta = weight - W`` with a trainable copy ``weight`` (out, in): the stored base stays as it was."""

    needs_base: ClassVar[Literal["never", "init", "merge", "every_step"]] = "init"
    roles: ClassVar[dict[str, str]] = {"weight": "dense"}

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        super().__init__()
        # The copy keeps the storage order too (Conv1D's is transposed), so that step 0 runs the very same product.
        self.weight = nn.Parameter(layer.weight().to(dtype, copy=True))

    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """Nothing to write: the weight was built as a copy."""

    def delta(self, base: Layer) -> Tensor:
        return self.weight - base.weight().to(self.weight.dtype)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if base.rows is not None:
            # The fused projection's product is there already; a second one over these rows alone would sum in another
            # order, so the change is added instead and step 0 stays bit-identical.
            y = base(x)
            return y + F.linear(x, self.delta(base).to(y.dtype))
        return base.apply(x, self.weight.to(x.dtype if x.is_floating_point() else base.dtype))


@part("adapter", "dense")
@dataclass(frozen=True)
class Dense(AdapterPart):
    """Train a copy of ``W``; ``in * out`` parameters per target.

    ``dtype="base"`` keeps the base's own precision (half-precision training without a float32 copy, GaLore's setting);
    ``auto`` holds the weight in float32 at least.
    """

    dtype: Dtype | Literal["base"] = "base"

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {"dense weights"}

    def build(self, target: Target) -> DenseAdapter:
        layer = target.layer
        return DenseAdapter(layer, layer.dtype if self.dtype == "base" else adapter_dtype(self.dtype, layer))
