"""LoKr (LyCORIS, 2309.14859; KronA, 2212.10650): a Kronecker product, each factor whole or of low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rankloom.adapters.base import Dtype, adapter_dtype
from rankloom.adapters.kronecker import KroneckerAdapter
from rankloom.adapters.patterned import PatternedPart
from rankloom.errors import RecipeError
from rankloom.kernels import Terms
from rankloom.layers import Conv2dLayer, Layer
from rankloom.linalg import divisors
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["LoKr", "LoKrAdapter", "sides"]


class LoKrAdapter(KroneckerAdapter):
    """``delta = s * w1 (x) w2`` with ``w1`` (m, n), ``w2`` (p, q), out = m p, in = n q; a factor of low rank is
    ``wi = wi_a wi_b`` with ``wi_a`` (., r), ``wi_b`` (r, .)."""

    roles: ClassVar[dict[str, str]] = dict.fromkeys(("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"), "kronecker")
    w1: Tensor
    w1_a: Tensor
    w1_b: Tensor
    w2: Tensor
    w2_a: Tensor
    w2_b: Tensor

    def __init__(
        self,
        layer: Layer,
        shapes: tuple[tuple[int, int], tuple[int, int]],
        low_rank: tuple[bool, bool],
        rank: int,
        scale: float,
        zero: Literal["w1", "w2"],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.zero = rank, scale, zero
        for name, (rows, columns), low in zip(("w1", "w2"), shapes, low_rank, strict=True):
            tensors = {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)} if low else {name: (rows, columns)}
            for key, shape in tensors.items():
                self.register_parameter(key, nn.Parameter(torch.zeros(shape, dtype=dtype, device=layer.device)))

    def terms(self) -> Terms:
        w1 = self.w1 if hasattr(self, "w1") else self.w1_a @ self.w1_b
        if hasattr(self, "w2"):
            return Terms(w1[None], self.w2[None])
        return Terms(w1[None], self.w2_b[None], self.w2_a)

    @torch.no_grad()
    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """One factor at zero (its ``a`` for ``w1``, its ``b`` for ``w2``), all else uniform in +-1/sqrt(columns)."""
        zero = {"w1": ("w1", "w1_a"), "w2": ("w2", "w2_b")}[self.zero]
        for name, parameter in self.named_parameters():
            bound = 0.0 if name in zero else parameter.shape[1] ** -0.5
            cpu = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter.copy_(cpu.uniform_(-bound, bound, generator=generator) if bound else cpu.zero_())


def sides(dimension: int, factor: int) -> tuple[int, int]:
    """``dimension`` as a product of two: ``factor`` first where it divides it, else the largest divisor up to ``factor``
    (-1: no limit) and up to the square root."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    small = max(d for d in divisors(dimension) if d <= limit)
    return small, dimension // small


@part("adapter", "lokr")
@dataclass(frozen=True)
class LoKr(PatternedPart):
    """``y = x (W + s w1 (x) w2)^T + b`` with ``s = alpha / r`` (2309.14859, Sec. 3.3; without low rank KronA, 2212.10650).

    out = m p and in = n q are factorised alike: ``decompose_factor`` is the first factor's share where it divides them, and
    the most it may be where it does not; -1 stands for the balanced divisors. ``w2`` (p, q) is of rank ``r`` where
    ``r < max(p, q) / 2``, whole else; ``w1`` (m, n) is whole unless ``decompose_both`` asks for the same rule. A convolution's
    channels are factorised, its kernel stays with ``w2``. ``zero`` says which factor starts at zero. ``rank_pattern`` and
    ``alpha_pattern`` override rank and alpha for the targets a pattern matches (last match wins). All other settings mean what
    they do in PEFT. A dimension without divisors leaves that side of ``w1`` with 1.
    Parameters per target: ``m n + r (p + q)``, with low-rank ``w1`` ``r (m + n + p + q)``, without any ``m n + p q``.
    """

    rank: int = 8
    alpha: float = 8.0
    decompose_both: bool = False
    decompose_factor: int = -1
    zero: Literal["w1", "w2"] = "w1"
    dtype: Dtype = "auto"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        super().check()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise RecipeError(f"adapter decompose_factor is a divisor, or -1 for balanced, got {self.decompose_factor}")

    def build(self, target: Target) -> LoKrAdapter:
        layer = target.layer
        kernel = layer.stored[0, 0].numel() if isinstance(layer, Conv2dLayer) else 1
        (m, p), (n, q) = (sides(d, self.decompose_factor) for d in (layer.out_features, layer.in_features // kernel))
        rank, scale = self.rank_of(target.name), self.scale_of(target.name)
        low = self.decompose_both and rank < max(m, n) / 2, rank < max(p, q) / 2
        dtype = adapter_dtype(self.dtype, layer)
        return LoKrAdapter(layer, ((m, n), (p, q * kernel)), low, rank, scale, self.zero, dtype)
