"""FourierFT against the inverse FFT of the scattered coefficients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rankloom.adapters import FourierFT
from rankloom.errors import RecipeError, TargetError
from rankloom.layers import LinearLayer
from rankloom.targets import Target

SHAPES = [(5, 8), (8, 5), (6, 6), (7, 9), (1, 4), (4, 1)]


def made(shape: tuple[int, int], **settings: Any) -> tuple[Any, LinearLayer]:
    layer = LinearLayer(nn.Linear(shape[1], shape[0], dtype=torch.float64).requires_grad_(False))
    adapter = FourierFT(**{"coefficients": min(9, shape[0] * shape[1]), "scale": 11.0, **settings}).build(
        Target("x", layer, "x")
    )
    adapter.reset(layer, torch.Generator())
    return adapter, layer


@pytest.mark.parametrize("shape", SHAPES)
def test_the_update_is_the_real_part_of_the_inverse_transform(shape: tuple[int, int]) -> None:
    adapter, layer = made(shape)
    assert not adapter.delta(layer).any()
    nn.init.normal_(adapter.c)
    spectrum = torch.zeros(shape, dtype=torch.float64)
    spectrum[tuple(adapter.places)] = adapter.c.detach()
    want = 11.0 * torch.fft.ifft2(spectrum).real
    torch.testing.assert_close(adapter.delta(layer).detach(), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_the_output_and_its_gradients(shape: tuple[int, int]) -> None:
    adapter, layer = made(shape)
    nn.init.normal_(adapter.c)
    x = torch.randn(6, shape[1], dtype=torch.float64, requires_grad=True)
    out, dense = adapter.forward(x, layer), layer.apply(x, layer.weight() + adapter.delta(layer))
    torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-13)
    pull = torch.randn_like(out)
    got = torch.autograd.grad(out, [x, adapter.c], pull)
    torch.testing.assert_close(got[0], torch.autograd.grad(dense, x, pull)[0], rtol=1e-12, atol=1e-13)
    # The adjoint of the real part of the inverse transform, at the places.
    gradient = 11.0 * torch.fft.ifft2(pull.mT @ x.detach()).conj().real
    torch.testing.assert_close(got[1], gradient[tuple(adapter.places)], rtol=1e-11, atol=1e-12)


def test_places_are_distinct_and_come_from_the_seed() -> None:
    first, again, other = (made((6, 7), coefficients=42, seed=seed)[0].places for seed in (1, 1, 2))
    assert len(torch.unique(first[0] * 7 + first[1])) == 42
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert set(made((6, 7))[0].state_dict()) == {"c", "digest"}
    peer = made((6, 7), coefficients=10, places="peft", seed=3)[0].places
    order = torch.randperm(42, generator=torch.Generator().manual_seed(3))[:10]
    assert torch.equal(peer, torch.stack([order // 7, order % 7]))


def test_all_places_span_all_even_matrices() -> None:
    """Real coefficients reach the even matrices only, half of all: the transform of a real spectrum is Hermitian."""
    adapter, layer = made((5, 6), coefficients=30)
    columns = []
    for k in range(30):
        with torch.no_grad():
            adapter.c.zero_()[k] = 1.0
        columns.append(adapter.delta(layer).detach().flatten())
    reached = torch.linalg.matrix_rank(torch.stack(columns))
    even = {frozenset([(p, q), (-p % 5, -q % 6)]) for p in range(5) for q in range(6)}
    assert reached == len(even)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"adapter.coefficients >= 1, got 0"):
        FourierFT(coefficients=0).check()
    target = Target("small", LinearLayer(nn.Linear(4, 5)), "small")
    with pytest.raises(TargetError, match="21 coefficients are more than the 20 entries of small"):
        FourierFT(coefficients=21).check_on([target])
