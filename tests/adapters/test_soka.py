"""SoKA: its terms are the weight's own, the start is subtracted exactly, and the spectrum decides how many there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe
from rankloom.adapters import SoKA
from rankloom.errors import CompositionError, RecipeError, TargetError
from rankloom.init import KroneckerSVD, OwnStart
from rankloom.kernels import contraction
from rankloom.linalg import kronecker_sum, rearranged


def adapted(layer: nn.Module, init: Any = None, **settings: Any) -> rankloom.Adaptation:
    recipe = Recipe(adapter=SoKA(**settings), init=init or KroneckerSVD("fixed"))
    return rankloom.adapt(nn.Sequential(layer.double()), recipe.with_(targets={"modules": ("0",)}))


def kron(left: Tensor, right: Tensor) -> Tensor:
    return sum(torch.kron(u, v) for u, v in zip(left, right, strict=True))


def test_it_starts_at_the_weights_best_terms() -> None:
    layer = nn.Linear(20, 12)
    adapter = adapted(layer, rank=4).bindings[0].adapter
    (_, m, n), (_, p, q) = adapter.U.shape, adapter.V.shape
    assert (m * p, n * q) == (12, 20) and sum(t.numel() for t in adapter.parameters()) == 4 * (m * n + p * q)
    s = torch.linalg.svdvals(rearranged(layer.weight, m, n))
    missed = (layer.weight - kron(adapter.U, adapter.V)).square().sum()
    torch.testing.assert_close(missed, s[4:].square().sum())
    for factor in (adapter.U, adapter.V):  # orthogonal among themselves, with the root of the value each
        gram = factor.flatten(1) @ factor.flatten(1).mT
        torch.testing.assert_close(gram, torch.diag(s[:4]))


@pytest.mark.parametrize("train", ["uv", "sigma"])
@pytest.mark.parametrize("size", [0.0, 1e-9, 0.3])
def test_the_update_is_the_difference_of_two_sums_without_cancellation(train: str, size: float) -> None:
    layer = nn.Linear(20, 12)
    handle = adapted(layer, rank=3, train=train)
    adapter = handle.bindings[0].adapter

    def total() -> Tensor:
        weights = adapter.sigma if train == "sigma" else torch.ones(3, dtype=torch.float64)
        return kron(weights[:, None, None] * adapter.U, adapter.V).detach()

    x = torch.randn(2, 20, dtype=torch.float64)
    before, start = layer(x), total()
    with torch.no_grad():
        for p in handle.parameters():
            p += size * torch.randn_like(p)
    delta = adapter.delta(handle.bindings[0].layer)
    if not size:
        assert not delta.any() and torch.equal(handle.model(x), before)
    torch.testing.assert_close(delta, total() - start, rtol=1e-5, atol=1e-14)
    torch.testing.assert_close(handle.model(x), before + x @ (total() - start).mT)
    assert {name for name, _ in adapter.named_parameters()} == ({"sigma"} if train == "sigma" else {"U", "V"})


def test_frozen_factors_keep_no_input() -> None:
    handle = adapted(nn.Linear(20, 12), rank=2, train="sigma")
    kept: list[Tensor] = []
    x = torch.randn(1000, 20, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        handle.model(x)
    left_first = contraction(handle.bindings[0].adapter.terms(), 1000)[0].left
    assert any(t.data_ptr() == x.data_ptr() for t in kept) is left_first  # sigma rides on the left factor


def spectrum(*values: float) -> nn.Linear:
    """A linear whose rearranged weight has these singular values and no others."""
    layer = nn.Linear(16, 16, bias=False, dtype=torch.float64)
    basis = [torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q[: len(values)] for _ in range(2)]
    left, right = (b.reshape(-1, 4, 4) for b in basis)
    layer.weight.data = kronecker_sum(torch.tensor(values, dtype=torch.float64)[:, None, None] * left, right)
    return layer


@pytest.mark.parametrize(("terms", "want"), [("energy", 5), ("elbow", 3), ("both", 3), ("fixed", 6)])
def test_the_spectrum_decides_how_many_terms(terms: Any, want: int) -> None:
    layer = spectrum(10, 9, 2, 1.9, 1.8, 1.7, 1.6)
    handle = adapted(layer, KroneckerSVD(terms, energy=0.96), rank=6)
    assert len(handle.bindings[0].adapter.U) == want == handle.report["terms"]["0"]
    assert handle.recipe.adapter.rank_of("0") == want
    assert not handle.bindings[0].adapter.delta(handle.bindings[0].layer).any()


def test_the_rank_bounds_what_the_spectrum_asks_for() -> None:
    handle = adapted(spectrum(3, 2.9, 2.8, 2.7, 2.6, 2.5), KroneckerSVD("energy"), rank=2)
    assert len(handle.bindings[0].adapter.U) == 2


def test_the_zero_start() -> None:
    for train, dead in (("uv", "V"), ("sigma", "sigma")):
        handle = adapted(nn.Linear(20, 12), OwnStart(), rank=2, train=train)
        named = dict(handle.bindings[0].adapter.named_parameters())
        assert [name for name, p in named.items() if not p.any()] == [dead]
        assert not handle.bindings[0].adapter.delta(handle.bindings[0].layer).any()
        handle.model(torch.randn(3, 20, dtype=torch.float64)).square().sum().backward()
        assert named[dead].grad is not None and named[dead].grad.any()


def test_primes_leave_columns_and_rows() -> None:
    adapter = adapted(nn.Linear(13, 17), rank=2).bindings[0].adapter
    assert adapter.U.shape[1:] + adapter.V.shape[1:] in ((1, 13, 17, 1), (17, 1, 1, 13))


def test_what_cannot_be() -> None:
    with pytest.raises(TargetError, match=r"17 Kronecker terms are more than 0 \(16, 16\) has, 16 of 4 x 4"):
        adapted(nn.Linear(16, 16), rank=17)
    with pytest.raises(RecipeError, match="rank must be at least 1"):
        Recipe(adapter=SoKA(rank=0), init=OwnStart()).check()
    with pytest.raises(RecipeError, match="energy is a share"):
        Recipe(adapter=SoKA(), init=KroneckerSVD(energy=0)).check()
    with pytest.raises(CompositionError, match=r"needs kronecker terms.*soka"):
        Recipe(init=KroneckerSVD()).check()
