"""LoKr: shapes of its factors, its start, and its update against ``torch.kron``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe
from rankloom.adapters import LoKr
from rankloom.errors import RecipeError
from rankloom.init import OwnStart


def adapted(layer: nn.Module, **settings: object) -> rankloom.Adaptation:
    recipe = Recipe(adapter=LoKr(**settings), init=OwnStart()).with_(targets={"modules": ("0",)})
    return rankloom.adapt(nn.Sequential(layer.double()), recipe)


def shapes(handle: rankloom.Adaptation) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in handle.bindings[0].adapter.named_parameters()}


CASES = {
    "second factor low": ((12, 20), {"rank": 2}, {"w1": (3, 4), "w2_a": (4, 2), "w2_b": (2, 5)}),
    "both low": (
        (48, 80),
        {"rank": 2, "decompose_both": True},
        {"w1_a": (6, 2), "w1_b": (2, 8), "w2_a": (8, 2), "w2_b": (2, 10)},
    ),
    "both whole": ((12, 20), {"rank": 3}, {"w1": (3, 4), "w2": (4, 5)}),
    "a given divisor": ((12, 20), {"rank": 1, "decompose_factor": 4}, {"w1": (4, 4), "w2_a": (3, 1), "w2_b": (1, 5)}),
    "at most this divisor": ((12, 20), {"rank": 9, "decompose_factor": 3}, {"w1": (3, 2), "w2": (4, 10)}),
    "primes": ((13, 7), {"rank": 2}, {"w1": (1, 1), "w2_a": (13, 2), "w2_b": (2, 7)}),
}


@pytest.mark.parametrize("case", CASES)
def test_factors_and_update(case: str) -> None:
    (out, into), settings, want = CASES[case]
    layer = nn.Linear(into, out)
    handle = adapted(layer, alpha=5.0, **settings)
    assert shapes(handle) == want
    with torch.no_grad():
        for p in handle.parameters():
            p += torch.randn_like(p)
    named = dict(handle.bindings[0].adapter.named_parameters())
    w1, w2 = (named[w] if w in named else named[f"{w}_a"] @ named[f"{w}_b"] for w in ("w1", "w2"))
    delta = 5.0 / settings["rank"] * torch.kron(w1, w2)
    x = torch.randn(3, into, dtype=torch.float64)
    torch.testing.assert_close(handle.model(x), nn.functional.linear(x, layer.weight + delta, layer.bias))
    torch.testing.assert_close(handle.bindings[0].adapter.delta(handle.bindings[0].layer), delta)


def test_a_convolutions_kernel_stays_with_the_second_factor() -> None:
    handle = adapted(nn.Conv2d(6, 4, 3), rank=2)
    assert shapes(handle) == {"w1": (2, 2), "w2": (2, 27)}
    handle = adapted(nn.Conv2d(64, 36, 3, groups=4), rank=1)  # each group has 16 channels
    assert shapes(handle) == {"w1": (6, 4), "w2_a": (6, 1), "w2_b": (1, 36)}


@pytest.mark.parametrize("zero", ["w1", "w2"])
@pytest.mark.parametrize("both", [False, True])
def test_one_tensor_starts_at_zero_and_only_its_product_has_a_gradient(zero: str, both: bool) -> None:
    handle = adapted(nn.Linear(80, 48), rank=2, decompose_both=both, zero=zero)
    named = dict(handle.bindings[0].adapter.named_parameters())
    dead = {"w1": "w1_a" if both else "w1", "w2": "w2_b"}[zero]
    assert [name for name, p in named.items() if not p.any()] == [dead]
    for name, p in named.items():
        assert name == dead or 0 < float(p.detach().abs().max()) <= p.shape[1] ** -0.5
    handle.model(torch.randn(3, 80, dtype=torch.float64)).square().sum().backward()
    assert {name for name, p in named.items() if p.grad is not None and p.grad.any()} == {dead}


def test_an_embedding_looks_its_columns_up() -> None:
    table = nn.Embedding(20, 12)
    for rank in (2, 9):
        handle = adapted(table, rank=rank)
        with torch.no_grad():
            for p in handle.parameters():
                p += torch.randn_like(p)
        ids = torch.tensor([[0, 7, 19], [5, 5, 12]])
        delta: Tensor = handle.bindings[0].adapter.delta(handle.bindings[0].layer)
        torch.testing.assert_close(handle.model(ids), table.weight[ids] + delta.mT[ids])
        handle.detach()


def test_the_parameter_formula() -> None:
    handle = adapted(nn.Linear(576, 576), rank=8)
    assert sum(p.numel() for p in handle.parameters()) == 24 * 24 + 8 * (24 + 24)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"decompose_factor": 0}, {"decompose_factor": -2}])
def test_settings_that_cannot_be(settings: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=next(iter(settings))):
        Recipe(adapter=LoKr(**settings), init=OwnStart()).check()
