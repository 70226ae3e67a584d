"""The chain of low-rank approximations of arXiv 2406.03136 to the letter, kept to compare with: it is not what runs.

With ``exp(S) ~ U1 U2^T`` (L x k each), ``P ~ f = diag(1/den) U1 U2^T`` and every later matrix keeps a factorisation:

    q = G V^T                                rank d_v, exact
    p_1 = f o q = (U1/den (x) G)(U2 (x) V)^T       rank k d_v: a Hadamard product of factored matrices is the product of
                                               their row-wise Khatri-Rao products (x)
    p_2 = diag(rho) f                        rank k, rho_i = G_i . O_i
    dQ = scale (p_1 - p_2) K,  dK = scale (p_1 - p_2)^T Q,  dV = f^T G

Its time is O(L k d d_v) with a state of k d d_v numbers. The derivative of the approximate map itself, which
:mod:`rankloom.attention.engine` computes, costs O(L k (d + d_v)) at the same order of accuracy. (The chain puts one factorisation
in the place of ``exp`` everywhere, the engine its derivative: they agree where the factorisation is exact.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankloom.errors import AttentionError

__all__ = ["Cost", "chain_cost", "chain_gradients", "engine_cost", "khatri_rao"]


class Cost(NamedTuple):
    """Of forward and backward together."""

    flops: int
    state: int
    """Numbers in the largest sum over tokens."""


def khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """The row-wise Kronecker product of ``a`` (L, m) and ``b`` (L, n): (L, m n), where
    ``(a (x) b)(c (x) d)^T = (a c^T) o (b d^T)``."""
    return (a[:, :, None] * b[:, None, :]).flatten(1)


def chain_gradients(
    u1: Tensor, u2: Tensor, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``O``, ``dQ``, ``dK``, ``dV`` of one head without a mask, from ``exp(scale Q K^T) ~ u1 u2^T`` and ``G`` (L, d_v).

    Forms L x (k d_v) matrices: for small sizes. Raises ``AttentionError`` where the factorisation does not fit the head.
    """
    if u1.shape[1] != u2.shape[1] or len(u1) != len(q) or len(u2) != len(k):
        raise AttentionError(
            f"the factors of exp(S) are (queries, rank) and (keys, rank) for {len(q)} queries and {len(k)} keys; "
            f"got {tuple(u1.shape)} and {tuple(u2.shape)}"
        )
    f1 = u1 / (u1 @ u2.sum(0))[:, None]
    out = f1 @ (u2.mT @ v)
    rho = (grad * out).sum(1, keepdim=True)
    left, right = torch.cat([khatri_rao(f1, grad), -rho * f1], 1), torch.cat([khatri_rao(u2, v), u2], 1)
    return out, scale * left @ (right.mT @ k), scale * right @ (left.mT @ q), u2 @ (f1.mT @ grad)


def chain_cost(length: int, width: int, dim: int, values: int) -> Cost:
    """Two products for the output, two for ``dV``, and two with ``k (d_v + 1)`` columns against ``d`` for each of dQ and dK."""
    rank = width * (values + 1)
    return Cost(2 * length * (4 * width * values + 4 * rank * dim), rank * dim)


def engine_cost(length: int, width: int, dim: int, values: int) -> Cost:
    """Six products with ``d_v + 1`` columns; features take one multiplication each in four passes, four in two pulls back."""
    return Cost(length * width * (12 * (values + 1) + 12), width * (values + 1))
