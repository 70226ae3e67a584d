"""Checkpoints that are whole or absent: whenever the process dies, the newest complete one resumes the run to the bit.

A checkpoint is written into a temporary folder beside its place, every file is flushed to the disk, and the folder is
renamed. `complete.json`, written last, lists each file's size and SHA-256, so a damaged one is recognised and the one
before it is used. The training state is read with torch's restricted loader, which builds tensors and plain values
only.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankloom.errors import ArtifactError

__all__ = [
    "clean",
    "list_checkpoints",
    "load_state",
    "newest",
    "replace_folder",
    "rng_state",
    "save_checkpoint",
    "set_rng_state",
    "write_text",
]

_PREFIX = "checkpoint-"
_TEMPORARY = ".writing-"
_COMPLETE = "complete.json"


def save_checkpoint(output: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Publish ``output/checkpoint-STEP`` with what ``write`` puts into a folder; drop all but the newest ``keep``."""
    folder = output / f"{_PREFIX}{step:08d}"

    def complete(temporary: Path) -> None:
        write(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        entries = {path.relative_to(temporary).as_posix(): _entry(path) for path in files}
        (temporary / _COMPLETE).write_text(json.dumps({"step": step, "files": entries}, indent=1))

    replace_folder(folder, complete)
    for old in list_checkpoints(output)[keep:]:
        # Renamed first: a checkpoint half-way through its removal must not look like one.
        doomed = old.with_name(f"{_TEMPORARY}old-{old.name}-{os.getpid()}")
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return folder


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a temporary folder with ``write``, flush it to the disk and rename it to ``folder``, replacing that."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{folder.name}-", dir=folder.parent))
    try:
        write(temporary)
        _flush(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            aside = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}old-", dir=folder.parent))
            folder.rename(aside / folder.name)
            temporary.rename(folder)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(folder)
        _flush_one(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def list_checkpoints(output: Path) -> list[Path]:
    """Checkpoints of a run, newest first, by name only."""
    return sorted((path for path in output.glob(f"{_PREFIX}*") if path.is_dir()), reverse=True)


def newest(output: Path, say: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint whose files are all as they were written; damaged ones are named and passed over."""
    for folder in list_checkpoints(output):
        problem = _problem(folder)
        if problem is None:
            return folder
        (say or (lambda _line: None))(f"{folder.name} is damaged ({problem}); using the one before it")
    return None


def clean(output: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in output.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    Path(name).chmod(0o644)
    Path(name).replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state; only tensors and plain values are ever built from it."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted loader raises several types
        raise ArtifactError(f"cannot read {path}: it is damaged or not a training state; delete its folder") from error
    return state


def rng_state() -> dict[str, Any]:
    """The state of every generator that training draws from, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one is used by others
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or ``None``."""
    try:
        files = json.loads((folder / _COMPLETE).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"no readable {_COMPLETE}"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"] or _entry(path) != entry:
            return f"{name} has changed"
    return None


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush_one(path)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
