"""The study's bookkeeping and one tiny run of it, so that a run of hours does not end in an error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rankloom.training.config import TrainConfig
from tests.tiny import tiny_llama, tiny_reviews  # noqa: F401

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import study

    return study


@pytest.fixture
def bench(study: ModuleType, tiny_llama: Path, tiny_reviews: Path, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    from fine_tuning import Task

    config = TrainConfig(
        model=str(tiny_llama),
        data=str(tiny_reviews),
        dtype="float32",
        batch_size=2,
        max_length=32,
        eval_samples=4,
        calibration_samples=4,
    )
    monkeypatch.setitem(study.TASKS, "tiny", Task("tiny", config, steps=4, first=1e-4))
    made = study.Bench("tiny", None)
    made.test = made.prepared.validation  # one file has two splits; which rows are scored does not matter here
    return made


def test_a_study_runs_once_and_resumes(study: ModuleType, bench: Any, tmp_path: Path) -> None:
    import gradient_informed

    made = gradient_informed.STUDY
    path, methods = tmp_path / "study.jsonl", ["lora", "lora-one", "lora-xs", "full", "peft pissa"]
    before = {name: p.detach().clone() for name, p in bench.prepared.model.named_parameters()}
    made.work(bench, study.Runs(path), methods, 2, [1e-4, 1e-3], lambda: False)
    lines = path.read_text().splitlines()
    assert len(lines) == len(methods) * (2 + 2)
    for name, parameter in bench.prepared.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    bench.run = None  # calling it again would raise
    runs = study.Runs(path)
    made.work(bench, runs, methods, 2, [1e-4, 1e-3], lambda: False)
    assert path.read_text().splitlines() == lines
    rows = {row["method"]: row for row in made.summary(bench, runs, methods, [1e-4, 1e-3])}
    assert list(rows) == methods and rows["full"]["trainable"] > rows["lora"]["trainable"]
    assert rows["lora-xs"]["trainable"] == 8**2 * 14
    assert [list(row["curve"]) for row in rows.values()] == [["1", "2", "4"]] * len(methods)
    assert "to_lora" in rows["lora-one"]["curve"]["4"] and "to_lora" not in rows["lora"]["curve"]["4"]
    made.figure(bench, list(rows.values()), tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count("lora-one") >= 1


def test_a_step_that_is_late_is_not_started(study: ModuleType, bench: Any, tmp_path: Path) -> None:
    import gradient_informed

    gradient_informed.STUDY.work(bench, study.Runs(tmp_path / "none.jsonl"), ["lora"], 1, [1e-3], lambda: True)
    assert not (tmp_path / "none.jsonl").exists()


def test_the_interval_is_students(study: ModuleType) -> None:
    mean, width = study.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and width == pytest.approx(4.302652729911275 / math.sqrt(3))  # t(0.975, 2 degrees)


def test_a_diverged_rate_is_never_chosen(study: ModuleType, bench: Any, tmp_path: Path) -> None:
    key = {"task": "tiny", "method": "lora", "seed": 0, "phase": "search", "settings": bench.settings}
    curves = {1e-3: {"4": {"loss": 2.0}}, 1e-2: {"4": {"loss": math.nan}}, 1e-1: {}}
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(json.dumps({**key, "lr": lr, "curve": curve}) for lr, curve in curves.items()))
    found = study.searched(study.Runs(path), bench, "lora")
    assert study.best(study.Grid(tuple(curves)), found) == 1e-3
    assert study.best(study.Grid((1e-3, 1e-4)), found) is None  # not searched yet
    assert study.best(study.Grid((1e-2, 1e-1)), found) is None


@pytest.mark.parametrize("where", range(12))
def test_a_fibonacci_search_finds_the_minimum_in_five_runs(study: ModuleType, where: int) -> None:
    from search import LADDER, Fibonacci

    search, found = Fibonacci(), dict[float, float]()
    while (wanted := search.visit(found)[1]) is not None:
        place = LADDER.index(wanted)
        found[wanted] = float(where - place) if place <= where else math.inf  # falls, then diverges
    assert len(found) == 5 and study.best(search, found) == LADDER[where]
    assert search.at_edge(LADDER[where]) is (where in (0, 11))


def test_a_fibonacci_search_says_which_ladders_it_takes(study: ModuleType) -> None:
    from search import Fibonacci

    with pytest.raises(ValueError, match="10 rates: a Fibonacci search takes one less"):
        Fibonacci(tuple(range(10))).visit({})


@pytest.mark.parametrize("gap, width, said", [(-0.2, 0.1, "better"), (0.2, 0.1, "worse"), (-0.1, 0.2, "=")])
def test_a_verdict_needs_an_interval_without_zero(study: ModuleType, gap: float, width: float, said: str) -> None:
    assert study.verdict({"to_lora": gap, "to_lora_95": width}) == said
    assert study.verdict({"loss": 1.0}) == "" == study.verdict({"to_lora": gap, "to_lora_95": math.nan})
