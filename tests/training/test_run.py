"""Training runs: what they leave, that resuming is exact for every method, and how they refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankloom import methods
from rankloom.errors import DataError, GradientError, RankloomError
from rankloom.training.config import TrainConfig
from rankloom.training.restore import evaluate_run, export_run, generate, restore
from rankloom.training.run import Interrupted, RunResult, train
from tests import tiny

# Ranks that fit the tiny model; every other setting is the table's own.
FITTING: dict[str, dict[str, Any]] = {
    "adalora": {"adapter.rank": 6, "rank.target_rank": 3, "rank.interval": 2},
    "galore": {"optimizer.rank": 4, "optimizer.every": 3},
    "lora-sb": {"adapter.rank": 8},
    "randlora": {"adapter.rank": 8},
    "fourierft": {"adapter.coefficients": 50},
    "loca": {"adapter.coefficients": 50},
    "miss": {"adapter.rank": 8},
    "bat": {"adapter.rank": 8},
    "bone": {"adapter.rank": 8},
    "relora": {"adapter.rank": 8, "lifecycle.every": 4},
    "cola": {"lifecycle.every": 4},
    "rac-lora": {"lifecycle.every": 4},
}


def silent(_line: str) -> None:
    pass


def run(output: Path, model: Path, data: Path, **changes: Any) -> RunResult:
    settings: dict[str, Any] = {
        "method": "lora",
        "steps": 13,
        "batch_size": 4,
        "lr": 1e-2,
        "save_every": 4,
        "keep": 100,
        "log_every": 3,
        "calibration_samples": 8,
    }
    settings |= {"model": str(model), "data": str(data), "output": str(output)}
    return train(TrainConfig(**{**settings, **changes}), say=silent, live=False)


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def events(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_memory_mb")} for line in lines]


def cut_back(source: Path, to: Path, step: int) -> Path:
    """A copy of a run as it was when its process died some time after ``step``."""
    to.mkdir()
    shutil.copytree(source / f"checkpoint-{step:08d}", to / f"checkpoint-{step:08d}")
    for name in ("metrics.jsonl", "run.json"):
        shutil.copy(source / name, to)
    return to


@pytest.mark.parametrize("method", methods.TABLE)
def test_resuming_is_exact_for_every_method(tmp_path: Path, tiny_llama: Path, tiny_reviews: Path, method: str) -> None:
    """Adapter and metrics of a resumed run equal the uninterrupted one's to the bit, over an epoch's end."""
    overrides = {**FITTING.get(method, {}), **({"init.reference": str(tiny_llama)} if method == "loftq" else {})}
    settings = {"method": method, "eval_every": 5, "overrides": overrides, "accumulation": 1}
    result = run(tmp_path / "whole", tiny_llama, tiny_reviews, **settings)
    assert result.steps == 13 and result.metrics["loss"] > 0
    resumed = cut_back(tmp_path / "whole", tmp_path / "resumed", step=8)
    run(resumed, tiny_llama, tiny_reviews, resume=True, **settings)
    assert same(adapter(tmp_path / "whole"), adapter(resumed))
    assert events(tmp_path / "whole") == events(resumed)


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulation": 3},
        {"packing": True, "max_length": 128},
        {"schedule": "cosine"},
        {"overrides": {"base.kind": "torchao-int8"}},
        {"overrides": {"base.kind": "torchao-int4"}, "dtype": "bfloat16", "gradient_checkpointing": True},
    ],
)
def test_resuming_is_exact_in_other_modes(
    tmp_path: Path, tiny_llama: Path, tiny_reviews: Path, changes: dict[str, Any]
) -> None:
    run(tmp_path / "whole", tiny_llama, tiny_reviews, **changes)
    for step in (4, 12):
        resumed = cut_back(tmp_path / "whole", tmp_path / f"resumed-{step}", step)
        run(resumed, tiny_llama, tiny_reviews, resume=True, **changes)
        assert same(adapter(tmp_path / "whole"), adapter(resumed))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, tiny_llama: Path, tiny_reviews: Path) -> None:
    run(tmp_path / "run", tiny_llama, tiny_reviews)
    before, lines = adapter(tmp_path / "run"), events(tmp_path / "run")
    run(tmp_path / "run", tiny_llama, tiny_reviews, resume=True)
    assert same(before, adapter(tmp_path / "run")) and events(tmp_path / "run") == lines


def test_gradient_checkpointing_gives_the_same_adapter(tmp_path: Path, tiny_llama: Path, tiny_reviews: Path) -> None:
    for name, checkpointing in (("without", False), ("with", True)):
        run(tmp_path / name, tiny_llama, tiny_reviews, gradient_checkpointing=checkpointing)
    plain, recomputed = adapter(tmp_path / "without"), adapter(tmp_path / "with")
    assert all(torch.allclose(plain[key], recomputed[key], atol=1e-6) for key in plain)


def test_training_learns_and_the_adapter_is_what_was_measured(
    tmp_path: Path, tiny_llama: Path, tiny_reviews: Path
) -> None:
    run(
        tmp_path / "run",
        tiny_llama,
        tiny_reviews,
        steps=60,
        lr=3e-2,
        rank=16,
        targets=["q_proj", "v_proj", "down_proj"],
    )
    restored = restore(str(tmp_path / "run"))
    figures = evaluate_run(restored, split="validation", say=silent)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert figures == pytest.approx(summary["metrics"], rel=1e-6)
    base = evaluate_run(restore(str(tmp_path / "run"), base=True), split="validation", say=silent)
    assert figures["loss"] < base["loss"] - 0.3
    (text,) = generate(restored, ["film 3 was bad ->"], max_new_tokens=3)
    assert isinstance(text, str) and text
    with pytest.raises(DataError, match="has no test split"):
        evaluate_run(restored, split="test", say=silent)


def test_a_classifier_trains_saves_and_restores_its_new_head(
    tmp_path: Path, tiny_llama: Path, tiny_reviews: Path
) -> None:
    run(tmp_path / "run", tiny_llama, tiny_reviews, task="sequence-classification", steps=40, lr=2e-2)
    head = [name for name in adapter(tmp_path / "run") if "score" in name]
    assert head, "the head is in the adapter"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    figures = evaluate_run(restore(str(tmp_path / "run")), split="validation", say=silent)
    assert figures == pytest.approx(summary, rel=1e-6)
    assert figures["accuracy"] >= 0.8


def test_an_image_classifier_runs(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=5, **sizes)).save_pretrained(
        tmp_path / "vit"
    )
    for colour, value in (("dark", 40), ("light", 210)):
        (tmp_path / "images" / colour).mkdir(parents=True)
        for index in range(6):
            Image.new("RGB", (9, 9), (value + index,) * 3).save(tmp_path / "images" / colour / f"{index}.png")
    result = run(
        tmp_path / "run", tmp_path / "vit", tmp_path / "images", task="image-classification", lr=3e-2, steps=20
    )
    assert result.metrics["accuracy"] == 1.0
    figures = evaluate_run(restore(str(tmp_path / "run")), split="validation", say=silent)
    assert figures["accuracy"] == 1.0


def test_chats_and_plain_text_run(tmp_path: Path, tiny_llama: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    for name, row in (("chat", {"messages": turns}), ("text", {"text": "some words"})):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 12)
        result = run(tmp_path / name, tiny_llama, tmp_path / f"{name}.jsonl", steps=2)
        assert "accuracy" not in result.metrics


def test_export_loads_with_plain_transformers(tmp_path: Path, tiny_llama: Path, tiny_reviews: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(tmp_path / "run", tiny_llama, tiny_reviews)
    restored = restore(str(tmp_path / "run"))
    batch = {"input_ids": torch.arange(5, 25)[None]}
    with torch.no_grad():
        expected = restored.loaded.model(**batch).logits
    export_run(restored, tmp_path / "merged", "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, expected, atol=1e-4)


# Refusals


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, tiny_llama: Path, tiny_reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward
    calls = 0

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += self.training
        output = plain(self, *args, **kwargs)
        if calls > 6:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", poisoned)
    with pytest.raises(GradientError, match=r"loss is nan at step 7.*lower lr.*checkpoint-00000004"):
        run(tmp_path / "run", tiny_llama, tiny_reviews)
    monkeypatch.undo()
    run(tmp_path / "run", tiny_llama, tiny_reviews, resume=True)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, tiny_llama: Path, tiny_reviews: Path) -> None:
    run(tmp_path / "run", tiny_llama, tiny_reviews, steps=1)
    with pytest.raises(RankloomError, match="already holds a run; continue it with resume=true"):
        run(tmp_path / "run", tiny_llama, tiny_reviews, steps=1)


def test_resuming_with_other_settings_or_data_is_refused(tmp_path: Path, tiny_llama: Path, tiny_reviews: Path) -> None:
    data = Path(shutil.copy(tiny_reviews, tmp_path / "data.jsonl"))
    run(tmp_path / "run", tiny_llama, data, steps=4)
    with pytest.raises(RankloomError, match=r"cannot resume: lr differ .*lr was 0.01"):
        run(tmp_path / "run", tiny_llama, data, steps=4, lr=0.5, resume=True)
    tiny.write_reviews(data, rows=40)
    with pytest.raises(RankloomError, match="data has changed"):
        run(tmp_path / "run", tiny_llama, data, steps=4, resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_the_run_resumes_exactly(
    tmp_path: Path, tiny_llama: Path, tiny_reviews: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankloom.training.progress import Display

    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell started the tests in the background
    run(tmp_path / "whole", tiny_llama, tiny_reviews)
    plain = Display.step

    def interrupt(self: Display, step: int) -> None:
        plain(self, step)
        if step == 6:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Display, "step", interrupt)
    with pytest.raises(
        Interrupted, match=rf"{number.name} after step 6 of 13; continue with: rankloom train .*config.yaml"
    ):
        run(tmp_path / "run", tiny_llama, tiny_reviews)
    monkeypatch.undo()
    run(tmp_path / "run", tiny_llama, tiny_reviews, resume=True)
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before
