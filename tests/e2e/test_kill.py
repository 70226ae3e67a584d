"""A run that is killed at any moment resumes, and ends with the adapter of a run that was not."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankloom.training import checkpoint
from rankloom.training.config import TrainConfig
from rankloom.training.run import train

STEPS = 40


def settings(output: Path, model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    fixed = {"model": str(model), "data": str(data), "output": str(output), "method": "lora-one", "threads": 1}
    return fixed | {"steps": STEPS, "save_every": 2, "batch_size": 4, "log_every": 1, "lr": 1e-2} | changes


def command(values: dict[str, Any], *more: str) -> list[str]:
    return [sys.executable, "-m", "rankloom", "train", *(f"{k}={v}" for k, v in values.items()), "--quiet", *more]


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter.safetensors")


def assert_same(one: Path, other: Path, steps: int = STEPS) -> None:
    a, b = adapter(one), adapter(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    lines = [json.loads(line)["step"] for line in (other / "metrics.jsonl").read_text().splitlines()]
    assert sorted(lines) == [*range(1, steps + 1), steps], "one line a step and one evaluation, none twice"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_reviews: Path) -> Path:
    """An uninterrupted run in a process of its own."""
    output = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(settings(output, tiny_llama, tiny_reviews)), check=True, timeout=300)
    return output


def kill_near(values: dict[str, Any], step: int, delay: float) -> bool:
    """Start (or continue) a run and kill it ``delay`` seconds after it logged ``step`` (0: after it was started).

    Returns whether it was still running. Counted in steps, because no clock time means the same on a busy machine.
    """
    metrics = Path(values["output"]) / "metrics.jsonl"
    with subprocess.Popen(command(values, "--resume"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and step and _logged(metrics) < step:
            time.sleep(0.001)
        time.sleep(delay)
        hit = process.poll() is None
        process.send_signal(signal.SIGKILL)
    return hit


def _logged(metrics: Path) -> int:
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def killed_and_finished(values: dict[str, Any], moments: list[tuple[int, float]]) -> int:
    """Kill one run at each of ``moments`` in turn, let it finish, and count the kills that hit."""
    hits = sum(kill_near(values, *moment) for moment in moments)
    subprocess.run(command(values, "--resume"), check=True, timeout=300)
    return hits


def test_sigkill_again_and_again(tmp_path: Path, tiny_llama: Path, tiny_reviews: Path, whole: Path) -> None:
    moments = [(3, 0.001), (17, 0.0)]
    assert killed_and_finished(settings(tmp_path / "run", tiny_llama, tiny_reviews), moments) == 2
    assert_same(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sigkill_at_twenty_random_moments(tmp_path: Path, tiny_llama: Path, tiny_reviews: Path, whole: Path) -> None:
    """Every moment in a run of its own, from the start of the process to its last step."""
    draw = random.Random(1)
    moments = [(max(0, draw.randint(-5, STEPS - 1)), draw.uniform(0, 0.02)) for _ in range(20)]
    hits = 0
    for number, (step, delay) in enumerate(moments):
        values = settings(tmp_path / str(number), tiny_llama, tiny_reviews)
        moment = (step, delay if step else delay * 200)  # starting up takes seconds
        hits += killed_and_finished(values, [moment])
        assert_same(whole, tmp_path / str(number))
    assert hits >= 18  # one or two near the end may come too late


def _die_at(calls: Any, number: int, values: dict[str, Any]) -> None:
    """Train, and be killed at the ``number``-th time a file or folder reaches the disk or its place."""

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    checkpoint._flush_one = counted(checkpoint._flush_one)  # type: ignore[attr-defined]
    Path.rename = counted(Path.rename)  # type: ignore[method-assign]
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]
    torch.save = counted(torch.save)
    train(TrainConfig(**values), say=lambda _line: None, live=False)


@pytest.mark.parametrize("number", [1, 4, 9, 12, 14, 23, 31, 37])
def test_sigkill_in_the_middle_of_writing(tmp_path: Path, tiny_llama: Path, tiny_reviews: Path, number: int) -> None:
    """Kills at chosen places inside the writing of a checkpoint, which a random moment would seldom hit."""
    values = settings(tmp_path / "run", tiny_llama, tiny_reviews, steps=6, keep=1)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_die_at, args=(itertools.count(), number, values))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    train(TrainConfig(**values, resume=True), say=lambda _line: None, live=False)
    train(TrainConfig(**{**values, "output": str(tmp_path / "whole")}), say=lambda _line: None, live=False)
    one, other = adapter(tmp_path / "whole"), adapter(tmp_path / "run")
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not list((tmp_path / "run").glob(".writing-*")), "nothing half-written is left"


def test_ctrl_c_ends_with_130_and_says_how_to_continue(tmp_path: Path, tiny_llama: Path, tiny_reviews: Path) -> None:
    # Enough steps that the signal comes in the middle even on a busy machine.
    values = settings(tmp_path / "run", tiny_llama, tiny_reviews, save_every=1000, steps=300)
    with subprocess.Popen(command(values), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    last = error.strip().splitlines()[-1]
    assert "stopped by SIGINT after step" in last and "config.yaml resume=true" in last
    assert "Traceback" not in error
    resume = last.rsplit("rankloom ", 1)[1].split()
    subprocess.run([sys.executable, "-m", "rankloom", *resume, "--quiet"], check=True, timeout=300)
    train(TrainConfig(**{**values, "output": str(tmp_path / "whole")}), say=lambda _line: None, live=False)
    assert_same(tmp_path / "whole", tmp_path / "run", steps=300)
