"""Training runs with ``attention: {limits: ...}``: accelerated, recorded, and resumed to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankloom.attention import accelerate
from rankloom.attention.cost import KINDS, CostModel
from rankloom.errors import RankloomError, RecipeError
from rankloom.training.config import Attention, Limits, load_config
from tests import tiny
from tests.training.test_run import adapter, cut_back, events, run, same

# A budget that pays for everything at once: short sentences earn next to nothing.
SETTINGS = {"limits": {"eps": 1e-2, "refresh": 5, "min_length": 8, "budget": 1e9}}


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors that pay at the length of a short sentence, and chunks that leave it something to approximate."""
    cost = CostModel((0.0, 6e-3), dict.fromkeys(KINDS, ((1, 0.0, 1e-3), (10_000, 0.0, 10.0))))
    monkeypatch.setattr(accelerate, "calibrate", lambda *_, **__: cost)
    monkeypatch.setattr("rankloom.attention.factored.default_chunk", lambda *_, **__: 4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout, which an approximation could not have."""
    return tiny.save_llama(tmp_path_factory.mktemp("llama"), dropout=0.0)


def test_resumes_to_the_same_bits(tmp_path: Path, llama: Path, tiny_reviews: Path) -> None:
    result = run(tmp_path / "whole", llama, tiny_reviews, attention=SETTINGS)
    assert any(what.startswith(KINDS) for what in result.attention["ran"]), result.attention
    assert result.attention["steps"] == 12
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["attention"] == result.attention
    resumed = cut_back(tmp_path / "whole", tmp_path / "resumed", step=8)
    again = run(resumed, llama, tiny_reviews, attention=SETTINGS, resume=True)
    assert same(adapter(resumed), adapter(tmp_path / "whole"))
    assert events(resumed) == events(tmp_path / "whole")
    assert again.attention == result.attention


def test_the_metrics_say_what_ran(tmp_path: Path, llama: Path, tiny_reviews: Path) -> None:
    run(tmp_path / "limits", llama, tiny_reviews, attention=SETTINGS)
    run(tmp_path / "exact", llama, tiny_reviews)
    lines = [line for line in events(tmp_path / "limits") if line["event"] == "attention"]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert [sum(line["ran"].values()) for line in lines] == [3 * 4, 6 * 4, 9 * 4, 12 * 4]  # 2 layers of 2 key heads
    losses, exact = (
        [line["loss"] for line in events(tmp_path / name) if line["event"] == "train"] for name in ("limits", "exact")
    )
    assert losses == pytest.approx(exact, rel=1e-2)
    assert losses != exact


def test_a_run_goes_on_only_with_the_same_attention(tmp_path: Path, llama: Path, tiny_reviews: Path) -> None:
    run(tmp_path / "run", llama, tiny_reviews, steps=4, attention=SETTINGS)
    with pytest.raises(RankloomError, match="cannot resume: attention differ"):
        run(tmp_path / "run", llama, tiny_reviews, steps=4, resume=True)


def test_settings_from_files_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: a\ndata: b\nattention: {limits: {eps: 1e-2, refresh: 20}}\n")
    config = load_config(file, ["attention.limits.eps=1e-3", "adapter.rank=6"])
    assert config.attention == Attention(limits=Limits(eps=1e-3, refresh=20))
    assert config.overrides == {"adapter.rank": 6}
    for wrong, said in (
        ("eps=0", "greater than 0"),
        ("epsilon=0.1", "not permitted"),
        ("refresh=0", "at least|greater"),
    ):
        with pytest.raises(RecipeError, match=said):
            load_config(file, [f"attention.limits.{wrong}"])
