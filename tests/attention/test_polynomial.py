"""Polynomial factors against the polynomial itself, brute-force index sets, and autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from rankloom.attention.contract import Factor
from rankloom.attention.polynomial import Anisotropic, Isotropic, exponential_series
from rankloom.errors import RecipeError

SPECTRUM = torch.tensor([0.9, 0.5, 0.3, 0.05], dtype=torch.float64)


def points(dim: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(dim, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(factor: Factor, q: Tensor, k: Tensor) -> Tensor:
    return factor.features(q).mT @ factor.mix(factor.features(k))


@pytest.mark.parametrize("coefficients", ["taylor", "chebyshev"])
@pytest.mark.parametrize("dim, degree", [(1, 0), (1, 1), (1, 6), (3, 0), (3, 1), (4, 2), (5, 3), (2, 7), (16, 3)])
def test_isotropic_is_the_polynomial(dim: int, degree: int, coefficients: str) -> None:
    factor = Isotropic(dim, degree, coefficients, radius=2.0)
    q, k = points(dim, 7), points(dim, 9, seed=1)
    s = q.mT @ k
    want = sum((a * s**j for j, a in enumerate(exponential_series(degree, coefficients, 2.0))), torch.zeros_like(s))
    torch.testing.assert_close(kernel(factor, q, k), want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))
    assert factor.width == math.comb(dim + degree, degree) == len(factor.features(q))


def autograd_features(factor: Factor, x: Tensor) -> Tensor:
    """The same monomials, read off the factor at integer points, recomputed as powers."""
    primes = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0][: factor.dim], dtype=torch.float64)
    values = factor.features(primes[:, None])[:, 0].round().long().tolist()
    rows = []
    for value in values:
        exponents = []
        for prime in primes.long().tolist():
            power = 0
            while value % prime == 0:
                value, power = value // prime, power + 1
            exponents.append(power)
        assert value == 1
        rows.append(math.prod((x[i] ** e for i, e in enumerate(exponents)), start=torch.ones_like(x[0])))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "factor",
    [Isotropic(4, g) for g in range(5)] + [Anisotropic(SPECTRUM, w, 6) for w in (1, 2, 9, 40)] + [Isotropic(1, 3)],
    ids=lambda f: f"{type(f).__name__} {f.dim} {f.width}",
)
def test_features_and_pull_back_are_autograds(factor: Factor) -> None:
    x = points(factor.dim, 6).requires_grad_()
    want = autograd_features(factor, x)
    got = factor.features(x.detach())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert len({tuple(row) for row in got.tolist()}) == factor.width  # no monomial twice
    pull = torch.randn(want.shape, dtype=torch.float64)
    grad = torch.autograd.grad(want, x, pull)[0] if want.requires_grad and factor.width > 1 else torch.zeros_like(x)
    torch.testing.assert_close(factor.pull_back(x.detach(), got, pull.clone()), grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("width", [1, 5, 20, 35])
def test_anisotropic_set_is_the_best_closed_one(width: int) -> None:
    """With scores that fall from parent to child, the greedy set is the top of the list of all scores."""
    factor = Anisotropic(SPECTRUM[1:], width, max_degree=5)
    everything = [m for m in itertools.product(range(6), repeat=3) if sum(m) <= 5]

    def score(m: tuple[int, ...]) -> float:
        terms = (
            s**e * math.prod(range(1, 2 * e, 2)) / math.factorial(e)
            for s, e in zip(SPECTRUM[1:].tolist(), m, strict=True)
        )
        return math.prod(terms)

    best = sorted(everything, key=score, reverse=True)[:width]
    x = points(3, 1).abs()
    want = sorted(math.prod(float(v) ** e for v, e in zip(x[:, 0], m, strict=True)) for m in best)
    assert sorted(factor.features(x)[:, 0].tolist()) == pytest.approx(want, rel=1e-12)


def test_anisotropic_with_all_monomials_is_isotropic() -> None:
    q, k = points(4, 7), points(4, 9, seed=1)
    full = Anisotropic(torch.full((4,), 0.1), width=10_000, max_degree=3)
    assert full.width == math.comb(7, 3)
    torch.testing.assert_close(kernel(full, q, k), kernel(Isotropic(4, 3), q, k), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coefficients", ["taylor", "chebyshev"])
@pytest.mark.parametrize("radius", [0.3, 1.5, 4.0])
def test_error_falls_under_its_bound(coefficients: str, radius: float) -> None:
    s = torch.linspace(-radius, radius, 1001, dtype=torch.float64)
    errors, bounds, absolute = [], [], []
    for degree in range(26):
        series = exponential_series(degree, coefficients, radius)
        p = sum((a * s**j for j, a in enumerate(series)), torch.zeros_like(s))
        errors.append(float((p * (-s).exp() - 1).abs().max()))
        absolute.append(float((p - s.exp()).abs().max()))
        bounds.append(Isotropic(1, degree, coefficients, radius).bound(radius))
    rounding = 1e-11
    assert all(e <= b + rounding for e, b in zip(errors, bounds, strict=True))
    assert all(b < a for a, b in itertools.pairwise(absolute) if a > rounding)
    assert absolute[-1] < 1e-9
    assert Isotropic(1, 3, "chebyshev", radius).bound(1.01 * radius) == math.inf


def test_chebyshev_beats_taylor_on_its_interval() -> None:
    s = torch.linspace(-2, 2, 101, dtype=torch.float64)
    worst = {}
    for name in ("taylor", "chebyshev"):
        p = sum(a * s**j for j, a in enumerate(exponential_series(4, name, 2.0)))
        worst[name] = float((p - s.exp()).abs().max())
    assert worst["chebyshev"] < worst["taylor"] / 5


def test_bad_input_is_refused() -> None:
    for make, match in (
        (lambda: Isotropic(3, -1), "degree >= 0"),
        (lambda: Isotropic(3, 2, "hermite"), "'taylor' or 'chebyshev'"),
        (lambda: Isotropic(3, 2, "chebyshev"), "positive radius"),
        (lambda: Anisotropic(torch.tensor([0.1, torch.nan]), 4), "finite numbers"),
        (lambda: Anisotropic(torch.tensor([0.1]), 0), "width >= 1"),
    ):
        with pytest.raises(RecipeError, match=match):
            make()
