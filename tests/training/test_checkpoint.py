"""Checkpoints are whole or absent, and a damaged one is passed over."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from rankloom.errors import ArtifactError
from rankloom.training.checkpoint import (
    clean,
    list_checkpoints,
    load_state,
    newest,
    rng_state,
    save_checkpoint,
    set_rng_state,
)


def write(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "a.bin").write_bytes(b"x" * 100)
    torch.save({"step": 1, "tensor": torch.ones(2)}, folder / "state.pt")


def test_only_the_last_few_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, write, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000010", "checkpoint-00000002"]
    assert newest(tmp_path) == tmp_path / "checkpoint-00000010"
    save_checkpoint(tmp_path, 10, write, keep=2)  # the same step again, as after a resume
    assert newest(tmp_path) == tmp_path / "checkpoint-00000010"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        save_checkpoint(tmp_path, 1, fail, keep=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no list"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, write, keep=2)
    folder = tmp_path / "checkpoint-00000002"
    file = folder / "adapter" / "a.bin"
    if damage == "truncate":
        file.write_bytes(b"x" * 50)
    elif damage == "flip":
        file.write_bytes(b"x" * 99 + b"y")
    elif damage == "remove":
        file.unlink()
    else:
        (folder / "complete.json").write_text("{")
    said: list[str] = []
    assert newest(tmp_path, said.append) == tmp_path / "checkpoint-00000001"
    assert "checkpoint-00000002 is damaged" in said[0]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".writing-checkpoint-00000003-abc").mkdir()
    save_checkpoint(tmp_path, 2, write, keep=2)
    assert newest(tmp_path) == tmp_path / "checkpoint-00000002"
    clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000002"]


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_generators_continue_where_they_were(tmp_path: Path) -> None:
    draw()
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = [draw() for _ in range(3)]
    set_rng_state(load_state(tmp_path / "rng.pt"))
    assert [draw() for _ in range(3)] == expected


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('pickle ran')",))


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    torch.save({"step": Evil()}, tmp_path / "state.pt")
    with pytest.raises(ArtifactError, match="damaged or not a training state"):
        load_state(tmp_path / "state.pt")
