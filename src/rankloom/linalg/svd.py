"""Truncated singular value decompositions, exact and randomised."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_rank", "orthonormal", "randomized_svd", "truncated_svd", "two_sided_svd"]


def _working(matrix: Tensor) -> Tensor:
    """LAPACK has no half precision: decompose in float32, or in float64 where that is what came in."""
    return matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()


def orthonormal(matrix: Tensor) -> Tensor:
    """``Q`` (m, k) with orthonormal columns spanning the columns of ``matrix`` (m, k), ``k <= m``; QR, never half precision."""
    return torch.linalg.qr(_working(matrix)).Q


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U`` (m, r), ``S`` (r,), ``V`` (n, r) with ``matrix ~ U diag(S) V^T``, the best rank-r approximation (Eckart-Young).

    Signs follow a convention (see :func:`fix_signs`), so rescaling a matrix does not flip its vectors.
    """
    u, s, vh = torch.linalg.svd(_working(matrix), full_matrices=False)
    u, v = fix_signs(u[:, :rank], vh[:rank].mT)
    return u, s[:rank], v


def fix_signs(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Flip pairs of columns so that the largest entry of each column of ``u`` is positive; ``u v^T`` stays the same."""
    sign = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, v * sign


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
    u, v = fix_signs(basis @ u, v)
    return u, s, v


def best_rank(matrix: Tensor, rank: int) -> Tensor:
    """The best rank-r approximation of ``matrix`` (m, n), dense."""
    u, s, v = truncated_svd(matrix, rank)
    return (u * s) @ v.mT


def two_sided_svd(
    left: Tensor, right: Tensor, image: Tensor, coimage: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading triplets of a matrix ``G`` (m, n) known only through two thin products.

    ``left`` ``Q`` (m, k) and ``right`` ``P`` (n, k) have orthonormal columns, ``image`` is ``Y = G P``, ``coimage`` is
    ``Z = G^T Q``. They determine all of ``G`` but what both bases miss:

        G = Q Z^T + Y P^T - Q C P^T + (I - Q Q^T) G (I - P P^T),   C = Q^T G P.

    The last term is small in both factors and left out; the rest has rank 2k, and its SVD is found in the bases
    ``[Q, Y]`` and ``[P, Z]``, so both subspaces are one multiplication with ``G`` ahead of the bases that made them.
    """
    core = (left.mT @ image + coimage.mT @ right) / 2
    q, p = orthonormal(torch.cat([left, image], 1)), orthonormal(torch.cat([right, coimage], 1))
    q_left, p_right = q.mT @ left, p.mT @ right
    small = q_left @ (p.mT @ coimage).mT + (q.mT @ image) @ p_right.mT - q_left @ core @ p_right.mT
    u, s, v = truncated_svd(small, rank)
    u, v = fix_signs(q @ u, p @ v)
    return u, s, v
