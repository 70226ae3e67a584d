"""Any update as plain factors ``s * B A``: exactly where the form has low rank, else the best approximation, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankloom.adapters import Binding, ChainAdapter, DoRAAdapter, LowRankAdapter
from rankloom.artifacts.merge import wide_delta
from rankloom.layers import Layer
from rankloom.linalg import randomized_svd

__all__ = ["Cut", "Factors", "Held", "compact", "factorised", "overall_error", "padded", "product_norm"]

_EXACT_SVD_UP_TO = 2048  # the smaller side; above it a randomised SVD of the wanted rank is as good and far cheaper


@dataclass(frozen=True)
class Cut:
    """How an update without low rank is approximated: a given rank, or the least that keeps ``energy``, up to ``most``."""

    rank: int | None = None
    energy: float = 0.99
    most: int = 256


@dataclass(frozen=True)
class Factors:
    """The update of one module: ``scale * B A`` with ``A`` (r, in), ``B`` (out, r).

    ``alpha`` is the recipe's, where the scale is still its own and not folded into ``B``. ``norm`` and ``lost`` are the
    Frobenius norms of the true update and of what the factors miss of it.
    """

    name: str
    layer: Layer
    A: Tensor
    B: Tensor
    scale: float = 1.0
    alpha: float | None = None
    magnitude: Tensor | None = None
    exact: bool = True
    norm: float = 0.0
    lost: float = 0.0

    @property
    def rank(self) -> int:
        """The rank."""
        return len(self.A)

    @property
    def error(self) -> float:
        """Relative error, Frobenius."""
        return self.lost / self.norm if self.norm else 0.0

    def delta(self) -> Tensor:
        """``scale * B A`` (out, in), in float64."""
        return self.scale * self.B.double() @ self.A.double()


@dataclass(frozen=True)
class Held:
    """The update of one module in a form of its own: nothing is factorised, nothing lost. ``rank`` is the form's setting."""

    name: str
    layer: Layer
    rank: int | None
    exact: bool = True
    norm: float = 0.0
    lost: float = 0.0
    error: float = 0.0


def overall_error(entries: Sequence[Factors | Held]) -> float:
    """Relative error of all updates together."""
    norm = sum(e.norm**2 for e in entries) ** 0.5
    return sum(e.lost**2 for e in entries) ** 0.5 / norm if norm else 0.0


def compact(adapter: LowRankAdapter) -> tuple[Tensor, Tensor]:
    """Effective ``A`` and ``B`` (core and offset folded in, the scale not), without components that are zero on a side.

    The factors of a form with neither core nor offset are left whole, so that its rank stays the recipe's.
    """
    b, a = (factor.detach() for factor in adapter.effective())
    if adapter.core is None and not adapter.offset:
        return a, b
    live = a.any(1) & b.any(0)
    return a[live], b[:, live]


def factorised(name: str, group: list[Binding], cut: Cut) -> Factors:
    """Plain factors of all updates on one module, slices side by side, scale folded into ``B``.

    The slices' factors stack: ``A`` by rows, ``B`` block by block, zero where nothing is adapted.
    """
    layer = type(group[0].layer)(group[0].layer.module)
    pieces = [_factors_of(binding, cut) for binding in group]
    a, exact = torch.cat([piece.A for piece in pieces]), all(piece.exact for piece in pieces)
    b = a.new_zeros(layer.out_features, len(a))
    at = 0
    for binding, piece in zip(group, pieces, strict=True):
        rows = slice(*binding.layer.rows) if binding.layer.rows else slice(None)
        b[rows, at : at + piece.rank] = piece.B
        at += piece.rank
    norm, lost = (sum(getattr(p, key) ** 2 for p in pieces) ** 0.5 for key in ("norm", "lost"))
    return Factors(name, layer, a, b, exact=exact, norm=norm, lost=lost)


def _factors_of(binding: Binding, cut: Cut) -> Factors:
    adapter = binding.adapter
    stored = torch.promote_types(next(adapter.parameters()).dtype, torch.float32)
    if isinstance(adapter, LowRankAdapter) and not isinstance(adapter, DoRAAdapter | ChainAdapter):
        a, b = compact(adapter)
        b = adapter.scale * b.double()
    elif (factors := adapter.factors_on(binding.layer)) is not None:
        b, a = (f.detach() for f in factors)
    else:
        return _approximated(binding, wide_delta(binding), cut, stored)
    if cut.rank is not None and len(a) > cut.rank:
        return _approximated(binding, b.double() @ a.double(), cut, stored)
    kept = Factors(binding.name, binding.layer, a.to(stored), b.to(stored))
    return replace(kept, norm=product_norm(b, a), lost=product_norm(_beside(b, -kept.B), _above(a, kept.A)))


def _beside(b: Tensor, other: Tensor) -> Tensor:
    return torch.cat([b.double(), other.double()], 1)


def _above(a: Tensor, other: Tensor) -> Tensor:
    return torch.cat([a.double(), other.double()])


def product_norm(b: Tensor, a: Tensor) -> float:
    """``||B A||_F`` through the small triangular factors, so that a difference of equal products comes out near zero."""
    if not len(a):
        return 0.0
    left, right = torch.linalg.qr(b.double(), "r").R, torch.linalg.qr(a.double().mT, "r").R
    return float(torch.linalg.matrix_norm(left @ right.mT))


def _approximated(binding: Binding, delta: Tensor, cut: Cut, stored: torch.dtype) -> Factors:
    norm = float(torch.linalg.matrix_norm(delta))
    work = delta if stored == torch.float64 else delta.float()  # twice as fast, and the result is stored in float32
    limit = min(cut.rank or cut.most, *work.shape)
    if min(work.shape) > _EXACT_SVD_UP_TO:
        u, s, v = randomized_svd(work, limit, generator=torch.Generator().manual_seed(0))
    else:
        u, s, vh = torch.linalg.svd(work, full_matrices=False)
        v = vh.mT
    rank = _rank_for(s.double(), norm, cut, limit, torch.finfo(work.dtype).eps * max(work.shape))
    root = s[:rank].sqrt()
    b, a = (u[:, :rank] * root).to(stored), (root * v[:, :rank]).mT.to(stored)
    lost = float(torch.linalg.matrix_norm(delta - b.double() @ a.double()))
    return Factors(
        binding.name, binding.layer, a, b, exact=lost <= 1e-6 * max(norm, 1e-300), norm=norm, lost=min(lost, norm)
    )


def _rank_for(s: Tensor, norm: float, cut: Cut, limit: int, noise: float) -> int:
    """The wanted rank, but never directions that are rounding noise: an update of low rank is found to have it."""
    if not norm:
        return 0
    numerical = int((s > noise * s[0]).sum())
    if cut.rank is not None:
        return min(cut.rank, limit, numerical)
    enough = int((torch.cumsum(s.square(), 0) < cut.energy * norm**2).sum()) + 1
    return min(enough, limit, numerical)


def padded(entry: Factors, rank: int) -> Factors:
    """The same update at a higher rank, with zeros."""
    more = rank - entry.rank
    a = torch.cat([entry.A, entry.A.new_zeros(more, entry.A.shape[1])])
    b = torch.cat([entry.B, entry.B.new_zeros(entry.B.shape[0], more)], 1)
    return replace(entry, A=a, B=b)
