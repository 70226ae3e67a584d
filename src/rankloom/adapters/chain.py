"""Chains of low-rank links (2307.05695, 2401.04151, 2410.08305): the links trained so far are summed up beside the base."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from rankloom.adapters.factored import FactoredAdapter
from rankloom.layers import Layer
from rankloom.linalg import randomized_svd

__all__ = ["ChainAdapter", "chained"]

_EXACT_SVD_UP_TO = 2048  # the smaller side; a randomised SVD finds a matrix of known low rank as exactly, far cheaper


class ChainAdapter(FactoredAdapter):
    """``delta = M + s L R``: the links merged so far, ``M`` (out, in), and the link in training, of any factored form.

    ``M`` is kept in the trainable tensors' dtype, float32 at least, so that a half-precision base swallows no small link;
    ``chain`` holds the number of merged links and the seed of those to come. The stored weight stays as it is: the frozen
    layer runs on a copy of ``W + M``, made once per link in the layer's dtype, and on ``W`` itself as long as ``M = 0``.

    Memory per target: ``in * out`` numbers twice, in the adapter's and in the layer's dtype; a quantised base has a dense
    copy beside it from the first merge on. The adapter's file holds ``M``.
    """

    merged: Tensor
    chain: Tensor
    _current: tuple[Tensor, Any, Layer]

    def begin(self, layer: Layer, seed: int) -> None:
        """An empty chain."""
        like = next(self.parameters())
        shape = layer.out_features, layer.in_features
        self.register_buffer("merged", torch.zeros(shape, dtype=like.dtype, device=like.device))
        self.register_buffer("chain", torch.tensor([0, seed]))

    @property
    def links(self) -> int:
        """How many links have been merged."""
        return int(self.chain[0])

    @property
    def seed(self) -> int:
        """The seed of the links to come."""
        return int(self.chain[1])

    @torch.no_grad()
    def merge_link(self, base: Layer) -> None:
        """``M <- M + s L R``. The factors stay: who merges starts them again at ``s L R = 0``."""
        b, a = self.effective()
        self.merged.addmm_(b.to(self.merged.dtype), a.to(self.merged.dtype), alpha=self.scale)
        self.chain[0] += 1

    @torch.no_grad()
    def current(self, base: Layer) -> Layer:
        """The frozen layer of the link in training, with the weight ``W + M``."""
        if base.replaced:
            return base
        stored, made_of = base.stored, (base.stored._version, self.merged.data_ptr(), self.merged._version)
        if "_current" not in self.__dict__ or self._current[0] is not stored or self._current[1] != made_of:
            self.__dict__["_current"] = stored, made_of, self._summed(base) if self.merged.any() else base
        layer = self._current[2]
        return layer if layer.replaced else base  # the caller's own view may know its output already

    def _summed(self, base: Layer) -> Layer:
        matrix = (base.weight().to(self.merged.dtype) + self.merged).to(base.dtype)
        return base.with_weight(base.to_matrix(base.from_matrix(matrix).contiguous()))

    def delta(self, base: Layer) -> Tensor:
        return self.merged + super().delta(base)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """``M``'s singular vectors beside the link in training; None where the chain may have reached full rank."""
        b, a = self.effective()
        rank, full = self.links * len(a), min(self.merged.shape)
        if rank + len(a) > full:
            return None
        if full > _EXACT_SVD_UP_TO:
            u, s, v = randomized_svd(self.merged, rank, generator=torch.Generator().manual_seed(0))
        else:
            u, s, vh = torch.linalg.svd(self.merged, full_matrices=False)
            u, s, v = u[:, :rank], s[:rank], vh[:rank].mT
        root = s.sqrt()
        return torch.cat([u * root, self.scale * b], 1), torch.cat([(v * root).mT, a])

    def operands(self, x: Tensor, base: Layer) -> Any:
        return super().operands(x, self.current(base))

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        return super().forward(x, self.current(base))


@cache
def chained(form: type[FactoredAdapter]) -> type[ChainAdapter]:
    """A factored form as the links of a chain."""
    return type(f"Chained{form.__name__}", (ChainAdapter, form), {"__module__": __name__})
