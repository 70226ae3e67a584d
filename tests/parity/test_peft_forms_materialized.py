"""Against PEFT's own layers of the same form, in float64: the forward, the merged weight and the gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import BAT, MiSS
from rankloom.init import OwnStart

peft = pytest.importorskip("peft")

CASES: dict[str, tuple[Any, dict[str, Any], tuple[int, int]]] = {
    "miss": (MiSS(rank=4), {"r": 4}, (12, 8)),
    "miss, ragged": (MiSS(rank=5), {"r": 5}, (12, 8)),
    "mini": (MiSS(rank=4, mini=2), {"r": 4, "init_weights": "mini", "mini_r": 2}, (12, 8)),
    "bat": (BAT(rank=4), {"r": 4, "init_weights": "bat"}, (12, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_form(case: str) -> None:
    form, settings, (width, out) = CASES[case]
    model, twin = (nn.Sequential(nn.Linear(width, out)).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    handle = rankloom.adapt(model, Recipe(Targets(("0",)), form, OwnStart()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(twin, peft.MissConfig(target_modules=["0"], **settings))
    (own,) = handle.parameters()
    (other,) = [p for p in theirs.parameters() if p.requires_grad]
    assert own.shape == other.shape
    with torch.no_grad():
        own.normal_(std=0.2)
        other.data = own.detach().clone()
    x = torch.randn(3, width, dtype=torch.float64)
    y, want = model(x), theirs(x)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(y)
    y.backward(pull)
    want.backward(pull)
    torch.testing.assert_close(own.grad, other.grad, rtol=1e-11, atol=1e-11)
    handle.merge()
    torch.testing.assert_close(model[0].weight, theirs.merge_and_unload()[0].weight, rtol=1e-12, atol=1e-12)
