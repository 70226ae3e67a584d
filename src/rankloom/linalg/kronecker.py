"""Sums of Kronecker products, and the best one for a matrix (Van Loan and Pitsianis, 1993).

``(U (x) V)[(a, b), (c, d)] = U[a, c] V[b, d]``: the first factor's indices are the slow ones, as in ``torch.kron``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankloom.linalg.svd import leading_svd

__all__ = [
    "balanced_sides",
    "divisors",
    "elbow",
    "energy_rank",
    "kronecker_sum",
    "kronecker_svd",
    "rearranged",
    "recompressed",
]


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def balanced_sides(fan_out: int, fan_in: int) -> tuple[int, int]:
    """The shape ``(m, n)`` of the first factor, ``m | out`` and ``n | in``, with which a term has the fewest parameters.

    ``mn + pq`` is at least ``2 sqrt(out in)``, reached at ``mn = pq``. Among equals the highest rank a term may have,
    ``min(m, n) min(p, q)``, decides, then the smallest ``m``. It is never above ``out + in``: where the dimensions have no
    divisors, ``m = out, n = 1`` is left, and a term is a product of a column and a row.
    """

    def cost(sides: tuple[int, int]) -> tuple[int, int, int]:
        m, n = sides
        p, q = fan_out // m, fan_in // n
        return m * n + p * q, -min(m, n) * min(p, q), m

    return min(((m, n) for m in divisors(fan_out) for n in divisors(fan_in)), key=cost)


def kronecker_sum(left: Tensor, right: Tensor) -> Tensor:
    """``sum_k U_k (x) V_k`` (m p, n q) of ``left`` (r, m, n) and ``right`` (r, p, q)."""
    (_, m, n), (_, p, q) = left.shape, right.shape
    return (left.flatten(1).mT @ right.flatten(1)).view(m, n, p, q).transpose(1, 2).reshape(m * p, n * q)


def rearranged(matrix: Tensor, m: int, n: int) -> Tensor:
    """``R`` (m n, p q) of a matrix (m p, n q), with which ``R(U (x) V) = vec(U) vec(V)^T``."""
    p, q = matrix.shape[0] // m, matrix.shape[1] // n
    return matrix.reshape(m, p, n, q).transpose(1, 2).reshape(m * n, p * q)


def kronecker_svd(
    matrix: Tensor, m: int, n: int, rank: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """``U`` (r, m, n), ``S`` (r,), ``V`` (r, p, q): the best sum of r terms ``S_k U_k (x) V_k`` in Frobenius norm.

    The SVD of :func:`rearranged`: factors are orthonormal among themselves, and the squared error is the sum of the
    discarded ``S^2``. The fourth value is the share of the best energy captured, see :func:`leading_svd`.
    """
    u, s, v, captured = leading_svd(rearranged(matrix, m, n), rank, generator=generator)
    p, q = matrix.shape[0] // m, matrix.shape[1] // n
    return u.mT.reshape(-1, m, n), s, v.mT.reshape(-1, p, q), captured


def recompressed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U`` (k, m, n), ``S`` (k,), ``V`` (k, p, q) of a sum of terms ``left`` (t, m, n), ``right`` (t, p, q): what
    :func:`kronecker_svd` gives of it, without forming it.

    From the t x t product of two triangular factors, ``R(sum_k U_k (x) V_k) = Q_l R_l R_r^T Q_r^T``; k is at most t.
    """
    (q_left, r_left), (q_right, r_right) = (torch.linalg.qr(factor.flatten(1).mT) for factor in (left, right))
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return (q_left @ u).mT.reshape(-1, *left.shape[1:]), s, (q_right @ vh.mT).mT.reshape(-1, *right.shape[1:])


def energy_rank(values: Tensor, share: float) -> int:
    """The least r with ``sum_{k <= r} s_k^2 >= share * sum s_k^2``; 1 for a matrix of zeros."""
    energy = torch.cumsum(values.double().square(), 0)
    return min(int((energy < share * energy[-1]).sum()) + 1, len(values))


def elbow(values: Tensor) -> int:
    """Where a falling curve bends: the number of values up to the point farthest below the chord between its ends."""
    s = values.double()
    if len(s) < 3 or s[0] == s[-1]:
        return 1
    chord = torch.linspace(1, 0, len(s), dtype=s.dtype, device=s.device)
    return int((chord - (s - s[-1]) / (s[0] - s[-1])).argmax()) + 1
