"""The shared models: called alike, repeatable, with a loss that has a gradient."""

from __future__ import annotations

import pytest
import torch

from tests import zoo


@pytest.mark.parametrize("kind", zoo.MODELS)
def test_models_are_seeded_and_called_alike(kind: str) -> None:
    model, again = zoo.build(kind), zoo.build(kind)
    inputs = zoo.batch(kind)
    assert torch.equal(zoo.logits(model, inputs), zoo.logits(again, inputs))
    out = model(**inputs)
    assert out.logits.dtype == torch.float64
    out.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not torch.equal(zoo.logits(model, inputs), zoo.logits(model, zoo.batch(kind, seed=1)))
