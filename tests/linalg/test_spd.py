"""Gram matrices: the damped one always factorises, the inverse and the Sylvester solution solve what they should."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankloom.linalg import damped, spd_inverse, spd_sylvester


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(seed: int, rank: int, size: int) -> Tensor:
    factor = rand(seed, 2, rank, size)
    return factor @ factor.mT


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 5))
def test_sylvester_against_scipy(seed: int, m: int, n: int) -> None:
    p, q, c = gram(seed, m, m + 4), gram(seed + 1, n, n + 4), rand(seed + 2, 2, m, n)
    x = spd_sylvester(p, q, c)
    assert (p @ x + x @ q - c).norm() < 1e-12 * (1 + x.norm()) * (p.norm() + q.norm())
    for i in range(2):
        want = scipy.linalg.solve_sylvester(p[i].numpy(), q[i].numpy(), c[i].numpy())
        torch.testing.assert_close(x[i], torch.from_numpy(want), rtol=1e-8, atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 6))
def test_inverse(seed: int, rank: int) -> None:
    matrix = damped(gram(seed, rank, rank + 3), 1e-3)
    torch.testing.assert_close(
        spd_inverse(matrix) @ matrix, torch.eye(rank).double().expand(2, -1, -1), atol=1e-9, rtol=0
    )


def test_the_ridge_is_absolute_or_relative_to_the_mean_eigenvalue() -> None:
    matrix, eye = gram(0, 3, 5), torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(damped(matrix, 0.1), matrix + 0.1 * eye)
    mean = torch.linalg.eigvalsh(matrix).mean(-1)[:, None, None]
    torch.testing.assert_close(damped(matrix, 0.1, relative=True), matrix + 0.1 * mean * eye)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), rank=st.integers(1, 40), live=st.integers(0, 40), size=st.floats(1e-12, 1e6))
def test_singular_grams_still_factorise(
    dtype: torch.dtype, relative: bool, seed: int, rank: int, live: int, size: float
) -> None:
    """Rank-deficient and zero Grams without any ridge: the floor is above the rounding of the products."""
    factor = (size * rand(seed, 60, rank) @ rand(seed + 1, rank, rank)).to(dtype)
    factor[:, min(live, rank) :] = factor[:, :1] if live else 0
    inverse = spd_inverse(damped(factor.mT @ factor, 0.0, relative=relative))
    assert torch.isfinite(inverse).all()
