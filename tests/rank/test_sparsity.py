"""SNELLA's allocator: shares of a budget, its schedule, and what it leaves of the updates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rankloom
from rankloom.errors import RecipeError
from rankloom.rank.sparsity import allocate
from tests import zoo


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 500)), min_size=1, max_size=8), st.integers(0, 3000))
def test_shares_add_up_and_respect_their_caps(layers: list[tuple[float, int]], budget: int) -> None:
    scores = torch.tensor([score for score, _ in layers], dtype=torch.float64)
    caps = torch.tensor([cap for _, cap in layers])
    shares = allocate(scores, budget, caps)
    assert int(shares.sum()) == min(budget, int(caps.sum()))
    assert bool((shares >= 0).all()) and bool((shares <= caps).all())


def test_shares_are_in_proportion_until_a_cap_binds() -> None:
    caps = torch.tensor([100, 100, 100])
    assert allocate(torch.tensor([1.0, 2.0, 7.0]), 100, caps).tolist() == [10, 20, 70]
    assert allocate(torch.tensor([1.0, 1.0, 8.0]), 200, caps).tolist() == [50, 50, 100]
    assert allocate(torch.zeros(3), 90, caps).tolist() == [30, 30, 30]
    assert allocate(torch.tensor([0.0, 0.0, 1.0]), 160, caps).tolist() == [30, 30, 100]  # importance ran out of room


def handle(steps: int, total: int = 12, **changes: float) -> rankloom.Adaptation:
    recipe = zoo.recipe_of("snella").with_({f"rank.{key}": value for key, value in {"interval": 1, **changes}.items()})
    made = zoo.adapted(recipe, zoo.build("llama"), "llama")
    zoo.train(made, made.optimizer(1e-2, total_steps=total), zoo.batches("llama", 2), steps)
    return made


def nonzero(made: rankloom.Adaptation) -> int:
    return sum(int((b.adapter.delta(b.layer) != 0).sum()) for b in made.bindings)


def test_the_budget_falls_along_its_cubic_and_is_met_exactly() -> None:
    entries = sum(b.layer.out_features * b.layer.in_features for b in handle(0).bindings)
    for steps in (1, 6, 11, 12):
        made = handle(steps)
        last = sum(e - int(0.3 * e) for e in (b.layer.out_features * b.layer.in_features for b in made.bindings))
        wanted = int(last + (entries - last) * (1 - steps / 12) ** 3)
        assert nonzero(made) == wanted == sum(int(b.adapter.kept) for b in made.bindings)
    assert len({round(int(b.adapter.kept) / b.layer.weight().numel(), 3) for b in made.bindings}) > 1  # they competed


def test_warm_up_and_final_phase_keep_the_allocation() -> None:
    entries = sum(b.layer.weight().numel() for b in handle(0).bindings)
    assert nonzero(handle(4, warmup=4, final=4)) == entries
    one, two = handle(8, warmup=4, final=4), handle(12, warmup=4, final=4)
    assert [int(b.adapter.kept) for b in one.bindings] == [int(b.adapter.kept) for b in two.bindings]


def test_impossible_runs_are_refused() -> None:
    made = zoo.adapted("snella", zoo.build("llama"), "llama")
    with pytest.raises(RecipeError, match="pass its length"):
        made.optimizer(1e-2)
    with pytest.raises(RecipeError, match="no steps left"):
        handle(0, total=4, warmup=2, final=2)
    with pytest.raises(RecipeError, match=r"target_sparsity in \[0, 1\)"):
        handle(0, target_sparsity=1.0)
