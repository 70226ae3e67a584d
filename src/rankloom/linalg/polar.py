"""The orthogonal factor of a matrix without its singular value decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["polar_factor"]

FLOOR = 5e-6  # of the Frobenius norm: where singular values count as one from

_LIFT = (3.4445, -4.7750, 2.0315)  # takes small singular values up by 3.4 a step, and holds the others in [0.67, 1.21]
_SETTLE = (15 / 8, -10 / 8, 3 / 8)  # takes those to 1, with cubic convergence


@torch.no_grad()
def polar_factor(matrix: Tensor) -> Tensor:
    """``U V^T`` (m, n) of ``Z = U S V^T``, which is the gradient of the nuclear norm.

    Singular values above ``5e-6 ||Z||_F`` come out as one; smaller ones come out smaller, zero stays zero. On processors,
    by eigenvalues of the smaller Gram matrix; by products alone on devices, where decompositions are slow, and in float64, which
    leaves no wider type for the Gram matrix.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    decomposed = matrix.device.type == "cpu" and matrix.dtype != torch.float64
    found = _by_eigenvalues(wide) if decomposed else _by_products(wide)
    return found if wide is matrix else found.mT


def _by_eigenvalues(x: Tensor) -> Tensor:
    """``(X X^T)^(-1/2) X`` of a wide ``X``; in float64, since the Gram matrix has its singular values squared."""
    exact = x.double()
    values, vectors = torch.linalg.eigh(exact @ exact.mT)
    size = values.sum().sqrt()
    roots = values.clamp(min=0).sqrt().clamp(min=float(FLOOR * size))
    return ((vectors / roots) @ (vectors.mT @ exact)).to(x.dtype) if size > 0 else torch.zeros_like(x)


def _by_products(x: Tensor, lifts: int = 10, settles: int = 4) -> Tensor:
    """Newton-Schulz iteration: each step is an odd polynomial ``a X + b X X^T X + c (X X^T)^2 X``, three products."""
    x = x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)
    for a, b, c in (_LIFT,) * lifts + (_SETTLE,) * settles:
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
