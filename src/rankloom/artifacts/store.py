"""Our own format: ``adapter.safetensors`` and ``manifest.json`` in one folder."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rankloom.artifacts.files import (
    existing,
    read_json,
    read_tensors,
    replacing,
    sha256,
    write_json,
    write_tensors,
)
from rankloom.artifacts.identity import Fingerprint
from rankloom.errors import ArtifactError, RankloomError
from rankloom.recipe import Recipe

__all__ = ["FORMAT_VERSION", "MANIFEST", "TENSORS", "Stored", "read_adapter", "versions", "write_adapter"]

FORMAT, FORMAT_VERSION = "rankloom-adapter", 1
TENSORS, MANIFEST = "adapter.safetensors", "manifest.json"


@dataclass(frozen=True)
class Stored:
    """An adapter as read from a folder. ``fingerprint`` is None where the format does not record the base (PEFT)."""

    recipe: Recipe
    tensors: dict[str, Tensor]
    fingerprint: Fingerprint | None = None
    report: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """The versions that made an artifact, without importing anything that is not loaded."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("rankloom", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def write_adapter(
    path: Path, *, recipe: Recipe, tensors: Mapping[str, Tensor], fingerprint: Fingerprint, report: Mapping[str, Any]
) -> Path:
    """Write the folder atomically; an adapter that was there is replaced only once the new one is complete.

    Raises:
        ArtifactError: the folder holds other files, or cannot be written.
    """
    with replacing(path, (TENSORS, MANIFEST)) as staging:
        write_tensors(staging / TENSORS, tensors)
        entry = {
            "sha256": sha256(staging / TENSORS),
            "bytes": (staging / TENSORS).stat().st_size,
            "tensors": len(tensors),
        }
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "recipe": recipe.to_dict(),
            "base": asdict(fingerprint),
            "files": {TENSORS: entry},
            "versions": versions(),
            "report": dict(report),
        }
        write_json(staging / MANIFEST, manifest)
    return path


def read_adapter(path: Path, model: nn.Module) -> Stored:
    """Read an adapter folder: ours, or one of PEFT's, whose names are resolved on ``model``.

    Raises:
        ArtifactError: nothing there, truncated, damaged, pickled, foreign, or written by a newer version.
    """
    folder = existing(path)
    if (folder / MANIFEST).is_file():
        return _read_own(folder)
    if (folder / "adapter_config.json").is_file():
        from rankloom.artifacts.peft_import import import_peft

        return import_peft(folder, model)
    if (folder / TENSORS).is_file():
        raise ArtifactError(
            f"{folder} has {TENSORS} but no {MANIFEST}: copy the whole folder, or save the adapter again"
        )
    read_tensors(folder / TENSORS)  # says what is missing, and whether a pickle is there instead
    raise AssertionError("unreachable")


def _read_own(folder: Path) -> Stored:
    manifest = _checked_manifest(folder)
    tensors = _checked_tensors(folder, manifest["files"][TENSORS])
    made_by = manifest["versions"].get("rankloom", "?")
    try:
        recipe = Recipe.from_dict(manifest["recipe"])
    except RankloomError as error:
        raise ArtifactError(
            f"the recipe in {folder / MANIFEST} (rankloom {made_by}) is not understood: {error}"
        ) from None
    base = Fingerprint.from_dict(manifest["base"])
    return Stored(recipe, tensors, base, manifest["report"], manifest["versions"])


def _checked_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST)
    where = folder / MANIFEST
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{where} is not a rankloom manifest (format {manifest.get('format')!r}): wrong folder?")
    version = manifest.get("version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        made_by = (manifest.get("versions") or {}).get("rankloom", "a newer version")
        raise ArtifactError(
            f"{where} has format version {version} (rankloom {made_by}), this rankloom reads up to {FORMAT_VERSION}: "
            f"upgrade with pip install -U rankloom"
        )
    shape = {"recipe": dict, "base": dict, "files": dict, "versions": dict, "report": dict}
    lacking = [key for key, kind in shape.items() if not isinstance(manifest.get(key), kind)]
    if lacking or not isinstance(manifest["files"].get(TENSORS), dict):
        raise ArtifactError(f"{where} lacks {', '.join(lacking) or TENSORS}: copy or save the adapter again")
    known = set(Fingerprint.__dataclass_fields__)
    if not {"digest"} <= manifest["base"].keys() <= known:
        raise ArtifactError(f"{where} has an unreadable base entry: copy or save the adapter again")
    return manifest


def _checked_tensors(folder: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / TENSORS
    tensors = read_tensors(path)  # first: a damaged file gets the more telling error
    if (found := path.stat().st_size) != entry.get("bytes"):
        raise ArtifactError(f"{path} has {found} bytes, the manifest says {entry.get('bytes')}: copy or save it again")
    if (digest := sha256(path)) != entry.get("sha256"):
        raise ArtifactError(
            f"{path} has changed since it was saved (sha256 {digest[:12]}..., the manifest says "
            f"{str(entry.get('sha256'))[:12]}...): copy or save the adapter again"
        )
    if len(tensors) != entry.get("tensors"):
        raise ArtifactError(f"{path} holds {len(tensors)} tensors, the manifest says {entry.get('tensors')}")
    return tensors
