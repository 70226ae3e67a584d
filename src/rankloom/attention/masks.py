"""Which attention masks are plain: causal or not, on one unbroken run of keys a sequence (padding before or after it)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Plain", "plain"]

_ROWS = 1024  # compared at once: the check must not need another L x L tensor


@dataclass(frozen=True)
class Plain:
    """Attention inside each sequence's own range: ``ranges[b] = (start, stop)`` of batch row ``b``."""

    causal: bool
    ranges: tuple[tuple[int, int], ...]

    @property
    def shortest(self) -> int:
        """The length of the shortest sequence."""
        return min(stop - start for start, stop in self.ranges)


def plain(mask: Tensor | None, *, causal: bool, batch: int, length: int) -> Plain | None:
    """What a mask amounts to, or ``None`` where that is more than causality and padding.

    Args:
        mask: ``None``, or (batch or 1, 1, length, length): boolean, true where a query sees a key, or additive, 0 there
            and the dtype's minimum or less elsewhere.
        causal: whether attention is causal where there is no mask; a mask says that itself.
        batch: number of sequences.
        length: of queries and keys.
    """
    if mask is None:
        return Plain(causal, ((0, length),) * batch)
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or tuple(mask.shape[1:]) != (1, length, length):
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return None
    mask = mask[:, 0]
    valid = _allowed(mask[:, -1])  # every key of the sequence: the last query sees them all, causal or not
    start = valid.int().argmax(1)
    stop = start + valid.sum(1)
    position = torch.arange(length, device=mask.device)
    if not bool(valid.any(1).all()) or not torch.equal(
        valid, (position >= start[:, None]) & (position < stop[:, None])
    ):
        return None
    causal = not torch.equal(_allowed(mask[torch.arange(len(mask), device=mask.device), start]), valid)
    for begin in range(0, length, _ROWS):
        rows = mask[:, begin : begin + _ROWS]
        at = position[begin : begin + _ROWS]
        expected = valid[:, None, :] & (position <= at[:, None]) if causal else valid[:, None, :].expand_as(rows)
        wrong = _allowed(rows) != expected
        if mask.dtype != torch.bool:
            wrong |= ~expected & (rows > torch.finfo(rows.dtype).min)
        if bool(wrong.any()):
            return None
    found = tuple((int(a), int(b)) for a, b in zip(start, stop, strict=True))
    return Plain(causal, found * (batch // len(found)))


def _allowed(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.bool else rows == 0
