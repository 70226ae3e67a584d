"""LoHa: both ways it runs are the elementwise product; neither keeps an update for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe
from rankloom.adapters import LoHa
from rankloom.errors import RecipeError
from rankloom.init import OwnStart


def adapted(layer: nn.Module, move: bool = True, **settings: float) -> rankloom.Adaptation:
    recipe = Recipe(adapter=LoHa(**settings), init=OwnStart()).with_(targets={"modules": ("0",)})
    handle = rankloom.adapt(nn.Sequential(layer.double()), recipe)
    with torch.no_grad():
        for p in handle.parameters() if move else ():
            p += torch.randn_like(p)
    return handle


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "thin": (lambda: nn.Linear(40, 30), (5, 40)),
    "formed": (lambda: nn.Linear(8, 9), (5, 8)),
    "thin convolution": (lambda: nn.Conv2d(16, 24, 3), (2, 16, 5, 5)),
    "formed convolution": (lambda: nn.Conv2d(2, 4, 3), (2, 2, 5, 5)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_forward_and_gradients_are_the_elementwise_products(case: str) -> None:
    make, shape = LAYERS[case]
    rank = 2
    handle = adapted(make(), rank=rank, alpha=3.0)
    binding = handle.bindings[0]
    assert binding.adapter.thin(binding.layer) is case.startswith("thin")
    a1, b1, a2, b2 = binding.adapter.parameters()
    delta = 1.5 * (a1 @ b1) * (a2 @ b2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    want = binding.layer.apply(x, binding.layer.weight() + delta)
    got = handle.model(x)
    torch.testing.assert_close(got, want)
    pull = torch.randn_like(got)
    leaves = [x, a1, b1, a2, b2]
    for g, w in zip(torch.autograd.grad(got, leaves, pull), torch.autograd.grad(want, leaves, pull), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", [(30, 40), (9, 8), (8, 9)])
def test_the_rank_is_the_square_and_the_factors_are_exact(shape: tuple[int, int]) -> None:
    out, into = shape
    binding = adapted(nn.Linear(into, out), rank=3).bindings[0]
    delta, factors = binding.adapter.delta(binding.layer), binding.adapter.factors()
    assert factors is not None
    torch.testing.assert_close(factors[0] @ factors[1], delta)
    assert len(factors[1]) == torch.linalg.matrix_rank(delta) == min(9, out, into)


@pytest.mark.parametrize("case", ["thin", "formed"])
def test_nothing_of_the_weights_size_is_kept(case: str) -> None:
    make, shape = LAYERS[case]
    layer = make()
    handle = adapted(layer, rank=2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        handle.model(torch.randn(shape, dtype=torch.float64, requires_grad=True))
    weight = layer.weight
    same_size = [t for t in kept if t.numel() == weight.numel() and t.data_ptr() != weight.data_ptr()]
    assert kept and not same_size


def test_one_tensor_starts_at_zero_and_has_the_only_gradient() -> None:
    handle = adapted(nn.Linear(40, 30), move=False, rank=4)
    named = dict(handle.bindings[0].adapter.named_parameters())
    assert [name for name, p in named.items() if not p.any()] == ["w2_b"]
    handle.model(torch.randn(3, 40, dtype=torch.float64)).square().sum().backward()
    assert [name for name, p in named.items() if p.grad is not None and p.grad.any()] == ["w2_b"]
    assert sum(p.numel() for p in named.values()) == 2 * 4 * (30 + 40)


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(RecipeError, match="rank must be at least 1"):
        Recipe(adapter=LoHa(rank=0), init=OwnStart()).check()
