"""Mehler's expansion: it converges to the kernel, its functions are orthogonal, and it is the best of its width."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankloom.attention.mehler import Mehler
from rankloom.attention.polynomial import Anisotropic
from rankloom.attention.products import Products
from rankloom.errors import RecipeError

SPECTRUM = torch.tensor([0.45, 0.3, 0.1], dtype=torch.float64)


def cloud(n: int, seed: int = 0, spectrum: Tensor = SPECTRUM) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(spectrum), n, generator=g, dtype=torch.float64) * spectrum.sqrt()[:, None]


def kernel(factor: Mehler | Anisotropic, q: Tensor, k: Tensor) -> Tensor:
    return factor.features(q).mT @ factor.mix(factor.features(k))


def test_converges_to_the_kernel() -> None:
    q, k = cloud(50), cloud(60, seed=1)
    errors = [
        float((kernel(Mehler(SPECTRUM, w, 40), q, k) / (q.mT @ k).exp() - 1).abs().max()) for w in (20, 200, 2000)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5, errors


@pytest.mark.parametrize("spectrum", [[0.3], [2.0], [1e-9], [0.0]])
def test_one_coordinate_with_all_degrees_is_exact(spectrum: list[float]) -> None:
    """Whatever rho was fitted to, also where it is cut off."""
    factor = Mehler(torch.tensor(spectrum), 100, max_degree=60)
    q, k = cloud(20, spectrum=torch.tensor([0.5])), cloud(30, 1, torch.tensor([0.5]))
    if spectrum[0] < 1e-6:  # far outside what it was fitted to, only within reach of it
        q, k = q * spectrum[0], k * spectrum[0]
    torch.testing.assert_close(kernel(factor, q, k), (q.mT @ k).exp(), rtol=1e-6, atol=1e-6)


def test_features_are_orthogonal_hermite_functions() -> None:
    rho = 0.4
    variance = rho / (1 + rho**2)
    plain = variance / math.sqrt(1 - 2 * variance**2)  # the spectrum that leads to this rho
    factor = Mehler(torch.tensor([plain], dtype=torch.float64), 7)
    nodes = torch.linspace(-12, 12, 4001, dtype=torch.float64)[None]
    phi = factor.features(nodes * math.sqrt(variance))
    density = (-nodes.square() / 2).exp()
    gram = (phi * density) @ phi.mT
    scale = gram.diagonal().rsqrt()
    torch.testing.assert_close(scale[:, None] * gram * scale, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-8)
    singular = factor.mix(gram.diagonal()[:, None])[:, 0]
    torch.testing.assert_close(singular[1:] / singular[:-1], torch.full((6,), rho, dtype=torch.float64))


@pytest.mark.parametrize("width", [1, 2, 12, 60])
def test_pull_back_is_autograds(width: int) -> None:
    factor = Mehler(SPECTRUM, width)
    x = cloud(5)
    phi = factor.features(x)
    pull = torch.randn_like(phi)
    got = factor.pull_back(x, phi, pull.clone())
    step = 1e-6
    for i in range(3):
        shift = torch.zeros_like(x)
        shift[i] = step
        slope = (factor.features(x + shift) - factor.features(x - shift)) / (2 * step)
        torch.testing.assert_close(got[i], (pull * slope).sum(0), rtol=1e-6, atol=1e-6)


def test_hermite_products() -> None:
    y = torch.randn(2, 9, dtype=torch.float64)
    products = Products([(), (0,), (1,), (0, 0), (0, 0, 0), (0, 0, 0, 0), (0, 0, 1), (0, 0, 1, 1)], hermite=True)
    a, b = y
    want = {
        (): a * 0 + 2,
        (0,): 2 * a,
        (1,): 2 * b,
        (0, 0): 2 * (a**2 - 1),
        (0, 0, 0): 2 * (a**3 - 3 * a),
        (0, 0, 1): 2 * (a**2 - 1) * b,
        (0, 0, 0, 0): 2 * (a**4 - 6 * a**2 + 3),
        (0, 0, 1, 1): 2 * (a**2 - 1) * (b**2 - 1),
    }
    torch.testing.assert_close(products.grow(2.0, y), torch.stack([want[m] for m in products.monomials]))


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_beats_taylor_of_the_same_width_on_rows(scale: float) -> None:
    """In the mean square of entries relative to their row's denominator, on Gaussian clouds."""
    spectrum = scale * 0.45 / torch.arange(1, 9, dtype=torch.float64)
    q, k = cloud(1000, spectrum=spectrum), cloud(1000, 1, spectrum)
    exact = (q.mT @ k).exp()
    errors = []
    for factor in (Mehler(spectrum, 80), Anisotropic(spectrum, 80)):
        difference = (kernel(factor, q, k) - exact) / exact.mean(1, keepdim=True)
        errors.append(float(difference.square().mean().sqrt()))
    assert errors[0] < errors[1] / 1.4, errors


def test_bad_input_is_refused() -> None:
    for spectrum, width in ((torch.tensor([0.1, -1.0]), 4), (torch.ones(2, 2), 4), (torch.ones(2), 0)):
        with pytest.raises(RecipeError, match="factor by spectrum"):
            Mehler(spectrum, width)
