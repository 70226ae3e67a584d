"""Folders that appear whole or not at all, and strict reading of what is in them. Nothing here is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from rankloom.errors import ArtifactError

__all__ = ["existing", "plain", "read_json", "read_tensors", "replacing", "sha256", "write_json", "write_tensors"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@contextmanager
def replacing(path: Path, owned: Iterable[str]) -> Iterator[Path]:
    """A staging folder that becomes ``path`` when the block ends without an error.

    Files are flushed to disk before the rename. An existing folder is set aside, not overwritten, until the new one is in
    place, and :func:`existing` finds it there if the process dies between the two renames: at every moment one complete
    folder can be read.

    Args:
        path: the folder to make or replace.
        owned: file patterns that may be replaced; a folder that holds anything else is somebody's work and is refused.

    Raises:
        ArtifactError: ``path`` is a file, holds foreign files, or cannot be written.
    """
    path = path.absolute()
    _refuse_foreign(path, tuple(owned))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.new-", dir=path.parent))
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}") from None
    try:
        yield staging
        _commit(staging, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_foreign(path: Path, owned: tuple[str, ...]) -> None:
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path} is a file: give a folder to write to")
    entries = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in entries if not any(fnmatchcase(name, pattern) for pattern in owned)]
    if foreign:
        raise ArtifactError(
            f"{path} holds {len(foreign)} other entries (as {foreign[0]}) that replacing it would lose: give a folder of "
            f"its own"
        )


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _commit(staging: Path, path: Path) -> None:
    previous = _previous(path)
    if previous.exists() and not path.exists():  # an earlier writer died between its two renames
        previous.rename(path)
    shutil.rmtree(previous, ignore_errors=True)
    staging.chmod(0o777 & ~_umask())
    for file in [*staging.rglob("*"), staging]:
        _sync(file)
    if path.exists():
        path.rename(previous)
    staging.rename(path)
    _sync(path.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def existing(path: Path) -> Path:
    """The folder to read ``path`` from: itself, or the complete one a dying writer had set aside.

    Raises:
        ArtifactError: there is neither.
    """
    if path.is_dir():
        return path
    if not path.exists() and _previous(path.absolute()).is_dir():
        return _previous(path.absolute())
    what = "is a file: give the folder it is in" if path.exists() else "does not exist"
    raise ArtifactError(f"adapter folder {path} {what}")


def plain(value: Any) -> Any:
    """A value as JSON can hold it: dataclasses as mappings, tensors as numbers, numbers that are not finite as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return plain(value.detach().cpu().tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(plain(value), indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises :class:`ArtifactError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}): copy or save the adapter again") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds a JSON {type(value).__name__}, not an object: this is not an adapter's file")
    return value


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors; every tensor a contiguous copy of its own, so shared storage cannot surprise a reader."""
    from safetensors.torch import save_file

    # The marker is what every other reader of safetensors expects of a torch file.
    own = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    save_file(own, path, metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors.

    Raises:
        ArtifactError: the file is missing, truncated, damaged, or a pickle (which is never opened).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ArtifactError(_missing(path))
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        with path.open("rb") as file:  # only now: a sound file's first bytes are a length, and may look like anything
            if file.read(4).startswith(_PICKLE_MAGIC):
                raise ArtifactError(f"{path} is a pickle, which can run code when opened: {_RESAVE}") from None
        raise ArtifactError(
            f"{path} is truncated or damaged ({path.stat().st_size} bytes; {error}): copy or save the adapter again"
        ) from None


_RESAVE = "save it again as safetensors (peft: model.save_pretrained(path); torch: safetensors.torch.save_file)"


def _missing(path: Path) -> str:
    names = sorted(p.name for p in path.parent.iterdir())
    pickles = [name for name in names if any(fnmatchcase(name, pattern) for pattern in _PICKLES)]
    if pickles:
        return f"{path.parent} has no {path.name} but the pickle {pickles[0]}, which is never opened: {_RESAVE}"
    return f"{path.parent} has no {path.name} (it holds {', '.join(names[:4]) or 'nothing'}): this is no adapter folder"
