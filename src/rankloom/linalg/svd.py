"""Truncated singular value decompositions, exact and randomised."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_rank", "orthonormal", "randomized_svd", "truncated_svd"]


def _working(matrix: Tensor) -> Tensor:
    """LAPACK has no half precision: decompose in float32, or in float64 where that is what came in."""
    return matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()


def orthonormal(matrix: Tensor) -> Tensor:
    """``Q`` (m, k) with orthonormal columns spanning the columns of ``matrix`` (m, k), ``k <= m``; QR, never half precision."""
    return torch.linalg.qr(_working(matrix)).Q


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U`` (m, r), ``S`` (r,), ``V`` (n, r) with ``matrix ~ U diag(S) V^T``, the best rank-r approximation (Eckart-Young)."""
    u, s, vh = torch.linalg.svd(_working(matrix), full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].mT


def randomized_svd(
    matrix: Tensor, rank: int, *, oversample: int = 24, power: int = 2, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`truncated_svd`, by subspace iteration on a random start (Halko, Martinsson, Tropp, arXiv 0909.4061).

    The width ``rank + oversample`` is cut to ``min(m, n)``, so small layers are safe; ``generator`` makes it repeatable.
    """
    work = _working(matrix)
    width = min(rank + oversample, *work.shape)
    start = torch.randn(work.shape[1], width, generator=generator, dtype=work.dtype).to(work.device)
    basis = orthonormal(work @ start)
    for _ in range(power):
        basis = orthonormal(work @ orthonormal(work.mT @ basis))
    u, s, v = truncated_svd(basis.mT @ work, rank)
    return basis @ u, s, v


def best_rank(matrix: Tensor, rank: int) -> Tensor:
    """The best rank-r approximation of ``matrix`` (m, n), dense."""
    u, s, v = truncated_svd(matrix, rank)
    return (u * s) @ v.mT
