"""``rankloom limits``: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankloom.attention import probe as module
from rankloom.attention.cost import CostModel
from rankloom.cli import main
from tests.cli.test_cli import fails, train_words

Capture = pytest.CaptureFixture[str]
LINE = tuple((width, 0.0, 1e-8 * width) for width in (1, 4096))
COST = CostModel((0.0, 1e-8), {"isotropic": LINE, "mehler": LINE, "anisotropic": LINE, "nystrom": LINE})


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "calibrate", lambda *dims, **how: COST)


def words(model: Path | None, data: Path, *more: str) -> list[str]:
    named = [] if model is None else ["--model", str(model)]
    sizes = ["--tokens", "128", "--lengths", "64,4096", "--quiet"]
    return ["limits", "probe", *named, "--data", str(data), *sizes, *more]


def test_probe_prints_a_table_and_what_it_rests_on(capfd: Capture, tiny_llama: Path, tiny_reviews: Path) -> None:
    assert main(words(tiny_llama, tiny_reviews)) == 0
    out = capfd.readouterr().out
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["layer", "head", "B_q"] and lines[0].split()[-2:] == ["64", "4,096"]
    assert [line.split()[:2] for line in lines[1:9]] == [[str(i // 4), str(i % 4)] for i in range(8)] and not lines[9]
    assert "64 tokens: 8 polynomial, 0 low-rank, 0 exact (output alone: 8 polynomial" in out
    assert "lengths 4,096 are longer than the probed text" in out and "another text than" in out


def test_probe_of_an_adapter_compared_with_its_base(
    tmp_path: Path, capfd: Capture, tiny_llama: Path, tiny_reviews: Path
) -> None:
    run = tmp_path / "run"
    assert main(train_words(tiny_llama, tiny_reviews, run, "--lr", "0.05")) == 0
    reports: dict[str, Any] = {}
    for name, more in (("base", ["--base"]), ("adapted", ["--figure", str(tmp_path / "heads.svg")])):
        capfd.readouterr()
        assert main(words(None, tiny_reviews, "--adapter", str(run), *more, "--json")) == 0
        text = capfd.readouterr().out
        (tmp_path / f"{name}.json").write_text(text)
        reports[name] = json.loads(text)
    assert (tmp_path / "heads.svg").stat().st_size > 5000
    assert reports["base"]["heads"][0]["bounds"] != reports["adapted"]["heads"][0]["bounds"]
    assert len(reports["adapted"]["heads"]) == 8 and reports["adapted"]["model"] == str(tiny_llama)
    both = [str(tmp_path / "base.json"), str(tmp_path / "adapted.json")]
    assert main(["limits", "compare", *both]) == 0
    assert "4,096 tokens 0 heads rose over sqrt(log L)" in " ".join(capfd.readouterr().out.split())
    assert main(["limits", "compare", *both, "--json"]) == 0
    compared = json.loads(capfd.readouterr().out)
    assert len(compared["heads"]) == 8 and set(compared["summary"]["64"]) == {"rose", "fell", "lost", "gained"}


def test_a_classifier_of_joined_rows_has_no_loss(capfd: Capture, tiny_llama: Path, tiny_reviews: Path) -> None:
    assert main(words(tiny_llama, tiny_reviews, "--task", "sequence-classification", "--samples", "1")) == 0
    out = capfd.readouterr().out
    assert (
        "1 text(s) of 128 tokens; factors judged on the text they were fitted to; output gradients from random" in out
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lengths", "2k"], "--lengths 2k: give numbers of tokens separated by commas"),
        (["--lengths", "0"], "lengths are numbers of tokens from 2 on"),
        (["--eps", "0"], "eps=0.0 is no relative error"),
        (["--figure", "heads.bmp"], "--figure heads.bmp: give a .svg, .png or .pdf file"),
        (["--tokens", "100000"], "too few for 2 x 2,048: ask for fewer with --samples and --tokens"),
        (["--tokens", "8"], "at least 64 tokens"),
        (["--samples", "0"], "samples=0"),
    ],
)
def test_mistakes_get_one_line(
    more: list[str], said: str, capfd: Capture, tiny_llama: Path, tiny_reviews: Path
) -> None:
    assert said in fails(words(tiny_llama, tiny_reviews, *more), capfd)


def test_mistakes_around_the_probe_get_one_line(tmp_path: Path, capfd: Capture, tiny_llama: Path) -> None:
    assert "which model?" in fails(["limits", "probe", "--quiet"], capfd)
    assert "which data?" in fails(["limits", "probe", "--model", str(tiny_llama), "--quiet"], capfd)
    assert "No such command 'prob'" in fails(["limits", "prob"], capfd)
    assert "Did you mean 'limits'?" in fails(["limit"], capfd)
    (tmp_path / "empty.json").write_text("{}")
    assert "not the report of a probe" in fails(["limits", "compare", *[str(tmp_path / "empty.json")] * 2], capfd)
    assert "cannot read" in fails(["limits", "compare", *[str(tmp_path / "missing.json")] * 2], capfd)
