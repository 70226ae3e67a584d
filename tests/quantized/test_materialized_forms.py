"""Forms that form their update, over quantised bases: the layer's own product stays to the bit, the update's is added."""

from __future__ import annotations

import pytest
import torch

from tests import zoo
from tests.quantized.bases import data, dequantized, quantized


@pytest.mark.parametrize("method", ["bat", "sara", "snell"])
def test_a_quantised_base_starts_exactly_and_trains_as_its_dequantised_twin(method: str) -> None:
    model = quantized("int8")
    before, losses = zoo.logits(model, data()[0]), []
    for base in (dequantized(model), model):
        handle = zoo.adapted(method, base, "llama")
        if base is model:
            assert torch.equal(zoo.logits(model, data()[0]), before)
        losses.append(zoo.train(handle, handle.optimizer(1e-2, total_steps=4), data(), 4))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[1][-1] < losses[1][0]
