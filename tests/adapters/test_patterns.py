"""Ranks and alphas by pattern, in the forms scaled by alpha / rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import LoHa, LoKr
from rankloom.errors import RecipeError, TargetError
from rankloom.init import OwnStart
from tests import zoo

TARGETS = Targets(("q_proj", "down_proj"))


@pytest.mark.parametrize("form", [LoKr, LoHa])
def test_the_last_match_sets_rank_and_scale(form: Any) -> None:
    part = form(rank=2, alpha=6, rank_pattern={"q_proj": 3, "*.1.*": 1}, alpha_pattern={"down_proj": 4})
    recipe = Recipe(targets=TARGETS, adapter=part, init=OwnStart())
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    handle = rankloom.adapt(zoo.build("llama"), recipe)
    found = {b.name.split("layers.")[1]: (b.adapter.rank, b.adapter.scale) for b in handle.bindings}
    assert found == {
        "0.self_attn.q_proj": (3, 6 / 3),
        "0.mlp.down_proj": (2, 4 / 2),
        "1.self_attn.q_proj": (1, 6),
        "1.mlp.down_proj": (1, 4),
    }
    redistributed = recipe.with_ranks({b.name: 2 for b in handle.bindings})  # alpha in proportion: scales stay
    again = rankloom.adapt(zoo.build("llama"), redistributed)
    assert {b.adapter.rank for b in again.bindings} == {2}
    assert [b.adapter.scale for b in again.bindings] == [b.adapter.scale for b in handle.bindings]
    inputs = zoo.batch("llama")
    assert torch.equal(zoo.logits(again.model, inputs), zoo.logits(zoo.build("llama"), inputs))


@pytest.mark.parametrize("form", [LoKr, LoHa])
def test_impossible_patterns_are_refused(form: Any) -> None:
    with pytest.raises(RecipeError, match=r"at least 1, got 2 with rank_pattern \{'q_proj': 0\}"):
        form(rank=2, rank_pattern={"q_proj": 0}).check()
    recipe = Recipe(targets=TARGETS, adapter=form(alpha_pattern={"q_prj": 3.0}), init=OwnStart())
    with pytest.raises(TargetError, match="pattern 'q_prj' matches none of the targets"):
        rankloom.adapt(zoo.build("llama"), recipe)
