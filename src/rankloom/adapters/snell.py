"""SNELL (2411.01800) and SNELLA (2510.24037): a kernel matrix of two sets of points, of which the largest entries survive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankloom.adapters.base import AdapterPart, Dtype, adapter_dtype
from rankloom.adapters.materialized import MaterializedAdapter
from rankloom.errors import RecipeError
from rankloom.kernels import row_blocks
from rankloom.kernels.distances import distance_difference, grid
from rankloom.layers import Layer
from rankloom.linalg import kth_smallest
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["SNELL", "SNELLAdapter"]

Kernel = Literal["distance", "mixed"]
Sparsify = Literal["hard", "soft", "code"]


class SNELLAdapter(MaterializedAdapter):
    """``delta = S(K)``: ``K[j, i] = c (||P0_j - Q0_i|| - ||P1_j - Q1_i||)`` for ``Q`` (2, in, d/2), ``P`` (2, out, d/2).

    ``kept`` (a count) entries of largest magnitude survive. ``mix`` (3,) holds ``alpha``, ``log gamma`` and ``beta`` of the
    mixed kernel.
    """

    roles: ClassVar[dict[str, str]] = {"Q": "points", "P": "points", "mix": "scalars"}
    kept: Tensor
    constant: ClassVar[float] = 0.1  # c, as released

    def __init__(
        self, layer: Layer, dim: int, kernel: Kernel, sparsify: Sparsify, sparsity: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.shape, self.sparsify, self.sparsity = (layer.out_features, layer.in_features), sparsify, sparsity
        self.multiple = grid(layer.in_features)  # the entry at the limit is found again to the bit
        names = ["Q", "P", *(["mix"] if kernel == "mixed" else [])]
        for name in names:
            size = (3,) if name == "mix" else (2, self.shape["PQ".index(name)], dim // 2)
            tensor = torch.zeros(size, dtype=dtype, device=layer.device)
            self.register_parameter(name, nn.Parameter(tensor))
            if sparsify == "code":
                self.register_buffer(f"{name}0", tensor.clone())
        entries = self.shape[0] * self.shape[1]
        self.register_buffer("kept", torch.tensor(entries - int(sparsity * entries), device=layer.device))

    @torch.no_grad()
    def reset(self, base: Layer, generator: torch.Generator) -> None:
        for points in (self.get_parameter("Q"), self.get_parameter("P")):
            bound = points[0].numel() ** -0.5
            drawn = torch.empty(points.shape, dtype=points.dtype).uniform_(-bound, bound, generator=generator)
            points.copy_(drawn if self.sparsify == "code" else drawn[:1])  # paired: both heads alike, so they cancel
        if "mix" in self._parameters:
            self.get_parameter("mix").copy_(torch.tensor([1.0, 0.0, 0.0]))
        for name, parameter in self.named_parameters() if self.sparsify == "code" else ():
            self.get_buffer(f"{name}0").copy_(parameter)

    def tensors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        now = self._decided(*self.parameters())
        if self.sparsify != "code":
            return now
        return now + self._decided(*[self.get_buffer(f"{name}0") for name, _ in self.named_parameters()])

    def _decided(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors with what depends on all of ``K``: the softmax's column maxima and sums, and the limit."""
        spans = list(row_blocks(self.shape, self.multiple))
        if len(tensors) == 3:
            q, p, _ = tensors
            with torch.no_grad():
                peak = torch.stack([self._distance(span, q, p).amax(0) for span in spans]).amax(0)
            sums = [checkpoint(self._sum, span, peak, *tensors, use_reentrant=False) for span in spans]
            tensors = (*tensors, peak, cast(Tensor, sum(sums[1:], sums[0])))
        return *tensors, self._limit(spans, *tensors)

    @torch.no_grad()
    def _limit(self, spans: list[slice], *tensors: Tensor) -> Tensor:
        """The least magnitude that survives: the ``kept``-th largest of ``|K|``."""
        entries, kept = self.shape[0] * self.shape[1], int(self.kept)
        if kept in (0, entries):
            return tensors[0].new_tensor(0.0 if kept else float("inf"))
        size = tensors[0].new_empty(self.shape)
        for span in spans:
            torch.abs(self.kernel(span, *tensors), out=size[span])
        return kth_smallest(size.flatten(), entries - kept + 1)

    def _distance(self, span: slice, q: Tensor, p: Tensor) -> Tensor:
        return distance_difference(self.constant * p[:, span], self.constant * q)  # c > 0 passes through a norm

    def _sum(self, span: slice, peak: Tensor, q: Tensor, p: Tensor, mix: Tensor) -> Tensor:
        return ((self._distance(span, q, p) - peak) / mix[1].exp()).exp().sum(0)

    def kernel(self, span: slice, q: Tensor, p: Tensor, *mixture: Tensor) -> Tensor:
        """``K[span]`` (n, in), all of it; the mixed kernel's constant ``alpha / out`` is left to ``beta``."""
        k = self._distance(span, q, p)
        if mixture:
            mix, peak, total = mixture
            share = ((k - peak) / mix[1].exp()).exp()
            k = k + mix[0] * ((share - total / self.shape[0]) / total) + mix[2]
        return k

    def rows(self, weight: Tensor | None, span: slice, *tensors: Tensor) -> Tensor:
        if self.sparsify != "code":
            return self._sparse(span, *tensors)
        half = len(tensors) // 2
        return self._sparse(span, *tensors[:half]) - self._sparse(span, *tensors[half:])

    def _sparse(self, span: slice, *tensors: Tensor) -> Tensor:
        k, limit = self.kernel(span, *tensors[:-1]), tensors[-1]
        if self.sparsify == "hard":  # all up to the next number below the limit go
            return k if limit == 0 else nn.functional.hardshrink(k, float(limit.nextafter(torch.zeros_like(limit))))
        size = k.detach().abs()
        stays = size >= limit
        if self.sparsify == "soft":
            return torch.where(stays, k - k.detach().sign() * limit, 0)
        return k if int(self.kept) == self.shape[0] * self.shape[1] else k * (size * stays)


