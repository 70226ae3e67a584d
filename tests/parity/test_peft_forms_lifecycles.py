"""Against PEFT: LoRA on the experts' 3-D parameters, the same factors in both."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import LoRA
from tests import zoo

peft = pytest.importorskip("peft", reason="PEFT, the oracle, is not installed")

RANK, EXPERTS = 3, 4


@pytest.mark.parametrize("kind", ["mixtral", "qwen-moe"])
def test_lora_on_experts(kind: str) -> None:
    handle = rankloom.adapt(
        zoo.build(kind), Recipe(Targets(("gate_up_proj", "down_proj")), LoRA(rank=RANK, alpha=6)), seed=1
    )
    zoo.perturb(handle)
    own = handle.named_parameters()
    config = peft.LoraConfig(
        r=RANK, lora_alpha=6, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    theirs = peft.get_peft_model(zoo.build(kind), config).double().eval()
    pairs: list[tuple[list[str], Any, Any]] = []
    for name, module in theirs.named_modules():
        if type(module).__name__ == "ParamWrapper":
            layer = re.search(r"layers\.\d+", name)
            assert layer is not None
            stack = f"model.{layer[0]}.mlp.experts.{module.parameter_name}"
            names = [f"{stack}[{expert}]" for expert in range(EXPERTS)]
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            with torch.no_grad():  # experts one below the other in A; the fastest index of B's columns
                a.copy_(torch.cat([own[f"{n}.A"] for n in names]))
                b.copy_(torch.stack([own[f"{n}.B"] for n in names], -1).flatten(1))
            pairs.append((names, a, b))
    assert len(pairs) == 4
    inputs = zoo.batch(kind)
    torch.testing.assert_close(zoo.logits(handle.model, inputs), zoo.logits(theirs, inputs), rtol=1e-9, atol=1e-9)
    handle.model(**inputs).loss.backward()
    theirs(**inputs).loss.backward()
    for names, a, b in pairs:
        torch.testing.assert_close(torch.cat([own[f"{n}.A"].grad for n in names]), a.grad, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(
            torch.stack([own[f"{n}.B"].grad for n in names], -1).flatten(1), b.grad, rtol=1e-8, atol=1e-10
        )
