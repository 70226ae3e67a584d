"""Truncated singular value decompositions, exact and randomised."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_rank", "fix_signs", "leading_svd", "orthonormal", "randomized_svd", "truncated_svd", "two_sided_svd"]

_GRAM_UP_TO = (
    2048  # the smaller side: one eigendecomposition of its Gram matrix; beyond it subspace iteration is cheaper
)


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


def leading_svd(
    matrix: Tensor, rank: int, *, tolerance: float = 1e-3, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """As :func:`truncated_svd` at a fraction of its time, and the share of the best rank-r energy ``||.||_F^2`` captured.

    Up to a smaller side of 2048 the subspace comes from the eigenvectors of the smaller Gram matrix and the triplets from
    the projection on it: exact (1.0) while ``s_r`` is well above ``sqrt(eps) s_1``, which is checked, and otherwise left to
    :func:`truncated_svd`. Larger matrices take subspace iterations of width ``rank + 24`` until the estimated captured
    share, which continues the last gain in energy as a geometric series, is at least ``1 - tolerance``.
    """
    work = _working(matrix)
    if min(work.shape) > _GRAM_UP_TO:
        return _until_captured(work, rank, tolerance, generator)
    tall = work.shape[0] > work.shape[1]
    small = work.mT if tall else work
    basis = torch.linalg.eigh(small @ small.mT).eigenvectors[:, -rank:]
    u, s, v = truncated_svd(basis.mT @ small, rank)
    if not s[-1] > torch.finfo(s.dtype).eps ** 0.25 * s[0]:
        return (*truncated_svd(work, rank), 1.0)
    u, v = fix_signs(v, basis @ u) if tall else fix_signs(basis @ u, v)
    return u, s, v, 1.0


def _until_captured(
    work: Tensor, rank: int, tolerance: float, generator: torch.Generator | None, most: int = 64
) -> tuple[Tensor, Tensor, Tensor, float]:
    width = min(rank + 24, *work.shape)
    start = torch.randn(work.shape[1], width, generator=generator, dtype=work.dtype).to(work.device)
    basis, energies, captured = orthonormal(work @ start), [0.0], 0.0
    for _ in range(most):
        inner, s, v = truncated_svd(basis.mT @ work, width)
        energies.append(float(s[:rank].double().square().sum()))
        if len(energies) > 2:
            gain, before = energies[-1] - energies[-2], energies[-2] - energies[-3]
            ratio = min(max(gain / before, 0.1), 0.95) if before > 0 else 0.1
            captured = energies[-1] / (energies[-1] + max(gain, 0.0) * ratio / (1 - ratio)) if energies[-1] else 1.0
            if captured >= 1 - tolerance:
                break
        basis = orthonormal(work @ v)
    u, v = fix_signs(basis @ inner[:, :rank], v[:, :rank])
    return u, s[:rank], v, captured


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
