"""The documentation: it builds without a warning, its commands parse and its Python runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankloom import methods
from rankloom.parts import SLOTS, kinds
from tests import zoo

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path, program: str) -> list[list[str]]:
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    return [shlex.split(line.split(" > ")[0], comments=True)[2:] for line in lines if line.startswith(f"$ {program} ")]


def test_the_site_builds_strictly_with_a_page_for_every_method_and_part(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        check=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    for name, row in methods.TABLE.items():
        page = (tmp_path / "site" / "methods" / name / "index.html").read_text()
        text = re.sub(r"<[^>]+>", "", page)
        assert row.title.split(":")[0] in text and f"--method {name}" in text
    for slot in SLOTS:
        page = (tmp_path / "site" / "parts" / slot / "index.html").read_text()
        assert all(f'id="{kind}"' in page for kind in kinds(slot))


@each_page
def test_commands_parse(page: Path) -> None:
    """Every ``rankloom`` line names a command and options that exist, and recipe settings that hold."""
    import typer

    from rankloom.cli import app
    from rankloom.training.config import load_config
    from rankloom.training.prepare import build_recipe

    group: Any = typer.main.get_command(app)
    for words in commands(page, "rankloom"):
        command = group.commands[words[0]]
        if hasattr(command, "commands"):
            command, words = command.commands[words[1]], words[1:]
        context = command.make_context(words[0], words[1:])
        if words[0] == "train" and not any(word.endswith(".yaml") for word in words):
            given = {key: context.params[key] for key in ("model", "data", "method")}
            build_recipe(load_config(None, context.params["settings"] or [], given)).check()


@each_page
def test_named_programs_exist(page: Path) -> None:
    for words in commands(page, "python"):
        assert (ROOT / words[0]).is_file()


@pytest.mark.parametrize("name", ["quickstart", "recipes", "quantised", "limits", "adding"])
def test_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "quantised":
        pytest.importorskip("torchao", reason="torchao is not installed")
    import torch

    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"model": zoo.build("llama", dtype=torch.float32), "batches": zoo.batches("llama")}
    ids = torch.randint(3, zoo.VOCAB, (1, 96))
    scope["texts"] = [{"input_ids": ids, "labels": ids}]
    for block in blocks(ROOT / "docs" / f"{name}.md", "python"):
        exec(compile(block, f"{name}.md", "exec"), scope)
