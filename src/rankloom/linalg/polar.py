"""The orthogonal factor of a matrix without its singular value decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["polar_factor"]

_LIFT = (3.4445, -4.7750, 2.0315)  # takes small singular values up by 3.4 a step, and holds the others in [0.67, 1.21]
_SETTLE = (15 / 8, -10 / 8, 3 / 8)  # takes those to 1, with cubic convergence


@torch.no_grad()
def polar_factor(matrix: Tensor, lifts: int = 10, settles: int = 4) -> Tensor:
    """``U V^T`` (m, n) of ``Z = U S V^T``, which is the gradient of the nuclear norm, by Newton-Schulz iteration.

    Each step is an odd polynomial ``a X + b X X^T X + c (X X^T)^2 X`` of degree five: three products, no decomposition. With
    ten lifts, singular values above ``5e-6 ||Z||_F`` come out as one; smaller ones come out smaller, zero stays zero.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.mT
    x = x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)
    for a, b, c in (_LIFT,) * lifts + (_SETTLE,) * settles:
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
