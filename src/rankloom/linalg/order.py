"""Order statistics of many numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kth_smallest"]

SAMPLE = 1 << 13
SPARED = 1 << 17  # numbers below which a plain selection is as fast
STRIDE = 0x9E3779B1  # spreads the sample evenly, whatever period the numbers have


@torch.no_grad()
def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The ``k``-th smallest (1-based) of flat ``values``, exactly.

    A sample brackets it within four standard deviations (Floyd and Rivest, 1975); what is below is counted, and only what is
    inside is put in order. A bracket that missed costs a plain selection.
    """
    n = values.numel()
    if n < SPARED:
        return values.kthvalue(k).values
    sample = values[(torch.arange(SAMPLE, device=values.device) * STRIDE) % n].sort().values
    at, spread = k / n * SAMPLE, 4 * (SAMPLE * k / n * (1 - k / n)) ** 0.5 + 1
    low, high = sample[max(int(at - spread), 0)], sample[min(int(at + spread), SAMPLE - 1)]
    below, inside = int(torch.count_nonzero(values < low)), values[(values >= low) & (values <= high)]
    if below < k <= below + len(inside):
        return inside.kthvalue(k - below).values
    return values.kthvalue(k).values
