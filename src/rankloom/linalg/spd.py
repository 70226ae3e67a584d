"""Small symmetric positive matrices, batched: what preconditioners do with r x r Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["damped", "spd_inverse", "spd_sylvester"]


def damped(gram: Tensor, ridge: float, *, relative: bool = False) -> Tensor:
    """``K + delta I`` for ``K`` (..., r, r) positive semidefinite; ``delta = ridge``, or ``ridge tr(K) / r`` where relative.

    ``delta`` never falls below the rounding of ``K`` itself, so the result has a Cholesky factor even for ``K = 0`` or a
    rank-deficient ``K`` without a ridge.
    """
    info = torch.finfo(gram.dtype)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    wanted = ridge * trace / gram.shape[-1] if relative else torch.full_like(trace, ridge)
    delta = torch.maximum(wanted, 4 * info.eps * trace + info.tiny**0.5)
    return gram + torch.diag_embed(delta[..., None].expand(gram.shape[:-1]))


def spd_inverse(matrix: Tensor) -> Tensor:
    """The inverse of a symmetric positive definite matrix (..., r, r), by Cholesky."""
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def spd_sylvester(p: Tensor, q: Tensor, c: Tensor) -> Tensor:
    """``X`` with ``P X + X Q = C`` for symmetric positive definite ``P`` (..., m, m) and ``Q`` (..., n, n).

    In both eigenbases the equation is diagonal: ``X = U [ (U^T C V) / (p_i + q_j) ] V^T``.
    """
    (lp, u), (lq, v) = torch.linalg.eigh(p), torch.linalg.eigh(q)
    return u @ ((u.mT @ c @ v) / (lp[..., :, None] + lq[..., None, :])) @ v.mT
