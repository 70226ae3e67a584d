"""Dense rows of attention from an approximation's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from rankloom.attention.contract import Approximation

__all__ = ["weights"]


def weights(approximation: Approximation, q: Tensor, at: Tensor, k: Tensor) -> Tensor:
    """The normalised rows (m, L) of queries ``q`` (m, d) at ``at`` (m,) over the keys ``k`` (L, d)."""
    kernel = approximation.kernel(k, torch.arange(len(k)), k)(q, at)
    return kernel / kernel.sum(-1, keepdim=True)
