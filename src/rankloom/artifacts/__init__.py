"""Save, load, merge, export: nothing is pickled, nothing loads loosely, every loss of precision is measured and said."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rankloom.artifacts.identity import Fingerprint, fingerprint, require_fingerprint
from rankloom.artifacts.merge import Drift, MergeReport, MergeState, merge, unmerge
from rankloom.artifacts.store import Stored, read_adapter, write_adapter

if TYPE_CHECKING:
    from rankloom.artifacts.merged import export_merged
    from rankloom.artifacts.peft_export import export_peft

__all__ = [
    "Drift",
    "Fingerprint",
    "MergeReport",
    "MergeState",
    "Stored",
    "export_merged",
    "export_peft",
    "fingerprint",
    "merge",
    "read_adapter",
    "require_fingerprint",
    "unmerge",
    "write_adapter",
]

# Exporting is the last thing a program does, if it does it at all: `import rankloom` does not wait for it.
_LATER = {"export_merged": "merged", "export_peft": "peft_export"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
