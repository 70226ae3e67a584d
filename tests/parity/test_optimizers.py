"""Against PEFT's own LoRA+ and Riemannian optimizers, in float64: the same adapters, data and steps; differences are named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import DoRA, LoRA
from rankloom.optim import LoRAPlus, OptimizerPart, Riemannian
from tests import zoo

peft = pytest.importorskip("peft")
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer  # noqa: E402

STEPS, LR = 6, 1e-2


def trained_here(recipe: Recipe, part: OptimizerPart, kind: str, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Train from a perturbed start, which is exported first; tensors by target and factor."""
    handle = zoo.adapted(recipe.with_(optimizer=part), zoo.build(kind), kind)
    zoo.perturb(handle)
    handle.export(folder)
    zoo.train(handle, handle.optimizer(LR, **options), zoo.batches(kind), STEPS)
    return {name: tensor.clone() for name, tensor in handle.state_dict().items()}


def trained_there(make: Callable[[nn.Module], torch.optim.Optimizer], kind: str, folder: Path) -> dict[str, Tensor]:
    """The exported start, trained in PEFT with its optimizer; tensors under our names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about settings it corrects
        model = peft.PeftModel.from_pretrained(zoo.build(kind), folder, is_trainable=True)
    model.train()
    optimizer = make(model)
    for step in range(STEPS):
        batches = zoo.batches(kind)
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    names = {"lora_A.default.weight": "A", "lora_B.default.weight": "B", "lora_magnitude_vector.default.weight": "m"}
    names |= {"lora_embedding_A.default": "A", "lora_embedding_B.default": "B"}
    found = {}
    for name, parameter in model.named_parameters():
        for theirs, ours in names.items():
            if name.endswith(theirs):
                found[name.removeprefix("base_model.model.").removesuffix(theirs) + ours] = parameter.detach()
    return found


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 3
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def changed(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[str]:
    """Which factors differ by more than rounding."""
    return {n.rpartition(".")[2] for n, t in ours.items() if not torch.allclose(t, theirs[n], rtol=1e-6, atol=1e-8)}


PLAIN = Recipe(adapter=LoRA(rank=3, alpha=5))
WITH_TABLE = Recipe(targets=Targets(("embed_tokens", "q_proj")), adapter=LoRA(rank=3, alpha=5))


def loraplus(**settings: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=16.0, **{"loraplus_weight_decay": 0.0, **settings}
    )


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("recipe", [PLAIN, WITH_TABLE], ids=["linears", "embedding"])
def test_lora_plus(recipe: Recipe, decay: float, tmp_path: Path) -> None:
    ours = trained_here(recipe, LoRAPlus(lr_ratio=16.0), "llama", tmp_path, weight_decay=decay)
    assert_same(ours, trained_there(loraplus(loraplus_weight_decay=decay), "llama", tmp_path))


def test_lora_plus_on_magnitudes(tmp_path: Path) -> None:
    """DoRA's magnitudes follow B's rate in both; the released code also lets them decay, which we never do to vectors."""
    recipe = Recipe(adapter=DoRA(rank=3, alpha=5))
    ours = trained_here(recipe, LoRAPlus(lr_ratio=16.0), "llama", tmp_path)
    assert_same(ours, trained_there(loraplus(), "llama", tmp_path))
    ours = trained_here(recipe, LoRAPlus(lr_ratio=16.0), "llama", tmp_path / "decay", weight_decay=0.1)
    theirs = trained_there(loraplus(loraplus_weight_decay=0.1), "llama", tmp_path / "decay")
    assert "m" in changed(ours, theirs)


def test_a_plain_weight_decay_is_ignored_there_and_heard_here(tmp_path: Path) -> None:
    with_, without = (trained_there(loraplus(**kw), "llama", _exported(tmp_path)) for kw in ({"weight_decay": 0.1}, {}))
    assert all(torch.equal(t, without[n]) for n, t in with_.items())
    ours = trained_here(PLAIN, LoRAPlus(lr_ratio=16.0, weight_decay=0.1), "llama", tmp_path / "ours")
    assert changed(ours, without) == {"A", "B"}


def _exported(folder: Path) -> Path:
    if not folder.joinpath("adapter_config.json").exists():
        trained_here(PLAIN, LoRAPlus(), "llama", folder)
    return folder


INNER = {"adamw": (torch.optim.AdamW, {"weight_decay": 0.0}), "sgd": (torch.optim.SGD, {})}


def riemannian(inner: str, reg: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    cls, settings = INNER[inner]
    return lambda model: create_riemannian_optimizer(model, cls, lr=LR, reg=reg, **settings)


@pytest.mark.parametrize("reg", [1e-2, 1e-6])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("recipe", [PLAIN, Recipe(adapter=DoRA(rank=3, alpha=5))], ids=["lora", "dora"])
def test_riemannian(recipe: Recipe, inner: str, reg: float, tmp_path: Path) -> None:
    ours = trained_here(recipe, Riemannian(inner=inner, damping=reg), "llama", tmp_path)  # type: ignore[arg-type]
    assert_same(ours, trained_there(riemannian(inner, reg), "llama", tmp_path))


def test_riemannian_on_an_embedding(tmp_path: Path) -> None:
    """A look-up table is a linear map of one-hot rows, so its pair is preconditioned here; PEFT leaves it alone."""
    ours = trained_here(WITH_TABLE, Riemannian(inner="sgd", damping=1e-2), "llama", tmp_path)
    theirs = trained_there(riemannian("sgd", 1e-2), "llama", tmp_path)
    names = {n for n in ours if n.startswith("model.embed_tokens")}
    assert len(names) == 2 and all(not torch.allclose(ours[n], theirs[n], rtol=1e-4) for n in names)


def test_peft_runs_step_hooks_twice_and_we_once(tmp_path: Path) -> None:
    """Its optimizer is a subclass of AdamW made on the fly; torch wraps the step of both classes once both have been used."""
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(zoo.build("llama"), _exported(tmp_path), is_trainable=True)
    handle = rankloom.adapt(zoo.build("llama"), Recipe(adapter=LoRA(rank=3), optimizer=Riemannian()))
    counts = []
    for optimizer, net in ((riemannian("adamw", 1e-2)(model), model), (handle.optimizer(LR), handle.model)):
        calls: list[int] = []
        optimizer.register_step_pre_hook(lambda *_, c=calls: c.append(1))
        net(**zoo.batch("llama")).loss.backward()
        optimizer.step()
        counts.append(len(calls))
    assert counts == [2, 1]
