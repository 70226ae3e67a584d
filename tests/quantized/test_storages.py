"""Everything an adaptation does, over a base in each quantised storage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankloom
from rankloom import Calibration, Targets
from rankloom.calibration import exact_gradients, gradient_svd
from rankloom.quantized import is_quantized
from rankloom.targets import find_targets
from tests import zoo
from tests.quantized.bases import STORAGES, close, data, dequantized, every_storage, plain, quantized

every_method = pytest.mark.parametrize("method", rankloom.methods.TABLE)


@every_storage
def test_gradients_and_sketch_are_those_of_the_dequantised_base(storage: str) -> None:
    model = quantized(storage)
    targets = find_targets(model, Targets())
    assert not any(t.layer.plain for t in targets)
    got, _ = exact_gradients(model, targets, Calibration(data()))
    reference = dequantized(model)
    want, _ = exact_gradients(reference, find_targets(reference, Targets()), Calibration(data()))
    assert got.keys() == want.keys() and len(got) == 14
    for name, gradient in got.items():
        close(gradient, want[name], msg=name)
    sketch = gradient_svd(model, targets, Calibration(data()), rank=4, oversample=60, passes=2)
    for name, svd in sketch.svds.items():
        close((svd.U * svd.S) @ svd.V.T, got[name], msg=name)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))  # as they were


@every_storage
@every_method
def test_every_method(method: str, storage: str) -> None:
    recipe = zoo.recipe_of(method)
    model = quantized(storage)
    before = zoo.logits(model, data()[0])
    layers = {t.name: t.layer for t in find_targets(model, Targets())}
    stored = {name: layer.weight().clone() for name, layer in layers.items()}
    handle = zoo.adapted(recipe, model, "llama")
    after = zoo.logits(model, data()[0])
    if recipe.init.moves_output:
        assert not torch.equal(before, after)
    elif "dense weights" in recipe.adapter.offers:  # a floating product in place of the quantised one
        close(after, before, 1e-2)
    else:
        assert torch.equal(before, after)
    losses = zoo.train(handle, handle.optimizer(1e-2, total_steps=12), data()[:1], 12)
    assert losses[-1] < losses[0]
    for name, layer in layers.items():
        assert torch.equal(layer.weight(), stored[name])
    handle.detach()
    assert torch.equal(before, zoo.logits(model, data()[0]))


@every_storage
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training_is_that_over_the_dequantised_base(method: str, storage: str) -> None:
    model = quantized(storage)
    losses, deltas = [], []
    for base in (dequantized(model), model):
        handle = zoo.adapted(method, base, "llama")
        zoo.perturb(handle)
        losses.append(zoo.train(handle, handle.optimizer(1e-2, total_steps=6), data(), 6))
        deltas.append([b.adapter.delta(b.layer).detach() for b in handle.bindings])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for got, want in zip(*reversed(deltas), strict=True):
        close(got, want, 2e-2)  # AdamW's first steps are signs: rounding shows where a gradient is near zero


@every_storage
def test_doras_norm_is_that_of_the_dequantised_weight(storage: str) -> None:
    handle = zoo.adapted("dora", quantized(storage), "llama")
    zoo.perturb(handle)
    for b in handle.bindings:
        direction = b.layer.weight().double() + b.adapter.scale * (b.adapter.B @ b.adapter.A).double()
        torch.testing.assert_close(b.adapter.norm(b.layer).double(), direction.norm(dim=1), rtol=1e-5, atol=0)


@every_storage
def test_gradients_pass_layers_that_carry_no_adapter(storage: str) -> None:
    """First layer's queries only: every other quantised layer lies between them and the loss."""
    model = quantized(storage)
    recipe = zoo.recipe_of("lora").with_(targets={"modules": ("*.layers.0.self_attn.q_proj",)})
    grads = []
    for base in (dequantized(model), model):
        handle = zoo.adapted(recipe, base, "llama")
        zoo.perturb(handle)
        base(**data()[0]).loss.backward()
        grads.append([p.grad for p in handle.parameters()])
        handle.detach()
        assert all(type(m) is nn.Linear for m in base.modules() if isinstance(m, nn.Linear))
    for got, want in zip(grads[1], grads[0], strict=True):
        close(got, want, 1e-4)


