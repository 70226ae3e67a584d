"""BAT, the block-affine transformation (2409.15371; its first version calls it Bone): ``delta = W b + b`` by blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.adapters.base import AdapterPart, Dtype, adapter_dtype
from rankloom.adapters.materialized import MaterializedAdapter
from rankloom.errors import RecipeError, TargetError
from rankloom.layers import Layer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["BAT", "BATAdapter"]


class BATAdapter(MaterializedAdapter):
    """``delta[i, c] = W[i, c] b_i + b_i`` for the block of ``W`` in block row ``i``, column ``c``; ``b`` (out/r, r, r)."""

    needs_base: ClassVar[Literal["never", "init", "merge", "every_step"]] = "every_step"
    roles: ClassVar[dict[str, str]] = {"b": "blocks"}

    def __init__(self, layer: Layer, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.multiple = self.rank = rank
        count = -(-layer.out_features // rank)
        self.b = nn.Parameter(torch.zeros(count, rank, rank, dtype=dtype, device=layer.device))

    def reset(self, base: Layer, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.b.zero_()

    def rows(self, weight: Tensor | None, span: slice, *tensors: Tensor) -> Tensor:
        assert weight is not None
        r, (height, width) = self.rank, weight.shape
        blocks = tensors[0][span.start // r : -(-span.stop // r)].to(weight.dtype)
        whole = F.pad(weight, (0, -width % r, 0, -height % r)) if width % r or height % r else weight
        # A block row's r x r blocks lie on top of each other once its rows are cut into pieces of r: one product for all.
        product = (whole.reshape(len(blocks), -1, r) @ blocks).view(len(blocks), r, -1, r)
        return product.add_(blocks[:, :, None]).view(whole.shape)[:height, :width]


@part("adapter", "bat")
@dataclass(frozen=True)
class BAT(AdapterPart):
    """``y = x (W + delta)^T + bias`` with ``delta[i, c] = W[i, c] b_i + b_i`` for the ``r x r`` blocks of ``W``, ``b`` from zero.

    The update depends on ``W``, which is read at every step, and may have full rank. Sides that ``r`` does not divide are
    padded with zeros. Parameters per target: ``r^2 ceil(out / r)``.
    """

    rank: int = 64
    dtype: Dtype = "auto"

    def check(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"adapter rank must be at least 1, got {self.rank}")

    def check_on(self, targets: list[Target]) -> None:
        for target in targets:
            if self.rank > (limit := min(target.shape)):
                raise TargetError(
                    f"adapter rank {self.rank} is above min(out, in) = {limit} of {target.name} {target.shape}: lower "
                    f"adapter.rank to at most {limit}"
                )

    def build(self, target: Target) -> BATAdapter:
        return BATAdapter(target.layer, self.rank, adapter_dtype(self.dtype, target.layer))
