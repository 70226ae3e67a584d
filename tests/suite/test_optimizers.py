"""The product: every optimizer with every start and every form; what cannot work is refused with a reason."""

from __future__ import annotations

import itertools

import pytest
import torch

import rankloom
from rankloom import Recipe
from rankloom.adapters import Dense, DoRA, LoRA
from rankloom.errors import CompositionError
from rankloom.parts import kinds
from tests import zoo

FORMS = {
    "lora": LoRA(rank=3),
    "rslora": LoRA(rank=3, scaling="rslora"),
    "triplets": LoRA(rank=3, core="diagonal"),
    "dora": DoRA(rank=3),
    "dense": Dense(),
}
WITHOUT_PAIRS = ("triplets", "dense")
PRODUCT = list(itertools.product(kinds("optimizer"), kinds("init"), FORMS))


def composed(optimizer: str, init: str, form: str) -> Recipe:
    return zoo.tiny(Recipe(adapter=FORMS[form]).with_(optimizer=optimizer, init=init))


@pytest.mark.parametrize(("optimizer", "init", "form"), PRODUCT)
def test_every_optimizer_with_every_start_and_form(optimizer: str, init: str, form: str) -> None:
    recipe = composed(optimizer, init, form)
    try:
        recipe.check()
    except CompositionError as error:
        assert "needs" in str(error) and "it works with" in str(error)
        if "optimizer" in str(error).partition("needs")[0]:
            assert form in WITHOUT_PAIRS or optimizer == "projected"
        return
    handle = zoo.adapted(recipe, zoo.build("llama"), "llama")
    losses = zoo.train(handle, handle.optimizer(5e-3, total_steps=10), zoo.batches("llama", 1), 10)
    assert losses[-1] < losses[0] - 1e-3, losses
    assert all(torch.isfinite(p).all() for p in handle.parameters())


def test_the_product_is_not_refused_as_a_whole() -> None:
    """Of the forms with a trained pair, every optimizer for pairs takes every start that fits the form."""
    for optimizer in ("adamw", "lora-plus", "riemannian", "lora-pro", "allora"):
        for init, form in itertools.product(("kaiming", "gaussian", "one-step-gradient"), ("lora", "rslora", "dora")):
            composed(optimizer, init, form).check()


@pytest.mark.parametrize("optimizer", ["riemannian", "lora-pro", "allora", "lora-plus"])
def test_a_run_reports_the_optimizer_it_was_asked_for(optimizer: str) -> None:
    handle = rankloom.adapt(zoo.build("llama"), zoo.recipe_of(optimizer))
    assert handle.recipe.optimizer.kind == optimizer == rankloom.methods.get(optimizer).optimizer.kind
