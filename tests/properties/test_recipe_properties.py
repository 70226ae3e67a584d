"""Any recipe, whatever its settings, survives YAML, JSON and its plain form; strategies are read from the parts' types."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rankloom import Recipe
from rankloom.errors import RecipeError
from rankloom.parts import SLOTS, kinds

TEXT = st.text("abcdefgh_.*[]0123456789:# é'\"", min_size=1, max_size=12)
NUMBER = st.floats(1e-30, 1e30, allow_nan=False, allow_subnormal=False)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """A strategy for a setting's type; a type it does not know is a part of a kind not seen before, and fails loudly."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*(values(a) for a in args))
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values(args[0]), max_size=4).map(tuple)
    if origin is tuple:
        return st.tuples(*(values(a) for a in args))
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    simple = {int: st.integers(0, 500), float: NUMBER, bool: st.booleans(), str: TEXT, type(None): st.none()}
    return simple[kind]


def part_of(cls: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    fields = {f.name: values(hints[f.name]) for f in dataclasses.fields(cls)}
    return st.builds(cls, **fields)


recipes = st.builds(Recipe, **{slot: st.one_of(*(part_of(cls) for cls in kinds(slot).values())) for slot in SLOTS})


def possible(recipe: Recipe) -> bool:
    try:
        for part in recipe.parts().values():
            part.check()
    except RecipeError:
        return False
    return True


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(recipes)
def test_round_trips(recipe: Recipe) -> None:
    assume(possible(recipe))
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    assert Recipe.from_text(recipe.to_json()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.with_() == recipe
    again = Recipe.from_text(recipe.to_yaml())
    for slot, part in recipe.parts().items():  # values keep their types, or files would differ after one trip
        other = getattr(again, slot)
        for f in dataclasses.fields(part):
            assert type(getattr(part, f.name)) is type(getattr(other, f.name)), (slot, f.name)


@settings(max_examples=80, deadline=None)
@given(recipes)
def test_expand_is_always_a_line_a_slot(recipe: Recipe) -> None:
    assert [line.split()[0] for line in recipe.expand().splitlines()] == list(SLOTS)


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | TEXT,
        lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3),
    )
)
def test_any_other_document_is_refused_in_one_line(document: Any) -> None:
    import yaml

    try:
        Recipe.from_text(yaml.safe_dump(document))
    except RecipeError as error:
        assert "\n" not in str(error)
    else:
        assert document == {}
