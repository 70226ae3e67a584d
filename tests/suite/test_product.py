"""Every init with every form that has factors: parametrised from the registry, so a new init is covered by being there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import AdapterPart, DoRA, LoRA
from rankloom.errors import CompositionError
from rankloom.parts import kinds
from rankloom.rank import AdaLoRA
from tests import zoo

SETTINGS = {"rank": 3, "alpha": 6.0}
FORMS: dict[str, AdapterPart] = {
    "lora": LoRA(**SETTINGS),
    "rslora": LoRA(**SETTINGS, scaling="rslora"),
    "dora": DoRA(**SETTINGS),
    "diagonal": LoRA(**SETTINGS, core="diagonal"),
    "diagonal-core-only": LoRA(**SETTINGS, core="diagonal", train="core"),
    "square": LoRA(**SETTINGS, core="square"),
    "xs": LoRA(**SETTINGS, core="square", train="core"),
    "fa": LoRA(**SETTINGS, train="B"),
    "frozen-b": LoRA(**SETTINGS, train="A"),
    "b-and-core": LoRA(**SETTINGS, core="square", train="B+core"),
    "dora-xs": DoRA(**SETTINGS, core="square", train="core"),
    "dora-fa": DoRA(**SETTINGS, train="B"),
    "dora-frozen-b": DoRA(**SETTINGS, train="A"),
}
INITS = [kind for kind, cls in kinds("init").items() if "factors" in cls().needs]
every_pair = pytest.mark.parametrize(("init", "form"), [(i, f) for i in INITS for f in FORMS])


def recipe(init: str, form: str) -> Recipe:
    made = Recipe(targets=Targets(("q_proj", "v_proj", "down_proj")), adapter=FORMS[form])
    return made.with_(init=init)


def clones(handle: rankloom.Adaptation) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in handle.state_dict().items()}


@every_pair
def test_starts_learns_merges_and_comes_back(init: str, form: str, tmp_path: Path) -> None:
    model, inputs = zoo.build("llama"), zoo.batch("llama", seed=5)
    before = zoo.logits(model, inputs)
    handle = zoo.adapted(recipe(init, form), model, "llama")
    assert torch.equal(before, zoo.logits(model, inputs)) is not handle.recipe.init.moves_output

    start = clones(handle)
    losses = zoo.train(handle, handle.optimizer(5e-3), zoo.batches("llama", 1), 6)
    assert losses[-1] < losses[0]
    for name in handle.named_parameters():
        assert not torch.equal(handle.state_dict()[name], start[name]), f"{name} is stuck at its start"
    frozen = start.keys() - handle.named_parameters().keys()
    assert all(torch.equal(handle.state_dict()[name], start[name]) for name in frozen)

    expected = zoo.logits(model, inputs)
    merged = zoo.merged_copy(handle, zoo.build("llama"))
    torch.testing.assert_close(zoo.logits(merged, inputs), expected, rtol=1e-10, atol=1e-10)
    handle.save(tmp_path / "adapter")
    again = rankloom.load(zoo.build("llama"), tmp_path / "adapter")
    assert torch.equal(zoo.logits(again.model, inputs), expected)
    report = handle.export(tmp_path / "peft")
    assert report["exact"]
    back = rankloom.load(zoo.build("llama"), tmp_path / "peft")
    torch.testing.assert_close(zoo.logits(back.model, inputs), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("init", INITS)
def test_pruning_composes_with_starts_that_subtract_nothing(init: str) -> None:
    """A pruned component of an offset form would leave its start subtracted: refused, with what works instead."""
    made = recipe(init, "diagonal").with_(rank=AdaLoRA(target_rank=2, interval=1))
    if made.init.offset:
        with pytest.raises(CompositionError, match=rf"'adalora' needs a start without offset, which init '{init}'"):
            made.check()
        return
    handle = zoo.adapted(made, zoo.build("llama"), "llama")
    zoo.train(handle, handle.optimizer(1e-2, total_steps=10), zoo.batches("llama", 1), 10)
    live = [int(b.adapter.mask.sum()) for b in handle.bindings]
    assert sum(live) == 2 * len(live)


@pytest.mark.parametrize("train", ["B", "core"])
def test_pruning_needs_everything_trained(train: Any) -> None:
    made = Recipe(adapter=LoRA(core="diagonal", train=train), rank=AdaLoRA())
    with pytest.raises(CompositionError, match=r"needs ranked components.*lora\(core=diagonal\)"):
        made.check()
