"""Kronecker sums that meet rows: both ways against the dense sum and its autograd, the choice between them, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rankloom.kernels import kronecker_blocks, kronecker_rows, kronecker_rows_macs

SIZES = [(4, 6, 4, 24), (4, 6, 4, 23), (0, 1, 5, 5), (1, 1, 7, 6), (3, 5, 1, 5)]


def factors(terms: int, m: int, p: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (terms, m, m), (terms, p, p), (p, p)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def dense(left: Tensor, right: Tensor, alone: Tensor, width: int) -> Tensor:
    """The definition, written out."""
    total = torch.kron(torch.eye(left.shape[1], dtype=alone.dtype), alone)
    for u, v in zip(left, right, strict=True):
        total = total + torch.kron(u, v)
    return total[:width, :width]


def distance(got: Tensor, want: Tensor) -> float:
    return float(((got.float() - want).norm() / want.norm()).detach())


@pytest.fixture(params=["terms", "sum"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kronecker_blocks, "_summed", lambda *_: request.param == "sum")
    return str(request.param)


@pytest.mark.parametrize(("terms", "m", "p", "width"), SIZES)
@pytest.mark.parametrize(("needs_x", "keep"), [(True, False), (True, True), (False, True)])
def test_both_ways_are_the_dense_sum(
    way: str, monkeypatch: pytest.MonkeyPatch, terms: int, m: int, p: int, width: int, needs_x: bool, keep: bool
) -> None:
    monkeypatch.setattr(kronecker_blocks, "BLOCK", 1)  # several blocks
    sides = factors(terms, m, p)
    x = torch.randn(130, width, dtype=torch.float64, requires_grad=needs_x)
    pull = torch.randn(width, 130, dtype=torch.float64).mT  # not contiguous, as gradients may be
    got, want = kronecker_rows(x, *sides, keep=keep), x @ dense(*sides, width).mT
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    asked = [*([x] if needs_x else []), *(side for side in sides if side.numel())]
    found, true = (torch.autograd.grad(y, asked, pull) for y in (got, want))
    for one, other in zip(found, true, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_factors_of_zeros_give_zeros_and_wide_factors_wide_gradients(way: str) -> None:
    x = torch.randn(70, 24, dtype=torch.bfloat16)
    left, right, alone = factors(4, 6, 4, torch.float32)
    assert not kronecker_rows(x, torch.zeros_like(left), right, torch.zeros_like(alone)).any()
    out = kronecker_rows(x, left, right, alone)
    want = x.float() @ dense(left, right, alone, 24).mT
    assert out.dtype == torch.bfloat16 and distance(out, want) < 0.02
    pull = torch.randn(70, 24).bfloat16()
    found = torch.autograd.grad(out, [left, right, alone], pull)
    true = torch.autograd.grad(want, [left, right, alone], pull.float())
    for one, other in zip(found, true, strict=True):
        assert one.dtype == torch.float32 and distance(one, other) < 0.02


def test_many_terms_are_summed_for_many_rows() -> None:
    def macs(rows: int, terms: int, dtype: torch.dtype = torch.float32) -> int:
        return kronecker_rows_macs(rows, terms, 96, 16, dtype)

    assert macs(1000, 4) == int(1.8 * 1000 * 1536 * (4 * 112 + 16))
    assert macs(1000, 4, torch.bfloat16) == int(2.6 * 1000 * 1536 * (4 * 112 + 16))
    assert macs(1000, 10) == (1000 + 10 + 1) * 1536**2
    assert macs(5, 10) == int(1.8 * 5 * 1536 * (10 * 112 + 16))  # few rows do not pay for the sum
    seen = [kronecker_blocks._summed(torch.empty(rows, 24), *factors(4, 6, 4)) for rows in (1, 1000)]
    assert seen == [False, True]


@pytest.mark.parametrize("keep", [False, True])
def test_the_input_is_kept_and_what_lies_between_where_asked(way: str, keep: bool) -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    sides, x = factors(4, 6, 4), torch.randn(70, 24, dtype=torch.float64, requires_grad=True)
    unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        kronecker_rows(x, *sides, keep=keep)
    between = 4 * x.numel() if keep and way == "terms" else 0
    assert sum(kept) == x.numel() + sum(side.numel() for side in sides) + between
