"""Settings from a file, from key=value and from options, and what a mistake in them says."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankloom.errors import RecipeError
from rankloom.training.config import load_config
from rankloom.training.prepare import build_recipe


def test_later_sources_win_and_dotted_keys_go_to_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: a\ndata: b\nlr: 1e-3\nsteps: 5\nadapter.rank: 4\noverrides: {adapter.alpha: 3}\n")
    config = load_config(file, ["lr=2e-3", "adapter.rank=6", "columns.text=review"], {"lr": 3e-3, "steps": None})
    assert (config.model, config.lr, config.steps) == ("a", 3e-3, 5)
    assert config.overrides == {"adapter.rank": 6, "adapter.alpha": 3}
    assert config.columns == {"text": "review"}
    assert build_recipe(config).to_dict()["adapter"]["rank"] == 6


def test_a_resolved_configuration_loads_as_itself(tmp_path: Path) -> None:
    import yaml

    config = load_config(None, ["model=a", "data=b", "adapter.rank=6", "targets=[q_proj, v_proj]", "lr=1e-5"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    assert load_config(tmp_path / "config.yaml") == config


def test_the_recipe_takes_the_runs_settings() -> None:
    config = load_config(None, ["model=a", "data=b", "rank=3", "targets=[q_proj]", "method=lora-one"])
    plain = build_recipe(config, ("classifier",)).to_dict()
    assert plain["adapter"]["rank"] == 3
    assert list(plain["targets"]["modules"]) == ["q_proj"]
    assert list(plain["targets"]["train"]) == ["classifier"]


def test_a_recipe_file_replaces_the_method(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("adapter: {kind: lora, rank: 5}\n")
    config = load_config(None, ["model=a", "data=b", f"recipe={tmp_path / 'mine.yaml'}"])
    assert build_recipe(config).to_dict()["adapter"]["rank"] == 5


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["model=a", "data=b", "batchsize=3"], "unknown setting 'batchsize'; did you mean batch_size"),
        (["model=a"], "setting 'data' is missing"),
        (["model=a", "data=b", "lr=-1"], "setting 'lr'"),
        (["model=a", "data=b", "task=regression"], "setting 'task'.*causal-lm"),
        (["model"], "neither a .yaml file nor key=value"),
        (["model=[", "data=b"], "cannot read the value"),
    ],
)
def test_mistakes_are_named(items: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_config(None, items)


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n", "must hold 'key: value'"), ("a: [\n", "not valid YAML"), (None, "does not exist")]
)
def test_unusable_files_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_config(file)
