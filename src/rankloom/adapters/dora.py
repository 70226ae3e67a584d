"""DoRA (2402.09353): a magnitude per output row times the direction of ``W + s B A``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankloom.adapters.factored import dropout
from rankloom.adapters.lora import LoRA, LowRankAdapter
from rankloom.kernels import dora_linears
from rankloom.layers import Layer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["DoRA", "DoRAAdapter"]


class DoRAAdapter(LowRankAdapter):
    """``W_eff = diag(m / ||V||) V`` with ``V = W + s B A`` and ``||V||`` (out,) its row norms, constant in the gradient.

    The norms come from the factors without forming ``V``:
    ``||V||^2 = ||W||^2 + 2 s rowsum(B * (W A^T)) + s^2 rowsum(B * (B A A^T))``, and ``||W||^2`` is computed once.
    """

    needs_base: ClassVar[Literal["never", "init", "merge", "every_step"]] = "every_step"
    roles: ClassVar[dict[str, str]] = {**LowRankAdapter.roles, "m": "magnitude"}
    base_norm2: Tensor

    def __init__(self, layer: Layer, **settings: Any) -> None:
        super().__init__(layer, **settings)
        self.m = nn.Parameter(torch.empty(layer.out_features, dtype=self.A.dtype, device=layer.device))
        # The sum runs in the trainable dtype, whatever the storage: a half-precision norm would be off in the third digit.
        norm2 = torch.linalg.vector_norm(layer.weight(), dim=1, dtype=self.m.dtype).square_()
        self.register_buffer("base_norm2", norm2, persistent=False)

    @torch.no_grad()
    def initialized(self, base: Layer) -> None:
        super().initialized(base)
        self.m.copy_(self.norm(base))  # the very expression the gain divides by, so step 0 multiplies by exactly one

    @torch.no_grad()
    def norm(self, base: Layer) -> Tensor:
        """``||W + s B A||`` by rows (out,)."""
        weight = base.weight()
        b, a = self.effective()
        cross = (weight @ a.mT.to(weight.dtype)).to(b.dtype)
        # Twice the cross term and the square, by rows, with one scale taken out.
        mixed = torch.addmm(cross, b, a @ a.mT, beta=2, alpha=self.scale).mul_(b).sum(1)
        square = torch.add(self.base_norm2, mixed, alpha=self.scale)
        return square.clamp_(min=torch.finfo(square.dtype).tiny).sqrt_()

    def gain(self, base: Layer) -> Tensor:
        """``m / ||V||`` (out,), differentiable in ``m`` only."""
        return self.m / self.norm(base)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None  # the magnitude moves W itself: the update has no low rank

    def delta(self, base: Layer) -> Tensor:
        weight = base.weight().to(self.m.dtype)
        b, a = self.effective()
        direction = weight + (self.scale * b) @ a
        return self.gain(base)[:, None] * direction - weight

    def operands(self, x: Tensor, base: Layer) -> Any:
        linear = super().operands(x, base)
        return None if linear is None else (linear, self.gain(base))

    @classmethod
    def together(cls, x: Tensor, operands: Sequence[Any]) -> tuple[Tensor, ...]:
        linears, gains = zip(*operands, strict=True)
        return dora_linears(x, linears, gains)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if (operands := self.operands(x, base)) is not None:
            return self.together(x, [operands])[0]
        dtype = x.dtype if x.is_floating_point() else base.dtype
        inner = dropout(x, self.dropout) if self.training and self.dropout else x
        y = base(x)
        gain = base.broadcast(self.gain(base).to(y.dtype))
        b, a = self.effective()
        update = base.lowrank(inner, a.to(dtype), (self.scale * b).to(dtype))
        out = gain * (y + update.to(y.dtype))
        bias = base.bias()
        return out if bias is None else out + (1 - gain) * base.broadcast(bias)


@part("adapter", "dora")
@dataclass(frozen=True)
class DoRA(LoRA):
    """``y = m / ||W + s B A||_row * (x (W + s B A)^T) + b``; the norm is held constant in the gradient, as in the paper.

    Settings as LoRA's. Parameters per target: ``r (in + out) + out``. Dropout acts on the low-rank path, never on the norm.
    """

    @property
    def offers(self) -> frozenset[str]:
        # No links: a magnitude belongs to one W, and a chain gives every link another.
        return super().offers - {"links"} | {"magnitude"}

    def build(self, target: Target) -> DoRAAdapter:
        return DoRAAdapter(target.layer, **self._arguments(target))
