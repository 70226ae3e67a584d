"""Angles between subspaces."""

from __future__ import annotations

import torch
from torch import Tensor

from rankloom.linalg.svd import orthonormal

__all__ = ["principal_angles"]


def principal_angles(one: Tensor, other: Tensor) -> Tensor:
    """The principal angles between the column spans of ``one`` (n, j) and ``other`` (n, k), ascending, in radians.

    ``min(j, k)`` angles in [0, pi/2]: all 0 where one span holds the other, pi/2 for directions orthogonal to it. The
    columns have to be linearly independent. Each angle is taken from its sine and its cosine together (Bjorck and Golub,
    1973): the cosine alone loses half the digits of a small angle.
    """
    p, q = orthonormal(one), orthonormal(other)
    if p.shape[1] < q.shape[1]:
        p, q = q, p
    inner = p.mT @ q
    cosine = torch.linalg.svdvals(inner)
    sine = torch.linalg.svdvals(q - p @ inner).flip(-1)
    return torch.atan2(sine, cosine)
