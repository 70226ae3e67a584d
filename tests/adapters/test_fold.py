"""An offset folded into a copy of the weight: the same function, update and gradients as the second low-rank term."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import DoRA, LoRA
from rankloom.errors import CompositionError, TargetError
from rankloom.init import WeightSVD
from tests import zoo

FORMS = {
    "lora": LoRA(rank=3, alpha=6.0),
    "square": LoRA(rank=3, core="square"),
    "diagonal core": LoRA(rank=3, core="diagonal", train="core"),
    "frozen A": LoRA(rank=3, train="B"),
    "dora": DoRA(rank=3),
}


def recipe(form: str, fold: bool) -> Recipe:
    made = Recipe(targets=Targets(("q_proj", "v_proj", "down_proj")), adapter=FORMS[form], init=WeightSVD())
    return made.with_({"adapter.fold": fold})


@pytest.mark.parametrize("form", FORMS)
def test_a_folded_run_is_the_unfolded_one(form: str, tmp_path: Path) -> None:
    data, inputs, results = zoo.batches("llama", 2), zoo.batch("llama", seed=5), []
    bare = zoo.logits(zoo.build("llama"), inputs)
    for fold in (False, True):
        handle = zoo.adapted(recipe(form, fold), zoo.build("llama"), "llama")
        start = zoo.logits(handle.model, inputs)
        assert torch.allclose(start, bare, rtol=0, atol=1e-12)
        if not fold:
            assert torch.equal(start, bare)
        losses = zoo.train(handle, handle.optimizer(5e-3), data, 5)
        results.append((losses, zoo.logits(handle.model, inputs), handle))
    (losses, out, plain), (losses_folded, out_folded, folded) = results
    torch.testing.assert_close(losses_folded, losses, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out_folded, out, rtol=1e-8, atol=1e-9)
    for one, other in zip(plain.bindings, folded.bindings, strict=True):
        torch.testing.assert_close(other.adapter.delta(other.layer), one.adapter.delta(one.layer), rtol=1e-6, atol=1e-8)
    folded.save(tmp_path / "adapter")
    again = rankloom.load(zoo.build("llama"), tmp_path / "adapter")
    assert torch.equal(zoo.logits(again.model, inputs), out_folded)


def test_what_a_step_multiplies_is_the_folded_weight() -> None:
    handle = zoo.adapted(recipe("lora", True), zoo.build("llama"), "llama")
    binding = handle.bindings[0]
    weight, x = binding.layer.weight().clone(), torch.randn(2, 16, dtype=torch.float64)
    operands = binding.adapter.operands(x, binding.layer)
    b, a = (t.detach() for t in (binding.adapter.B, binding.adapter.A))
    torch.testing.assert_close(operands.weight, weight - binding.adapter.scale * b @ a, rtol=1e-13, atol=1e-13)
    assert operands.a.shape == (3, 16) and operands.b.shape == (16, 3)  # rank r, where the unfolded term has 2r
    assert binding.adapter.operands(x, binding.layer).weight is operands.weight  # made once
    assert torch.equal(weight, binding.layer.weight())


def test_a_start_loaded_later_is_folded_anew() -> None:
    first = zoo.adapted(recipe("lora", True), zoo.build("llama"), "llama")
    zoo.train(first, first.optimizer(1e-2), zoo.batches("llama", 1), 2)
    second = zoo.adapted(recipe("lora", True).with_(init={"kind": "weight-qr"}), zoo.build("llama"), "llama")
    inputs = zoo.batch("llama")
    assert not torch.equal(zoo.logits(first.model, inputs), zoo.logits(second.model, inputs))
    second.load_state_dict({n: t.clone() for n, t in first.state_dict().items()})
    assert torch.equal(zoo.logits(first.model, inputs), zoo.logits(second.model, inputs))


def test_folding_needs_an_offset_and_a_plain_linear_weight() -> None:
    with pytest.raises(CompositionError, match=r"needs a start with an offset.*init 'weight-svd'"):
        Recipe(adapter=LoRA(fold=True)).check()
    made = Recipe(targets=Targets(("c_attn",)), adapter=LoRA(rank=2, fold=True), init=WeightSVD())
    with pytest.raises(TargetError, match=r"c_attn is none \(Conv1D\): drop adapter.fold"):
        made.check(zoo.build("gpt2"))