@part("adapter", "snell")
@dataclass(frozen=True)
class SNELL(AdapterPart):
    """``delta`` is a kernel matrix of points in two heads of ``dim / 2`` coordinates, its ``1 - sparsity`` largest entries.

    ``kernel="distance"``: ``K[j, i] = 0.1 (||P0_j - Q0_i|| - ||P1_j - Q1_i||)``, whose rank is not bounded by ``dim``.
    ``"mixed"``: ``K + alpha (softmax_j(K / gamma) - 1 / out) + beta`` with trained scalars. The entries compete anew in every
    step. Those that stay count as they are (``sparsify="hard"``), less the limit (``"soft"``), or times their own magnitude,
    held constant in the gradient, unless all stay, as released (``"code"``).

    Own start: uniform within ``1 / sqrt(n dim / 2)`` for ``n`` points, the two heads alike, so that ``K`` is exactly zero and its
    gradient is not; at the limit zero all entries stay. ``"code"`` has no gradient there: it starts with heads of their own, and
    the update they make is kept and subtracted. Parameters per target: ``dim (in + out)``, 3 more when mixed.
    """

    dim: int = 16
    kernel: Kernel = "distance"
    sparsity: float = 0.9
    sparsify: Sparsify = "hard"
    dtype: Dtype = "auto"

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {"sparsity"}

    def check(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise RecipeError(f"adapter dim is over two heads: give an even number from 2 on, not {self.dim}")
        if not 0 <= self.sparsity < 1:
            raise RecipeError(f"adapter sparsity must be in [0, 1), got {self.sparsity}")

    def build(self, target: Target) -> SNELLAdapter:
        settings: dict[str, Any] = {"kernel": self.kernel, "sparsify": self.sparsify, "sparsity": self.sparsity}
        return SNELLAdapter(target.layer, self.dim, dtype=adapter_dtype(self.dtype, target.layer), **settings)
