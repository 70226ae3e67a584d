"""Kernels, decompositions and decisions over random shapes and values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankloom.kernels import dora_linear, lowrank_linear
from rankloom.linalg import best_rank, orthonormal, randomized_svd, truncated_svd
from rankloom.optim import SVDProjector
from rankloom.rank.adalora import decide
from rankloom.rank.importance import budget_at

size = st.integers(1, 9)
seeds = st.integers(0, 2**16)
quick = settings(max_examples=60, deadline=None)


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(seeds, st.lists(st.integers(0, 4), min_size=1, max_size=3), size, size, size, st.floats(-4, 4), st.booleans())
def test_kernels_equal_the_dense_product(
    seed: int, lead: list[int], fan_in: int, fan_out: int, rank: int, scale: float, bias: bool
) -> None:
    x, w, a, b = (
        rand(seed, *lead, fan_in),
        rand(seed + 1, fan_out, fan_in),
        rand(seed + 2, rank, fan_in),
        rand(seed + 3, fan_out, rank),
    )
    offset, gain = (rand(seed + 4, fan_out) if bias else None), rand(seed + 5, fan_out)
    leaves = [t.requires_grad_() for t in (x, a, b, gain)]
    dense = torch.matmul(x, (w + scale * b @ a).T)
    shift = 0 if offset is None else offset
    for got, want, used in (
        (lowrank_linear(x, w, offset, a, b, scale), dense + shift, leaves[:3]),
        (dora_linear(x, w, offset, a, b, gain, scale), dense * gain + shift, leaves),
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        pull = rand(seed + 6, *got.shape)
        ours, theirs = (torch.autograd.grad(y, used, pull, retain_graph=True) for y in (got, want))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@quick
@given(seeds, size, size, size)
def test_truncated_svd_is_the_best_approximation(seed: int, m: int, n: int, rank: int) -> None:
    g = rand(seed, m, n)
    u, s, v = truncated_svd(g, rank)
    assert u.shape[1] == len(s) == v.shape[1] == min(rank, m, n)
    tail = torch.linalg.svdvals(g)[rank:]
    assert float((g - (u * s) @ v.T).norm()) == pytest.approx(float(tail.norm()), abs=1e-9)
    torch.testing.assert_close(best_rank(g, rank), (u * s) @ v.T)


@quick
@given(seeds, st.integers(1, 30), st.integers(1, 30), st.integers(1, 6))
def test_randomised_svd_is_exact_below_its_width_and_never_too_wide(seed: int, m: int, n: int, rank: int) -> None:
    g = rand(seed, m, min(rank, 4)) @ rand(seed + 1, min(rank, 4), n)
    u, s, v = randomized_svd(g, rank, generator=torch.Generator().manual_seed(seed))
    assert u.shape == (m, min(rank, m, n)) and v.shape == (n, min(rank, m, n))
    torch.testing.assert_close((u * s) @ v.T, g, rtol=1e-8, atol=1e-8)


@quick
@given(seeds, st.integers(1, 20), st.integers(1, 6))
def test_orthonormal_spans_the_columns(seed: int, m: int, k: int) -> None:
    k = min(k, m)
    g = rand(seed, m, k)
    q = orthonormal(g)
    torch.testing.assert_close(q.T @ q, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(q @ (q.T @ g), g, rtol=1e-9, atol=1e-9)
    assert orthonormal(g.bfloat16()).dtype == torch.float32


@quick
@given(seeds, size, size, size)
def test_projections(seed: int, m: int, n: int, rank: int) -> None:
    g = rand(seed, m, n)
    projection = SVDProjector(rank).fit(g)
    low = projection.down(g)
    assert low.shape == SVDProjector(rank).shape(g) and low.numel() == max(m, n) * min(rank, m, n)
    torch.testing.assert_close(projection.down(projection.up(low)), low, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(projection.up(low), best_rank(g, rank), rtol=1e-8, atol=1e-8)
    same = projection.carry(low, projection, squared=False)  # a basis that did not move moves nothing
    torch.testing.assert_close(same, low, rtol=1e-9, atol=1e-10)


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.data())
def test_exactly_the_budget_survives_and_no_better_one_is_dropped(scores: list[float], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(scores)))
    mask = decide(torch.tensor(scores, dtype=torch.float64), keep)
    assert int(mask.sum()) == keep
    kept = [s for s, m in zip(scores, mask.tolist(), strict=True) if m]
    dropped = [s for s, m in zip(scores, mask.tolist(), strict=True) if not m]
    assert not kept or not dropped or min(kept) >= max(dropped)


@quick
@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 40), st.integers(0, 40), st.integers(2, 300))
def test_budgets_fall_from_first_to_last(first: int, drop: int, warmup: int, final: int, total: int) -> None:
    if warmup >= total - final:
        return
    last = max(0, first - drop)
    plan = {"first": first, "last": last, "warmup": warmup, "final": final, "total": total}
    whole = [budget_at(t, **plan) for t in range(total + 1)]
    assert whole == sorted(whole, reverse=True)
    assert whole[0] == whole[warmup] == first and whole[total - final] == last
