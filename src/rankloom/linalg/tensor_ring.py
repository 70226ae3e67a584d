"""Tensor rings: matrices and factors as closed chains of small cores.

A ring matrix of cores ``A_d`` (I_d, J_d, R, R) is ``T[(i_1..i_D), (j_1..j_D)] = tr(A_1[i_1, j_1] ... A_D[i_D, j_D])``. Here its
cores are ``delta_ij M_d + E_d`` with ``tr(M_1 ... M_D) = 1``: ``T = I`` at ``E = 0``, and the change ``T - I`` is formed from the
``E_d`` that have moved,

    T - I = sum_d tr( A_1 .. A_{d-1} E_d M_{d+1} .. M_D ),

or with the ``M`` before and the ``A`` behind, so that it is zero exactly, and small without cancellation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from rankloom.linalg.kronecker import kronecker_sum

__all__ = [
    "chain",
    "mode_sizes",
    "ring_change",
    "ring_identity_penalty",
    "ring_orthogonality_penalty",
    "ring_terms",
]


def mode_sizes(dimension: int, modes: int) -> tuple[int, ...]:
    """``modes`` factors, near balanced, of ``dimension``, or of the least number above it that has such factors.

    No factor is above twice the balanced one, so a prime dimension is padded instead of being a core by itself.
    """
    for padded in range(dimension, 2 * dimension + 2**modes):
        sizes, rest, divisor = [1] * modes, padded, 2
        primes = []
        while divisor * divisor <= rest:
            while rest % divisor == 0:
                primes.append(divisor)
                rest //= divisor
            divisor += 1
        primes += [rest] * (rest > 1)
        for prime in reversed(primes):
            sizes[sizes.index(min(sizes))] *= prime
        if max(sizes) <= 2 * -(-(padded ** (1 / modes)) // 1):
            return tuple(sorted(sizes))
    raise AssertionError("a power of two is always among them")


def chain(cores: Sequence[Tensor]) -> Tensor:
    """``B_1[i_1] ... B_D[i_D]`` (prod I_d, R, R) of cores (I_d, R, R), the first index slowest."""

    def joined(left: Tensor, core: Tensor) -> Tensor:
        product = left.flatten(0, 1) @ core.transpose(0, 1).flatten(1)
        return product.view(*left.shape[:2], len(core), -1).transpose(1, 2).flatten(0, 1)

    return reduce(joined, cores)


def ring_terms(cores: Sequence[Tensor], bonds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``T - I = sum_k U_k (x) V_k + I (x) E``: ``R^2`` terms (t, L, L) and (t, I_D, I_D), and ``E`` (I_D, I_D).

    With ``c_d = A_1 .. A_d - M_1 .. M_d`` for the first d modes, ``c_d = c_{d-1} A_d + M_1 .. M_{d-1} E_d``: the last mode closes
    the ring, each slice of ``c_{D-1}`` beside one of ``A_D``, and the identity beside ``tr(M_1 .. M_{D-1} E_D)``. A single core
    has no terms.
    """
    before = torch.eye(bonds.shape[-1], dtype=bonds.dtype, device=bonds.device)
    changed: Tensor | None = None  # (L, L, R, R)
    for core, bond in zip(cores[:-1], bonds[:-1], strict=True):
        fresh = before @ core
        if changed is not None:
            whole = core + _identity(core)[:, :, None, None] * bond
            apart = _identity(changed)[:, None, :, None, None, None] * fresh[None, :, None]
            changed = (torch.einsum("abxr,ijrs->aibjxs", changed, whole) + apart).flatten(2, 3).flatten(0, 1)
        else:
            changed = fresh
        before = before @ bond
    last = cores[-1]
    alone = torch.einsum("xr,ijrx->ij", before, last)
    if changed is None:
        return alone.new_empty(0, 1, 1), alone.expand(0, -1, -1), alone
    closing = last + _identity(last)[:, :, None, None] * bonds[-1]
    return changed.permute(2, 3, 0, 1).flatten(0, 1), closing.permute(3, 2, 0, 1).flatten(0, 1), alone


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def ring_change(cores: Sequence[Tensor], bonds: Tensor) -> Tensor:
    """``T - I`` (N, N) of ``E_d`` (I_d, I_d, R, R) and ``M`` (D, R, R), ``N = prod I_d``."""
    left, right, alone = ring_terms(cores, bonds)
    terms = torch.cat([left, torch.eye(left.shape[1], dtype=left.dtype, device=left.device)[None]])
    return kronecker_sum(terms, torch.cat([right, alone[None]]))


def ring_identity_penalty(cores: Sequence[Tensor], bonds: Tensor) -> Tensor:
    """``||T - I||_F^2`` from the cores: ``T - I`` is a ring itself, of the blocks ``[[A_d, E_d], [0, M_d]]``, opened once."""
    rank = bonds.shape[-1]
    doubled = []
    for core, bond in zip(cores, bonds, strict=True):
        eye = torch.eye(len(core), dtype=core.dtype, device=core.device)[:, :, None, None]
        zero = torch.zeros_like(core)
        rows = torch.cat([eye * bond + core, core], -1), torch.cat([zero, eye * bond + zero], -1)
        doubled.append(_squared(torch.cat(rows, -2)))
    closing = torch.zeros(2 * rank, 2 * rank, dtype=bonds.dtype, device=bonds.device)
    closing[rank:, :rank] = torch.eye(rank, dtype=bonds.dtype, device=bonds.device)
    return (reduce(torch.matmul, doubled) * torch.kron(closing, closing).mT).sum()


def ring_orthogonality_penalty(cores: Sequence[Tensor], bonds: Tensor) -> Tensor:
    """``||T^T T - I||_F^2 = ||T^T T||_F^2 - 2 ||T||_F^2 + N`` from the cores; ``T^T T`` is a ring of rank ``R^2``."""
    single, double, width = [], [], 1
    for core, bond in zip(cores, bonds, strict=True):
        whole = torch.eye(len(core), dtype=core.dtype, device=core.device)[:, :, None, None] * bond + core
        gram = torch.einsum("ijrs,iltu->jlrtsu", whole, whole).flatten(4, 5).flatten(2, 3)
        single.append(_squared(whole))
        double.append(_squared(gram))
        width *= len(core)
    return reduce(torch.matmul, double).trace() - 2 * reduce(torch.matmul, single).trace() + width


def _squared(core: Tensor) -> Tensor:
    """``sum_ij A[i, j] (x) A[i, j]`` (R^2, R^2)."""
    return torch.einsum("ijrs,ijtu->rtsu", core, core).flatten(2, 3).flatten(0, 1)
