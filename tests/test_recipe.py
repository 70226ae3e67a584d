"""Recipes: compose, check, print, round-trip; every error names what is wrong and what would work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import Dense, DoRA, LoRA
from rankloom.errors import CompositionError, RecipeError
from rankloom.init import Gaussian, Kaiming, OneStepGradient, OwnStart
from rankloom.optim import AdamW, Projected
from rankloom.parts import SLOTS, kinds
from rankloom.rank import AdaLoRA
from tests import zoo

REPLACEMENTS = {  # for every need, a composition that lacks it: (recipe, the two parts, what has to be offered instead)
    "factors": (Recipe(adapter=Dense()), ("init 'kaiming'", "adapter 'dense'"), ("adapter 'lora'", "adapter 'dora'")),
    "ranked components": (Recipe(rank=AdaLoRA()), ("rank 'adalora'", "adapter 'lora'"), ("lora(core=diagonal)",)),
    "dense weights": (
        Recipe(optimizer=Projected()),
        ("optimizer 'projected'", "adapter 'lora'"),
        ("adapter 'dense'",),
    ),
}


@pytest.mark.parametrize("need", REPLACEMENTS)
def test_an_impossible_composition_names_both_parts_and_what_works(need: str) -> None:
    recipe, parts, instead = REPLACEMENTS[need]
    with pytest.raises(CompositionError) as caught:
        recipe.check()
    message = str(caught.value)
    assert "\n" not in message and f"needs {need}" in message
    assert all(part in message for part in parts)
    works = message.split("it works with ")[1]
    assert all(name in works for name in instead)


def test_what_is_offered_instead_does_work() -> None:
    Recipe(adapter=LoRA(core="diagonal"), init=Gaussian(), rank=AdaLoRA()).check()
    Recipe(adapter=DoRA(core="diagonal"), rank=AdaLoRA()).check()
    Recipe(adapter=Dense(), init=OwnStart(), optimizer=Projected()).check()


def test_every_need_of_every_part_is_offered_by_some_part() -> None:
    """No part may ask for a capability that nothing in the library has."""
    offered = set()
    for slot in SLOTS:
        for cls in kinds(slot).values():
            for settings in ({}, {"core": "diagonal"}):
                names = {f.name for f in dataclasses.fields(cls)}
                if settings.keys() <= names:
                    offered |= cls(**settings).offers
    for slot in SLOTS:
        for cls in kinds(slot).values():
            assert cls().needs <= offered, cls


def test_the_defaults_are_plain_lora() -> None:
    assert Recipe() == rankloom.methods.get("lora")
    assert Recipe.from_dict({}) == Recipe()


def test_parts_are_entered_by_slot_and_kind() -> None:
    for slot in SLOTS:
        assert kinds(slot), slot
        for kind, cls in kinds(slot).items():
            assert cls.kind == kind and cls.slot == slot
            assert (cls.__doc__ or "").strip(), cls
            cls().check()  # every setting has a default, and the defaults make sense


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"adaptor": {}}, r"no slot 'adaptor'; did you mean adapter"),
        ({"adapter": {"kind": "lroa"}}, r"unknown adapter 'lroa'; did you mean .*lora.*\(known: .*dora.*\)"),
        ({"adapter": {"kind": "lora", "rnk": 4}}, r"adapter 'lora' has no setting 'rnk'; did you mean rank"),
        ({"adapter": {"kind": "lora", "rank": "many"}}, r"adapter 'lora': rank: .*integer.*'full'.*'many'"),
        ({"adapter": {"kind": "lora", "rank": 0}}, r"rank must be at least 1"),
        ({"adapter": {"kind": "lora", "rank_pattern": {"q": 0}}}, r"rank must be at least 1"),
        ({"adapter": {"kind": "lora", "dropout": 1.0}}, r"dropout must be in \[0, 1\)"),
        ({"adapter": {"kind": "lora", "core": "round"}}, r"core: .*'identity', 'diagonal', 'sigmoid' or 'square'"),
        ({"adapter": {"kind": "lora", "train": "core"}}, r"has no core: set adapter.core"),
        ({"adapter": {"rank": 4}}, r"unknown adapter None"),
        ({"init": "kaimng"}, r"unknown init 'kaimng'; did you mean kaiming"),
        ({"targets": {"ties": "loose"}}, r"ties"),
        ({"optimizer": {"kind": "projected", "rank": 0}}, r"rank >= 1"),
    ],
)
def test_bad_plain_forms_are_one_line_errors(plain: dict, message: str) -> None:
    for text in (json.dumps(plain), yaml.safe_dump(plain)):
        with pytest.raises(RecipeError, match=message) as caught:
            Recipe.from_text(text)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["adapter: [", "- a\n- b", "just words", "", "3"])
def test_text_that_is_no_recipe(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(text)
    assert "\n" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    recipe = rankloom.methods.get("adalora")
    for name, text in (("r.yaml", recipe.to_yaml()), ("r.json", recipe.to_json())):
        (tmp_path / name).write_text(text)
        assert Recipe.from_file(tmp_path / name) == recipe
        assert Recipe.from_file(str(tmp_path / name)) == recipe
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*missing.yaml"):
        Recipe.from_file(tmp_path / "missing.yaml")


def test_short_forms() -> None:
    recipe = Recipe.from_text("adapter: dora\ntargets: {modules: [q_proj, v_proj]}\n")
    assert recipe == Recipe(adapter=DoRA(), targets=Targets(("q_proj", "v_proj")))


def test_changes_give_a_copy() -> None:
    lora = rankloom.methods.get("lora")
    assert lora.with_({"adapter.rank": 16}).adapter == LoRA(rank=16, alpha=16)
    assert lora.with_(adapter={"rank": 4}).adapter == LoRA(rank=4, alpha=16)
    assert lora.with_(init="gaussian").init == Gaussian()
    assert lora.with_(init=OneStepGradient(gamma=2)).init == OneStepGradient(gamma=2)
    assert lora.with_(adapter={"kind": "dense"}).adapter == Dense()
    assert lora.with_({"adapter.kind": "dora"}).adapter == DoRA()
    assert lora.with_({"optimizer": {"kind": "projected", "rank": 2}}).optimizer == Projected(rank=2)
    assert lora.with_() == lora == rankloom.methods.get("lora")
    with pytest.raises(RecipeError, match="rnk"):
        lora.with_({"adapter.rnk": 3})
    with pytest.raises(RecipeError, match="no slot"):
        lora.with_({"adaptr.rank": 3})


def test_expand_prints_the_composition_and_only_what_differs() -> None:
    lines = rankloom.methods.get("lora-one").expand().splitlines()
    assert [line.split()[0] for line in lines] == list(SLOTS)
    assert "scaling='rslora'" in lines[1] and "rank=" not in lines[1]
    assert lines[2].startswith("init       one-step-gradient()")
    changed = rankloom.methods.get("lora").with_({"adapter.rank": 4}).expand()
    assert "lora(rank=4)" in changed


def test_check_on_a_model_leaves_it_alone() -> None:
    model = zoo.build("llama")
    before = [(id(p), p.requires_grad) for p in model.parameters()]
    for method in rankloom.methods.TABLE:
        zoo.recipe_of(method).check(model)
    assert [(id(p), p.requires_grad) for p in model.parameters()] == before
    assert not any("rankloom" in m._modules for m in model.modules())


def test_recipes_are_values() -> None:
    assert Recipe() == Recipe() and Recipe(init=Kaiming()) == Recipe() and Recipe(optimizer=AdamW(eps=1.0)) != Recipe()
    with pytest.raises(AttributeError):
        Recipe().adapter = Dense()  # type: ignore[misc]
