"""LoKr and LoHa against real PEFT: the same factors give the same update, outputs and gradients, in float64."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankloom
from rankloom import Recipe
from rankloom.adapters import LoHa, LoKr
from rankloom.adapters.lokr import sides
from rankloom.errors import ArtifactError
from rankloom.init import OwnStart
from tests import zoo

peft = pytest.importorskip("peft")


class Layers(nn.Module):
    """A convolution of stride two, a linear of unequal sides, one between primes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 12, 3, stride=2, padding=1)
        self.wide = nn.Linear(12, 40)
        self.prime = nn.Linear(40, 13)

    def forward(self, x: Tensor) -> Tensor:
        return self.prime(torch.tanh(self.wide(self.conv(x).flatten(2).mT)))


def model() -> Layers:
    torch.manual_seed(0)
    return Layers().double()


def by_peft(config: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model(), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return made


def compare(config: Any, ours: Any, prefix: str) -> None:
    """Copies PEFT's factors, then outputs, updates and every gradient."""
    theirs = by_peft(config)
    recipe = Recipe(adapter=ours, init=OwnStart()).with_(targets={"modules": ("conv", "wide", "prime")})
    handle = rankloom.adapt(model(), recipe)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    pairs = []
    for b in handle.bindings:
        layer = theirs.base_model.model.get_submodule(b.name)
        for name, p in b.adapter.named_parameters():
            source = getattr(layer, prefix + name)["default"]
            with torch.no_grad():
                p.copy_(source.reshape(p.shape))
            pairs.append((p, source))
        held = [key for key in layer.adapter_layer_names if "default" in getattr(layer, key)]
        assert len(held) == sum(1 for _ in b.adapter.parameters())  # nothing of theirs is left over
        delta = b.adapter.delta(b.layer)
        torch.testing.assert_close(delta, layer.get_delta_weight("default").reshape(delta.shape))
    got, want = handle.model(x), theirs(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    pull = torch.randn_like(got)
    got.backward(pull)
    want.backward(pull)
    for p, source in pairs:
        torch.testing.assert_close(p.grad, source.grad.reshape(p.shape), rtol=1e-9, atol=1e-9)


TARGETS = {"target_modules": ["conv", "wide", "prime"]}
SETTINGS = [
    {"rank": 2, "alpha": 3},
    {"rank": 1, "decompose_both": True},
    {"rank": 1, "decompose_both": True, "decompose_factor": 4},
    {"rank": 3, "decompose_factor": 3},
    {"rank": 50, "decompose_both": True, "decompose_factor": 2},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_lokr(settings: dict[str, Any]) -> None:
    theirs = {"r" if key == "rank" else key: value for key, value in settings.items()}
    compare(peft.LoKrConfig(**theirs, **TARGETS), LoKr(**settings), "lokr_")


def test_lokr_factorises_dimensions_as_peft_does() -> None:
    from peft.tuners.lokr.layer import factorization

    for dimension in [*range(1, 150), 576, 577, 1536, 4096, 11008]:
        for factor in (-1, 1, 2, 3, 4, 8, 12, 20, 64, 500):
            assert sides(dimension, factor) == tuple(factorization(dimension, factor)), (dimension, factor)


@pytest.mark.parametrize("rank", [1, 2, 5])  # thin everywhere, somewhere, nowhere
def test_loha(rank: int) -> None:
    # Twice the rank: PEFT rounds alpha / r to float32, which only such a ratio survives.
    compare(peft.LoHaConfig(r=rank, alpha=2 * rank, **TARGETS), LoHa(rank=rank, alpha=2 * rank), "hada_")


# --- what PEFT saves --------------------------------------------------------------------------------------------------------


def saved_by_peft(config: Any, kind: str, folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(zoo.build(kind), config).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in made.parameters():
                if p.requires_grad:
                    p += 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        made.save_pretrained(folder)
    return zoo.logits(made, zoo.batch(kind))


LLAMA = {"target_modules": ["q_proj", "down_proj"]}
SAVED = {
    "lokr": ("llama", lambda: peft.LoKrConfig(r=1, alpha=3, **LLAMA)),
    "lokr-both": ("llama", lambda: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=2, **LLAMA)),
    "lokr-whole-head": (
        "llama",
        lambda: peft.LoKrConfig(r=4, init_weights="lycoris", modules_to_save=["lm_head"], **LLAMA),
    ),
    "lokr-convolution": ("convnet", lambda: peft.LoKrConfig(r=1, target_modules=["stem", "body", "mix"])),
    "loha": ("llama", lambda: peft.LoHaConfig(r=2, alpha=3, **LLAMA)),
    "loha-convolution": ("convnet", lambda: peft.LoHaConfig(r=1, target_modules=["stem", "body", "mix"])),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_peft_saves_loads_here(name: str, tmp_path: Path) -> None:
    kind, config = SAVED[name]
    expected = saved_by_peft(config(), kind, tmp_path / "peft")
    model = zoo.build(kind)
    handle = rankloom.load(model, tmp_path / "peft")
    assert handle.recipe.adapter.kind == name[:4] and handle.report["peft_type"] == name[:4].upper()
    torch.testing.assert_close(zoo.logits(model, zoo.batch(kind)), expected, rtol=0, atol=1e-9)
    handle.save(tmp_path / "ours")  # an ordinary adaptation from here on
    handle.detach()
    rankloom.load(model, tmp_path / "ours")
    torch.testing.assert_close(zoo.logits(model, zoo.batch(kind)), expected, rtol=0, atol=1e-9)


def another(rank: int) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, held: config.update(r=rank)


BROKEN: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "rank": (another(5), r"down_proj has w1 \(4, 4\), w2_a .*adapter_config.json and this model say"),
    "a lost tensor": (lambda config, held: held.pop(next(k for k in held if k.endswith("w1"))), "down_proj has w2_a"),
    "a lost module": (
        lambda config, held: [held.pop(k) for k in list(held) if "layers.1.self_attn.q_proj" in k],
        r"1 of 4 modules that adapter_config.json targets have no tensors",
    ),
    "a stranger": (
        lambda config, held: held.update({"base_model.model.other.lokr_w1": torch.ones(2, 2)}),
        "adapts other, which this model does not have",
    ),
    "a Tucker core": (lambda config, held: config.update(use_effective_conv2d=True), "sets use_effective_conv2d"),
    "patterns": (lambda config, held: config.update(rank_pattern={"q_proj": 2}), "sets rank_pattern"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    spoil, message = BROKEN[case]
    saved_by_peft(peft.LoKrConfig(r=1, **LLAMA), "llama", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    held = load_file(tmp_path / "adapter_model.safetensors")
    spoil(config, held)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=message):
        rankloom.load(zoo.build("llama"), tmp_path)
