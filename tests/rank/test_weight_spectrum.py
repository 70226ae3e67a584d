"""LaMDA++'s allocation: the exact budget, more rank for flatter spectra, a threshold in common."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankloom
from rankloom.errors import RecipeError
from rankloom.rank.weight_spectrum import energies, fill
from tests import zoo


def test_energies_are_the_shares_before_each_component() -> None:
    for shape in ((6, 9), (9, 6)):
        w = torch.randn(shape, dtype=torch.float64)
        squares = torch.linalg.svdvals(w).square()
        want = torch.cat([torch.zeros(1, dtype=w.dtype), torch.cumsum(squares, 0)[:-1]]) / squares.sum()
        torch.testing.assert_close(energies(w), want, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=6), st.integers(0, 2**31), st.floats(0, 1))
def test_the_budget_is_met_exactly_by_one_threshold(sizes: list[int], seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    spectra = [energies(torch.randn(k, k + 2, generator=generator, dtype=torch.float64)) for k in sizes]
    budget = len(sizes) + int(share * (sum(sizes) - len(sizes)))
    ranks = fill(spectra, budget, [1] * len(sizes), sizes)
    assert sum(ranks) == budget and all(1 <= r <= k for r, k in zip(ranks, sizes, strict=True))
    taken = max(float(s[r - 1]) for s, r in zip(spectra, ranks, strict=True))
    left = min([float(s[r]) for s, r, k in zip(spectra, ranks, sizes, strict=True) if r < k], default=1.0)
    assert taken <= left  # every layer stops at the same share of its energy


def test_flatter_spectra_get_more() -> None:
    """Spectra ``i^-a``: the rank never rises with a; equal spectra share equally, the bounds hold."""
    spectra = [energies(torch.diag(torch.arange(1.0, 33).double() ** -a)) for a in (0.0, 0.3, 0.6, 1.0, 2.0)]
    ranks = fill(spectra, 40, [4] * 5, [16] * 5)
    assert ranks == sorted(ranks, reverse=True) and sum(ranks) == 40 and ranks[0] == 16 and ranks[-1] == 4
    assert fill([spectra[1]] * 4, 20, [1] * 4, [32] * 4) == [5] * 4


def test_lamda_plus_plus_spends_what_lamda_does() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(24, 24, bias=False) for name in ("flat", "usual", "steep")})
    for layer, power in zip(model.values(), (0.0, 0.5, 2.0), strict=True):
        u, _, v = torch.linalg.svd(layer.weight.data)
        layer.weight.data = (u * torch.arange(1.0, 25) ** -power) @ v
    handle = rankloom.adapt(model, rankloom.methods.get("lamda++").with_({"adapter.rank": 6}))
    ranks = {b.name: b.adapter.rank for b in handle.bindings}
    assert sum(ranks.values()) == 18 and 12 >= ranks["flat"] > ranks["usual"] >= ranks["steep"] >= 3
    for b in handle.bindings:
        assert b.adapter.scale == rankloom.methods.get("lamda++").adapter.alpha / 6  # alpha follows the rank
        assert b.adapter.R.shape == (b.adapter.rank, b.adapter.rank)
    again = rankloom.Recipe.from_text(handle.recipe.to_yaml())
    assert {b.name: b.adapter.rank for b in rankloom.adapt(handle.detach(), again).bindings} == ranks


def test_edges() -> None:
    with pytest.raises(RecipeError, match="spread"):
        rankloom.methods.get("lamda++").with_({"rank.spread": 0.5})
    recipe = rankloom.methods.get("lamda++").with_(targets={"modules": (), "train": ("lm_head",)})
    assert not zoo.adapted(recipe, zoo.build("llama"), "llama").bindings
