"""LoKr and LoHa against real PEFT: the same factors give the same update, outputs and gradients, in float64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe
from rankloom.adapters import LoHa, LoKr
from rankloom.adapters.lokr import sides
from rankloom.init import OwnStart

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
