"""Projectors: the subspace a projected optimizer keeps its state in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rankloom.linalg import randomized_svd, truncated_svd

__all__ = ["Projection", "SVDProjector"]


@dataclass
class Projection:
    """An orthonormal basis of the shorter side of a matrix (m, n).

    ``right`` (m >= n): ``basis`` (n, r), ``R = G basis`` (m, r). Left: ``basis`` (m, r), ``R = basis^T G`` (r, n).
    """

    basis: Tensor
    right: bool

    def down(self, matrix: Tensor) -> Tensor:
        """Coordinates of a full matrix in the subspace."""
        basis = self.basis.to(matrix.dtype)
        return matrix @ basis if self.right else basis.mT @ matrix

    def up(self, low: Tensor) -> Tensor:
        """The full matrix with these coordinates."""
        basis = self.basis.to(low.dtype)
        return low @ basis.mT if self.right else basis @ low

    def carry(self, moment: Tensor, old: Projection, *, squared: bool) -> Tensor:
        """A moment's coordinates moved from ``old``'s basis to this one; second moments through the squared rotation."""
        turn = (old.basis.mT @ self.basis).to(moment.dtype)
        turn = turn.square() if squared else turn
        return moment @ turn if self.right else turn.mT @ moment


@dataclass(frozen=True)
class SVDProjector:
    """The leading singular vectors of the current gradient, on its shorter side (GaLore's ``std``)."""

    rank: int
    method: Literal["exact", "randomized"] = "exact"

    def shape(self, matrix: Tensor) -> tuple[int, int]:
        """Shape of the projected matrix: ``max(m, n) * r`` entries."""
        m, n = matrix.shape
        rank = min(self.rank, m, n)
        return (m, rank) if m >= n else (rank, n)

    def fit(self, gradient: Tensor, generator: torch.Generator | None = None) -> Projection:
        """The projection for a gradient; float32 at least, whatever the gradient's dtype."""
        right = gradient.shape[0] >= gradient.shape[1]
        rank = min(self.rank, *gradient.shape)
        if self.method == "exact":
            u, _, v = truncated_svd(gradient, rank)
        else:
            u, _, v = randomized_svd(gradient, rank, generator=generator)
        return Projection((v if right else u).contiguous(), right)