@every_storage
def test_gradient_checkpointing_changes_nothing(storage: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = quantized(storage)
        handle = zoo.adapted("lora", model, "llama")
        zoo.perturb(handle)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()(**data()[0]).loss.backward()
        grads.append([p.grad for p in handle.parameters()])
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


@every_storage
def test_save_load_and_resume(storage: str, tmp_path: Path) -> None:
    first = zoo.adapted("lora-one", quantized(storage), "llama")
    optimizer = first.optimizer(1e-2, total_steps=8)
    zoo.train(first, optimizer, data(), 4)
    first.save(tmp_path / "adapter")
    state = copy.deepcopy(optimizer.state_dict())
    expected = zoo.train(first, optimizer, data(), 4, start=4)

    second = rankloom.load(quantized(storage), tmp_path / "adapter")
    resumed = second.optimizer(1e-2, total_steps=8)
    resumed.load_state_dict(state)
    assert zoo.train(second, resumed, data(), 4, start=4) == expected
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_storage_is_another_base(tmp_path: Path) -> None:
    zoo.adapted("lora", quantized("int8"), "llama").save(tmp_path / "adapter")
    for other in (plain(), quantized("int4-packed")):
        with pytest.raises(rankloom.errors.FingerprintError, match="14 of"):
            rankloom.load(other, tmp_path / "adapter")
    rankloom.load(plain(), tmp_path / "adapter", force=True)


@every_storage
def test_merging_dequantises_and_says_so(storage: str) -> None:
    model = quantized(storage)
    before = zoo.logits(model, data()[0])
    handle = zoo.adapted("lora", model, "llama")
    zoo.perturb(handle, 0.2)
    adapted = zoo.logits(model, data()[0])
    report = handle.merge()
    assert "merged 14 weights (14 of them dequantised: their storage cannot hold the sum) into float32" in str(report)
    assert not any(is_quantized(t.layer.stored) for t in handle.targets)
    close(zoo.logits(model, data()[0]), adapted, 1e-4)
    handle.unmerge()
    assert all(is_quantized(t.layer.stored) for t in handle.targets)
    assert torch.equal(zoo.logits(model, data()[0]), adapted)
    handle.detach()
    assert torch.equal(zoo.logits(model, data()[0]), before)


@every_storage
def test_exporting_writes_a_dense_model_that_loads_anywhere(storage: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = quantized(storage)
    recipe = zoo.recipe_of("lora").with_(targets={"modules": ("q_proj", "v_proj")})
    handle = zoo.adapted(recipe, model, "llama")
    zoo.perturb(handle, 0.2)
    told = handle.export(tmp_path / "merged", "merged")
    assert told["dequantized"] == 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert not any(is_quantized(p) for p in loaded.parameters())
    close(zoo.logits(loaded, data()[0]), zoo.logits(model, data()[0]), 1e-3)
    assert all(is_quantized(t.layer.stored) for t in handle.targets)


@every_storage
def test_a_copy_is_independent(storage: str) -> None:
    handle = zoo.adapted("lora", quantized(storage), "llama")
    zoo.perturb(handle)
    twin = copy.deepcopy(handle.model)
    out = zoo.logits(twin, data()[0])
    assert torch.equal(out, zoo.logits(handle.model, data()[0]))
    zoo.perturb(handle)
    assert torch.equal(out, zoo.logits(twin, data()[0]))


@pytest.mark.parametrize("storage", [s for s in STORAGES if s != "int4-unpacked"])
def test_bfloat16(storage: str) -> None:
    model = quantized(storage, torch.bfloat16)
    before = zoo.logits(model, data()[0])
    handle = zoo.adapted("lora", model, "llama")
    assert torch.equal(zoo.logits(model, data()[0]), before)
    assert handle.parameters()[0].dtype == torch.float32
    losses = zoo.train(handle, handle.optimizer(1e-2, total_steps=12), data()[:1], 12)
    assert losses[-1] < losses[0]


def test_a_quantised_weight_cannot_be_trained_whole() -> None:
    recipe: Any = zoo.recipe_of("lora").with_(targets={"modules": ("q_proj",), "train": ("*.layers.0.mlp.up_proj",)})
    with pytest.raises(rankloom.errors.TargetError, match=r"up_proj\.weight is stored as Int8Tensor .*base\.exclude"):
        rankloom.adapt(quantized("int8"), recipe)
