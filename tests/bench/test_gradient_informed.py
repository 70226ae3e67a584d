"""The study's bookkeeping and one tiny run of it, so that a run of hours does not end in an error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
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


def test_a_result_keeps_what_another_task_wrote_meanwhile(
    study: ModuleType, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = tmp_path / "study.json", bench.run

    def meanwhile(*args: Any, **settings: Any) -> Any:
        path.write_text(json.dumps({"tasks": {"other": {"methods": []}}}))
        return run(*args, **settings)

    bench.run = meanwhile
    monkeypatch.setattr(study, "Bench", lambda *_: bench)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    made = study.Study("study", "", {"lora": study.Method("lora")}, tasks=("tiny",))
    made.main(["--json", str(path), "--seeds", "2", "--lrs", "1e-3", "--figures", str(tmp_path)])
    result = json.loads(path.read_text())["tasks"]
    assert list(result) == ["other", "tiny"] and result["tiny"]["methods"][0]["seeds"] == 2


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


def climbed(loss: Callable[[float], float]) -> tuple[Any, dict[float, float]]:
    """A search of the least of these losses, and what it has run."""
    from search import Climb

    search, found = Climb(), dict[float, float]()
    while (wanted := search.visit(found)[1]) is not None:
        found[wanted] = loss(wanted)
    return search, found


@pytest.mark.parametrize("where", range(2, 12))
def test_a_climb_finds_a_minimum_anywhere_from_1e_5_up_in_six_runs(study: ModuleType, where: int) -> None:
    from search import LADDER

    def loss(rate: float) -> float:  # falls, then diverges
        return float(where - LADDER.index(rate)) if rate <= LADDER[where] else math.inf

    search, found = climbed(loss)
    assert len(found) == 6 and study.best(search, found) == LADDER[where]


def test_a_climb_is_not_misled_by_a_plateau_of_rates_that_change_nothing(study: ModuleType) -> None:
    search, found = climbed(lambda rate: 0.4 if rate == 1e-3 else 0.7 if rate > 1e-3 else 0.62 + rate)
    assert study.best(search, found) == 1e-3 and not search.at_edge(1e-3, found)


def test_a_climb_that_was_not_over_says_so(study: ModuleType) -> None:
    search, found = climbed(lambda rate: -rate)
    assert study.best(search, found) == 0.3 and not search.at_edge(0.3, found)  # nothing is above it
    search, found = climbed(lambda rate: rate)
    assert study.best(search, found) == 1e-5 and search.at_edge(1e-5, found)


@pytest.mark.parametrize("gap, width, said", [(-0.2, 0.1, "better"), (0.2, 0.1, "worse"), (-0.1, 0.2, "=")])
def test_a_verdict_needs_an_interval_without_zero(study: ModuleType, gap: float, width: float, said: str) -> None:
    assert study.verdict({"to_lora": gap, "to_lora_95": width}) == said
    assert study.verdict({"loss": 1.0}) == "" == study.verdict({"to_lora": gap, "to_lora_95": math.nan})
