"""CorDA's start (2406.05223): the card's invariants in float64, PEFT as the oracle."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankloom import Calibration, Recipe, Targets, adapt
from rankloom.adapters import LoRA
from rankloom.calibration import activation_covariances
from rankloom.errors import DataError
from rankloom.init import CovarianceSVD
from rankloom.init.covariance_svd import damped_inverse
from rankloom.targets import find_targets
from tests import zoo

RANK, ALPHA = 3, 7.0
MODULES = ("q_proj", "o_proj", "up_proj", "down_proj")


def started(mode: Any, model: nn.Module, data: Any, modules: Any = MODULES, rank: int = RANK) -> Any:
    recipe = Recipe(targets=Targets(modules), adapter=LoRA(rank=rank, alpha=ALPHA), init=CovarianceSVD(mode))
    return adapt(model, recipe, data)


@pytest.mark.parametrize(("kind", "modules"), [("llama", MODULES), ("gpt2", ("c_attn", "c_fc"))])
@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_the_start_is_the_oriented_part_of_the_weight(mode: str, kind: str, modules: Any) -> None:
    data = Calibration(zoo.batches(kind))
    model = zoo.build(kind)
    covariances = activation_covariances(model, find_targets(model, Targets(modules)), data)
    handle = started(mode, model, data, modules)
    for b in handle.bindings:
        w, c = b.layer.weight(), covariances[b.name]
        c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
        u, s, vh = torch.linalg.svd(w @ c, full_matrices=False)
        right = vh @ torch.linalg.inv(c)
        torch.testing.assert_close((u * s) @ right, w, rtol=1e-8, atol=1e-10)  # all components are the weight
        pick = slice(None, RANK) if mode == "instruction" else slice(-RANK, None)
        start = b.adapter.scale * b.adapter.B @ b.adapter.A
        torch.testing.assert_close(start, (u[:, pick] * s[pick]) @ right[pick], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            b.adapter.B.T @ b.adapter.B, torch.diag(s[pick] / b.adapter.scale), rtol=1e-6, atol=1e-9
        )
        assert not b.adapter.delta(b.layer).any()


def test_white_inputs_give_pissa_and_milora() -> None:
    """Invariant 3, with ``C = I`` made of the inputs themselves."""
    model, x = nn.ModuleDict({"one": nn.Linear(6, 5)}).double(), 6**0.5 * torch.eye(6, dtype=torch.float64)
    data = Calibration([x], lambda m, b: (m["one"](b).sum(), 1.0))
    u, s, vh = torch.linalg.svd(model["one"].weight.detach(), full_matrices=False)
    for mode, pick in (("instruction", slice(None, RANK)), ("knowledge", slice(-RANK, None))):
        handle = started(mode, model, data, ("one",))
        b = handle.bindings[0]
        start = b.adapter.scale * b.adapter.B @ b.adapter.A
        torch.testing.assert_close(start, (u[:, pick] * s[pick]) @ vh[pick], rtol=1e-9, atol=1e-11)
        handle.detach()


def test_covariance_is_the_mean_over_tokens_that_count() -> None:
    model = zoo.build("llama")
    target = find_targets(model, Targets(("layers.1.self_attn.q_proj",)))
    parts = zoo.batches("llama", 3)
    whole = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    rows: list[Tensor] = []
    hook = model.get_submodule(target[0].module_name).register_forward_pre_hook(lambda m, a: rows.append(a[0]))
    model(**whole)
    hook.remove()
    keep = whole.get("attention_mask", torch.ones_like(whole["input_ids"])).bool() & (whole["labels"] != -100)
    x = rows[0][keep]
    for batches in (parts, [whole]):
        (found,) = activation_covariances(model, target, Calibration(batches)).values()
        torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-10, atol=1e-12)


def test_damping_doubles_until_the_inverse_is_one() -> None:
    thin = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    covariance = thin.T @ thin  # rank 3 of 40
    damped, inverse = damped_inverse(covariance)
    assert torch.linalg.matrix_norm(damped @ inverse - torch.eye(40)) < 0.05
    torch.testing.assert_close(damped - covariance, 0.01 * covariance.diagonal().mean() * torch.eye(40))
    stiff, _ = damped_inverse(covariance, damping=1e-12)
    assert float((stiff - covariance).diagonal().mean() / covariance.diagonal().mean()) > 1e-11
    for broken in (torch.zeros(3, 3), torch.full((3, 3), float("nan"))):
        with pytest.raises(DataError, match="all zero or not finite"):
            damped_inverse(broken)


@pytest.mark.parametrize(("theirs", "ours"), [("ipm", "instruction"), ("kpm", "knowledge")])
def test_the_product_is_pefts(theirs: str, ours: str) -> None:
    """One row of tokens without padding: PEFT's division by the largest activation only rescales the covariance, which
    leaves ``B A`` alone and moves the balance between the factors."""
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    modules = ["q_proj", "o_proj", "down_proj"]
    ids = torch.randint(1, zoo.VOCAB, (1, 30), generator=torch.Generator().manual_seed(0))
    model = zoo.build("llama", dtype=torch.float32)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=modules,
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method=theirs),
        )
        preprocess_corda(model, config, run_model=lambda: model(ids))
        made = peft.get_peft_model(model, config)
    layers = {n.removeprefix("base_model.model."): m for n, m in made.named_modules() if hasattr(m, "lora_A")}
    data = Calibration([{"input_ids": ids, "labels": ids}])
    handle = started(ours, zoo.build("llama", dtype=torch.float32), data, tuple(modules))
    unbalanced = 0
    for b in handle.bindings:
        module = layers[b.name]
        a, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        want, got = (up @ a).detach(), (b.adapter.B @ b.adapter.A).detach()
        assert float((got - want).norm() / want.norm()) < 2e-2, b.name  # float32 inverses of damped covariances
        unbalanced += not torch.allclose(up.norm(dim=0), b.adapter.B.norm(dim=0), rtol=0.05)
        assert torch.equal(b.layer.weight(), base[f"{b.name}.weight"])
    assert unbalanced == len(handle.bindings)
