"""The demonstration from end to end, on a tiny model in place of the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankloom.errors import RankloomError
from rankloom.training.demo import LEARNING_RATES, METHODS, run_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_reviews: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, run_demo(folder, steps=4, seeds=2, model=str(tiny_llama), data=str(tiny_reviews))


def test_it_leaves_what_it_promises(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, result = demo
    for name in ("adapter/adapter.safetensors", "peft/adapter_model.safetensors", "learning_curves.png"):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "results.json").read_text())["steps"] == result["steps"] == 4


def test_the_methods_are_compared_on_equal_terms(demo: tuple[Path, dict[str, Any]]) -> None:
    _, result = demo
    by_method = {m: [t for t in result["trials"] if t["method"] == m] for m in METHODS}
    for trials in by_method.values():
        assert [t["lr"] for t in trials] == list(LEARNING_RATES)
        assert all(sorted(t["curve"]) == [0, 1, 2, 3, 4] for t in trials)
    assert len({t["trainable"] for trials in by_method.values() for t in trials}) == 1
    assert by_method["lora"][0]["curve"][0] == pytest.approx(result["base"]["loss"]), "LoRA starts at the base model"
    assert {method: len(losses) for method, losses in result["quarters"].items()} == dict.fromkeys(METHODS, 2)
    assert result["test"].keys() == {"base", *METHODS}


def test_it_classifies_the_sentences(demo: tuple[Path, dict[str, Any]]) -> None:
    for entry in demo[1]["sentences"]:
        assert sum(entry["trained"].values()) == pytest.approx(1)
        assert entry["trained"].keys() == entry["base"].keys() == {"good", "bad"}


def test_it_replaces_only_its_own_folder(demo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RankloomError, match="holds other files"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.txt").is_file()
