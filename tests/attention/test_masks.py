"""Masks that amount to causality and padding, and those that do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankloom.attention.masks import Plain, plain

LENGTH = 9
RANGES = ((0, 9), (0, 5), (3, 9), (2, 7))


def dense(ranges: tuple[tuple[int, int], ...], causal: bool) -> Tensor:
    """The boolean mask that transformers makes of causality and a padding mask."""
    at = torch.arange(LENGTH)
    valid = torch.stack([(at >= a) & (at < b) for a, b in ranges])
    allowed = valid[:, None, None, :].expand(-1, 1, LENGTH, LENGTH)
    return allowed & (at <= at[:, None]) if causal else allowed


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("additive", [True, False])
def test_padding_on_either_side_is_plain(causal: bool, additive: bool) -> None:
    mask = dense(RANGES, causal)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    found = plain(mask, causal=not causal, batch=4, length=LENGTH)
    assert found == Plain(causal, RANGES)
    assert found.shortest == 5


def test_no_mask_is_what_the_caller_says() -> None:
    assert plain(None, causal=True, batch=2, length=4) == Plain(True, ((0, 4), (0, 4)))


def test_one_mask_serves_a_whole_batch() -> None:
    assert plain(dense(((2, 7),), True), causal=True, batch=3, length=LENGTH) == Plain(True, ((2, 7),) * 3)


def holes() -> Tensor:
    mask = dense(RANGES, False).clone()
    mask[0, :, :, 4] = False
    return mask


def window() -> Tensor:
    at = torch.arange(LENGTH)
    return dense(RANGES, True) & (at > at[:, None] - 4)


def packed() -> Tensor:
    document = torch.arange(LENGTH) // 4
    return dense(((0, 9),), True) & (document == document[:, None])


def one_more() -> Tensor:
    mask = dense(RANGES, True).clone()
    mask[0, 0, 3, 6] = True
    return mask


def bias() -> Tensor:
    return -torch.arange(LENGTH).sub(torch.arange(LENGTH)[:, None]).abs().float()[None, None]


@pytest.mark.parametrize(
    "mask",
    [
        holes(),
        window(),
        packed(),
        one_more(),
        bias(),
        dense(RANGES, True)[:, 0],
        dense(RANGES, True).expand(-1, 2, -1, -1),
        dense(RANGES, True)[..., :8],
        dense(RANGES, True).int(),
        dense(RANGES[:3], True),
        torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool),
    ],
    ids=["holes", "window", "packed", "one-more", "bias", "3-D", "by-head", "shape", "integer", "batch", "empty"],
)
def test_everything_else_is_not_plain(mask: Tensor) -> None:
    assert plain(mask, causal=True, batch=4, length=LENGTH) is None
