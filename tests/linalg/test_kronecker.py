"""Kronecker sums against ``torch.kron`` and the dense SVD of the rearranged matrix, all sizes unequal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankloom.linalg import (
    balanced_sides,
    divisors,
    elbow,
    energy_rank,
    kronecker_sum,
    kronecker_svd,
    rearranged,
    recompressed,
)

M, N, P, Q = 3, 2, 4, 5


def matrix(seed: int = 0) -> torch.Tensor:
    return torch.randn(M * P, N * Q, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_sum_is_torchs_kronecker_product_term_by_term() -> None:
    left, right = torch.randn(4, M, N, dtype=torch.float64), torch.randn(4, P, Q, dtype=torch.float64)
    want = sum(torch.kron(u, v) for u, v in zip(left, right, strict=True))
    torch.testing.assert_close(kronecker_sum(left, right), want)


def test_rearranging_turns_a_product_into_an_outer_product() -> None:
    u, v = torch.randn(M, N, dtype=torch.float64), torch.randn(P, Q, dtype=torch.float64)
    torch.testing.assert_close(rearranged(torch.kron(u, v), M, N), torch.outer(u.flatten(), v.flatten()))


@pytest.mark.parametrize("rank", [1, 3, min(M * N, P * Q)])
def test_the_truncated_decomposition_is_the_best_one(rank: int) -> None:
    w = matrix()
    u, s, v, captured = kronecker_svd(w, M, N, rank)
    assert u.shape == (rank, M, N) and v.shape == (rank, P, Q) and captured == 1.0
    every = torch.linalg.svdvals(rearranged(w, M, N))
    torch.testing.assert_close(s, every[:rank])
    error = (w - kronecker_sum(s[:, None, None] * u, v)).square().sum()
    torch.testing.assert_close(error, every[rank:].square().sum(), rtol=1e-10, atol=1e-13)
    for factor in (u, v):
        gram = factor.flatten(1) @ factor.flatten(1).mT
        torch.testing.assert_close(gram, torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("terms", [1, 4, 9])
def test_recompression_is_the_decomposition_of_the_sum(terms: int) -> None:
    """More terms than a factor has entries, and fewer."""
    left, right = torch.randn(terms, M, N, dtype=torch.float64), torch.randn(terms, P, Q, dtype=torch.float64)
    left[-1] = 0
    total = kronecker_sum(left, right)
    u, s, v = recompressed(left, right)
    torch.testing.assert_close(s, torch.linalg.svdvals(rearranged(total, M, N))[: len(s)], rtol=1e-12, atol=1e-12)
    assert len(u) == len(s) == len(v) == min(terms, M * N)
    torch.testing.assert_close(kronecker_sum(s[:, None, None] * u, v), total, rtol=1e-12, atol=1e-12)
    for factor in (u, v):
        gram = factor.flatten(1) @ factor.flatten(1).mT
        torch.testing.assert_close(gram, torch.eye(len(s), dtype=torch.float64))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_balanced_sides_are_the_cheapest_and_never_dearer_than_a_column_and_a_row(out: int, into: int) -> None:
    m, n = balanced_sides(out, into)
    costs = [
        a * b + (out // a) * (into // b)
        for a in range(1, out + 1)
        for b in range(1, into + 1)
        if out % a == 0 and into % b == 0
    ]
    assert out % m == 0 and into % n == 0
    assert m * n + (out // m) * (into // n) == min(costs) <= out + into


def test_balanced_sides_of_the_usual_widths() -> None:
    assert balanced_sides(576, 576) == (24, 24) and balanced_sides(4096, 4096) == (64, 64)
    assert balanced_sides(32003, 577) == (1, 577)  # primes: a column and a row


@given(st.integers(1, 2000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20), st.floats(0.01, 0.999), st.floats(0, 0.5))
def test_the_energy_rule_is_brute_force_and_rises_with_the_share(found: list[float], share: float, less: float) -> None:
    s = torch.tensor(sorted(found, reverse=True), dtype=torch.float64)
    total = float(s.square().sum())
    rank = energy_rank(s, share)
    if total > 1e-200:
        want = next(r for r in range(1, len(s) + 1) if float(s[:r].square().sum()) >= share * total * (1 - 1e-12))
        assert abs(rank - want) <= (0 if abs(float(s[:want].square().sum()) / total - share) > 1e-9 else 1)
    assert energy_rank(s, share * (1 - less)) <= rank


def test_the_elbow_is_the_point_farthest_from_the_chord() -> None:
    assert elbow(torch.tensor([10.0, 9.0, 1.0, 0.5, 0.2, 0.0])) == 3
    assert elbow(torch.tensor([5.0, 0.1, 0.1, 0.1])) == 2
    assert elbow(torch.ones(6)) == 1 and elbow(torch.tensor([2.0, 1.0])) == 1
