"""Forms on vision backbones with real images: trained on handwritten digits, adapted to them turned and inverted.

The backbone and its classifier are trained on upright digits, then frozen whole; what is learnt afterwards is the adapter's
alone. Before that, the model is at chance on the new images, so a form that does not learn fails by a wide margin.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankloom
from rankloom import Calibration, Recipe, Targets
from tests import zoo

SIZES: dict[str, dict[str, Any]] = {
    "vit": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 2,
        "num_channels": 1,
        "num_labels": 10,
        "initializer_range": 0.05,
    },
    "convnet": {"channels": 1, "width": 32, "classes": 10},
}
TARGETS = {"vit": Targets(exclude=("classifier",)), "convnet": Targets(("stem", "body", "mix"))}
STEPS = {"vit": (150, 120), "convnet": (400, 250)}  # to learn upright digits, and to adapt to turned ones
RATES = {"lora": 1e-2, "dora": 1e-2, "pissa": 5e-3, "lora-xs": 3e-2, "rac-lora": 1e-2}


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 1, 8, 8) in [-1, 1] and labels: 1,300 to train on, 497 to test with."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn, which brings the images, is not installed")
    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 8 - 1
    y = torch.tensor(labels)[order]
    return x[:1300], y[:1300], x[1300:], y[1300:]


def turned(x: Tensor) -> Tensor:
    """The other task's images: a quarter turn, and light on dark."""
    return -torch.rot90(x, 1, (2, 3))


def steps(count: int) -> list[dict[str, Tensor]]:
    """Batches of 64 upright training images."""
    x, y, *_ = digits()
    generator = torch.Generator().manual_seed(1)
    picks = [torch.randint(len(x), (64,), generator=generator) for _ in range(count)]
    return [{"pixel_values": x[pick], "labels": y[pick]} for pick in picks]


@torch.no_grad()
def accuracy(model: nn.Module, change: Any = None) -> float:
    *_, x, y = digits()
    return float((zoo.logits(model, {"pixel_values": change(x) if change else x}).argmax(1) == y).float().mean())


@cache
def trained(kind: str) -> nn.Module:
    """The backbone that has learnt upright digits."""
    model = zoo.build(kind, dtype=torch.float32, **SIZES[kind])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if kind == "vit" else 1e-2)
    for batch in steps(STEPS[kind][0]):
        F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def method(name: str, kind: str) -> Recipe:
    recipe = rankloom.methods.get(name).with_(targets=TARGETS[kind])
    recipe = recipe.with_({"adapter.rank": 24 if (name, kind) == ("lora-xs", "vit") else 8})
    return recipe.with_({"lifecycle.every": 20}) if name == "rac-lora" else recipe


@pytest.mark.parametrize("kind", SIZES)
def test_the_backbone_knows_upright_digits_and_no_turned_ones(kind: str) -> None:
    assert accuracy(trained(kind)) > 0.8
    assert accuracy(trained(kind), turned) < 0.35


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("name", RATES)
def test_forms_learn_real_images(name: str, kind: str) -> None:
    model = copy.deepcopy(trained(kind))
    data = [{**batch, "pixel_values": turned(batch["pixel_values"])} for batch in steps(STEPS[kind][1])]
    handle = rankloom.adapt(model, method(name, kind), Calibration(data[:4]))
    before = accuracy(model, turned)
    zoo.train(handle, handle.optimizer(RATES[name], total_steps=len(data)), data, len(data))
    after = accuracy(model, turned)
    assert before < 0.35 and after > 0.6, (before, after)
    handle.detach()
    assert accuracy(model) == accuracy(trained(kind))  # the backbone is as it was
