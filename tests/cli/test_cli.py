"""The command line: what it prints, its exit codes, and one line with the fix for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rankloom import methods
from rankloom.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_reviews: Path) -> Path:
    output = tmp_path_factory.mktemp("cli") / "run"
    assert main(train_words(tiny_llama, tiny_reviews, output)) == 0
    return output


def train_words(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    words = ["train", "--model", str(model), "--data", str(data), "--output", str(output), "--steps", "2", "--quiet"]
    return [*words, *more]


def fails(words: list[str], capfd: Capture, code: int = 2) -> str:
    """Run a line that must fail: one line on stderr, nothing on stdout."""
    capfd.readouterr()
    assert main(words) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert "Traceback" not in captured.err
    return lines[-1]


def test_methods_lists_the_table(capfd: Capture) -> None:
    assert main(["methods"]) == 0
    out = capfd.readouterr().out
    assert all(name in out for name in methods.TABLE)
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert rows.keys() == methods.TABLE.keys()
    for row in rows.values():
        assert all(row[key] for key in ("recipe", "title", "paper", "summary", "parameters", "export"))
    assert rows["lora-one"]["needs"] == {"parts": ["factors"], "start": "gradient"}
    assert rows["adalora"]["needs"]["parts"] == ["a start without offset", "factors", "ranked components"]


@pytest.mark.parametrize("name", methods.TABLE)
def test_methods_takes_one_apart(capfd: Capture, name: str) -> None:
    assert main(["methods", name]) == 0
    out = capfd.readouterr().out
    assert methods.TABLE[name].paper in out and "adapter" in out
    assert main(["methods", name, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["recipe"] == json.loads(methods.TABLE[name].recipe.to_json())


def test_train_eval_generate_export(tmp_path: Path, capfd: Capture, tiny_llama: Path, tiny_reviews: Path) -> None:
    assert main([*train_words(tiny_llama, tiny_reviews, tmp_path / "run"), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["steps"] == 2 and Path(result["adapter"]).is_dir()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    figures = json.loads(capfd.readouterr().out)
    assert figures["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-6)
    assert main(["eval", "--model", str(tiny_llama), "--data", str(tiny_reviews), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["loss"] != figures["loss"]
    assert (
        main(["generate", str(tmp_path / "run"), "--prompt", "a", "--prompt", "b", "--max-new-tokens", "2", "--json"])
        == 0
    )
    assert [entry["prompt"] for entry in json.loads(capfd.readouterr().out)] == ["a", "b"]
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "peft"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["written"] == str(tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "merged"), "--format", "merged"]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-int4"])
def test_a_run_over_a_quantised_base(
    kind: str, tmp_path: Path, capfd: Capture, tiny_llama: Path, tiny_reviews: Path
) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    run, narrow = tmp_path / "run", ["--dtype", "bfloat16"]
    words = [
        *train_words(tiny_llama, tiny_reviews, run),
        "--method",
        "lora-one",
        f"base.kind={kind}",
        *narrow,
        "--json",
    ]
    assert main(words) == 0
    result = json.loads(capfd.readouterr().out)
    manifest = json.loads((run / "adapter" / "manifest.json").read_text())
    assert manifest["recipe"]["base"]["kind"] == kind
    # The run, and its adapter's folder alone, say how the base is stored.
    data = ["--data", str(tiny_reviews), "--json"]
    for words in (["eval", str(run)], ["eval", str(run / "adapter"), "--model", str(tiny_llama), *narrow]):
        assert main([*words, *data]) == 0
        captured = capfd.readouterr()
        assert json.loads(captured.out)["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-6)
        assert "torchao" not in captured.err
    assert main(["export", str(run), str(tmp_path / "merged"), "--format", "merged", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["dequantized"] == 14
    assert main(["export", str(run), str(tmp_path / "peft")]) == 0


def test_a_file_and_options_give_the_same_run(
    tmp_path: Path, capfd: Capture, tiny_llama: Path, tiny_reviews: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {tiny_llama}\ndata: {tiny_reviews}\nsteps: 2\noutput: {tmp_path / 'a'}\nadapter.rank: 2\n")
    assert main(["train", str(file), "lr=1e-3", "--quiet", "--json"]) == 0
    one = json.loads(capfd.readouterr().out)
    words = train_words(tiny_llama, tiny_reviews, tmp_path / "b", "--lr", "1e-3", "--rank", "2", "--json")
    assert main(words) == 0
    other = json.loads(capfd.readouterr().out)
    assert one["metrics"] == other["metrics"] and one["trainable"] == other["trainable"]


def test_settings_are_listed(capfd: Capture) -> None:
    assert main(["train", "settings"]) == 0
    assert "accumulation" in capfd.readouterr().out


def test_the_module_runs_and_help_names_every_command() -> None:
    result = subprocess.run([sys.executable, "-m", "rankloom", "--help"], capture_output=True, text=True, check=True)
    assert all(word in result.stdout for word in ("train", "eval", "generate", "methods", "export", "demo"))
    assert result.stderr == ""


def test_importing_the_library_stays_light() -> None:
    code = "import sys, rankloom; sys.exit(any(m in sys.modules for m in ('transformers','matplotlib','datasets','typer')))"
    subprocess.run([sys.executable, "-c", code], check=True)


# Mistakes


def test_unknown_words(capfd: Capture) -> None:
    assert "did you mean 'train'" in fails(["trian"], capfd).lower()
    assert "--modle" in fails(["train", "--modle", "x"], capfd)
    assert "unknown setting 'optimiser'" in fails(["train", "optimiser=x"], capfd)
    assert "did you mean lora-one" in fails(["methods", "lora-on"], capfd)


def test_unknown_method(tmp_path: Path, capfd: Capture, tiny_llama: Path, tiny_reviews: Path) -> None:
    line = fails(train_words(tiny_llama, tiny_reviews, tmp_path / "run", "--method", "lora-won"), capfd)
    assert "unknown method 'lora-won'" in line and "did you mean lora-one" in line


def test_pattern_that_matches_nothing(tmp_path: Path, capfd: Capture, tiny_llama: Path, tiny_reviews: Path) -> None:
    line = fails(train_words(tiny_llama, tiny_reviews, tmp_path / "run", "--targets", "q_porj"), capfd)
    assert "'q_porj' matches nothing" in line and "q_proj" in line


def test_rank_above_the_weights(tmp_path: Path, capfd: Capture, tiny_llama: Path, tiny_reviews: Path) -> None:
    line = fails(train_words(tiny_llama, tiny_reviews, tmp_path / "run", "--rank", "999"), capfd)
    assert "999" in line and "rank" in line


def test_impossible_composition(tmp_path: Path, capfd: Capture, tiny_llama: Path, tiny_reviews: Path) -> None:
    words = train_words(tiny_llama, tiny_reviews, tmp_path / "run", "--method", "full", "rank.kind=adalora")
    line = fails(words, capfd)
    assert "adalora" in line and "dense" in line and "works with" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"body": "x"}\n{"body": "y"}\n', "has body, needed are messages or prompt + completion or text"),
        ("", "is empty"),
        ('{"prompt": "x", "completion": ""}\n' * 4, "max_length"),
    ],
)
def test_unusable_data(tmp_path: Path, capfd: Capture, tiny_llama: Path, content: str, message: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    line = fails(train_words(tiny_llama, data, tmp_path / "run", "append_eos=false"), capfd)
    assert message in line


def test_a_loss_that_is_not_finite(tmp_path: Path, capfd: Capture, tiny_llama: Path, tiny_reviews: Path) -> None:
    words = train_words(tiny_llama, tiny_reviews, tmp_path / "run", "--lr", "1e30", "max_grad_norm=0", "--steps", "20")
    line = fails([*words, "save_every=1"], capfd)
    assert "not finite" in line or "loss is" in line
    assert "checkpoint-" in line


@pytest.mark.parametrize("damage", ["truncated", "pickled", "missing"])
def test_a_damaged_adapter(tmp_path: Path, capfd: Capture, trained: Path, damage: str) -> None:
    import shutil

    run = Path(shutil.copytree(trained, tmp_path / "run"))
    file = run / "adapter" / "adapter.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "pickled":
        torch.save({"a": torch.ones(1)}, file)
    else:
        shutil.rmtree(run / "adapter")
    line = fails(["eval", str(run)], capfd)
    assert "adapter" in line


def test_another_base_model(tmp_path: Path, capfd: Capture, trained: Path) -> None:
    from transformers import LlamaForCausalLM

    from tests import tiny

    other = tiny.save_llama(tmp_path / "other")
    model: Any = LlamaForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.01)
    model.save_pretrained(other)
    line = fails(["eval", str(trained), "--model", str(other)], capfd)
    assert "--force" in line or "force" in line
    assert main(["eval", str(trained), "--model", str(other), "--force"]) == 0


def test_what_is_not_there(tmp_path: Path, capfd: Capture, tiny_llama: Path, tiny_reviews: Path) -> None:
    assert "is not a folder" in fails(["eval", str(tmp_path / "nowhere")], capfd)
    assert "which model?" in fails(["generate", "--prompt", "x"], capfd)
    line = fails(train_words(tmp_path / "nowhere", tiny_reviews, tmp_path / "run"), capfd)
    assert "neither a named model" in line
    line = fails(train_words(tiny_llama, tmp_path / "nowhere", tmp_path / "run"), capfd)
    assert "neither a named dataset" in line


def test_debug_shows_the_traceback(capfd: Capture) -> None:
    assert main(["methods", "nonsense", "--debug"]) == 2
    assert "Traceback" in capfd.readouterr().err


def test_anything_unforeseen_is_code_1(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_name: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(methods, "get", broken)
    assert "unexpected RuntimeError: a bug" in fails(["methods", "lora"], capfd, code=1)


def test_interruption_is_code_130(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "get", interrupted)
    assert fails(["methods", "lora"], capfd, code=130) == "interrupted"
