"""Gradients, adapters and activations over a base stored in int8 (torchao)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import rankloom
from rankloom import Calibration, Targets
from rankloom.calibration import exact_gradients, gradient_svd
from rankloom.targets import find_targets
from tests import zoo


def quantized(seed: int = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        model = zoo.build("llama", seed, dtype=torch.float32, hidden_size=32, intermediate_size=48)
        quantization.quantize_(
            model,
            quantization.Int8WeightOnlyConfig(),
            filter_fn=lambda m, n: isinstance(m, nn.Linear) and "lm_head" not in n,
        )
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """The same function in plain float32: what the quantised weights stand for."""
    plain = zoo.build("llama", dtype=torch.float32, hidden_size=32, intermediate_size=48)
    own = dict(plain.named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                weight = module.weight
                own[name].weight.copy_(
                    weight.dequantize()
                    if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter
                    else weight
                )
    return plain


def data() -> list[dict[str, Any]]:
    return zoo.batches("llama")


def test_gradients_of_an_int8_base() -> None:
    model = quantized()
    targets = find_targets(model, Targets())
    assert not any(t.layer.plain for t in targets)
    got, _ = exact_gradients(model, targets, Calibration(data()))
    plain = dequantized(model)
    want, _ = exact_gradients(plain, find_targets(plain, Targets()), Calibration(data()))
    assert got.keys() == want.keys() and len(got) == 14
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-3, atol=1e-3 * float(want[name].abs().max()), msg=name)
    sketch = gradient_svd(model, targets, Calibration(data()), rank=4, oversample=40, passes=2)
    for name, svd in sketch.svds.items():
        torch.testing.assert_close(
            (svd.U * svd.S) @ svd.V.T, got[name], rtol=1e-3, atol=1e-4 * float(got[name].abs().max()), msg=name
        )


@pytest.mark.parametrize("method", rankloom.methods.TABLE)
def test_every_method_on_an_int8_base(method: str) -> None:
    recipe = zoo.recipe_of(method)
    model = quantized()
    before = zoo.logits(model, data()[0])
    stored = {t.name: t.layer.weight().clone() for t in find_targets(model, Targets())}
    handle = zoo.adapted(recipe, model, "llama")
    after = zoo.logits(model, data()[0])
    if recipe.init.moves_output:
        assert not torch.equal(before, after)
    elif "dense weights" in recipe.adapter.offers:  # a floating product in place of the quantised one
        torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)
    else:
        assert torch.equal(before, after)
    losses = zoo.train(handle, handle.optimizer(1e-2, total_steps=12), data()[:1], 12)
    assert losses[-1] < losses[0]
    for target in handle.targets:
        assert torch.equal(target.layer.weight(), stored[target.name])
    handle.detach()
    assert torch.equal(before, zoo.logits(model, data()[0]))
