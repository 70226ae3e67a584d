"""Save, load, merge, export: nothing is pickled, nothing loads loosely, every loss of precision is measured and said."""

from typing import Any

from rankloom.artifacts.identity import Fingerprint, fingerprint, require_fingerprint
from rankloom.artifacts.merge import Drift, MergeReport, MergeState, merge, unmerge
from rankloom.artifacts.peft_export import export_peft
from rankloom.artifacts.store import Stored, read_adapter, write_adapter


def _later(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("artifacts: being written")


export_merged = _later

__all__ = [
    "Drift",
    "Fingerprint",
    "MergeReport",
    "MergeState",
    "Stored",
    "export_peft",
    "fingerprint",
    "merge",
    "read_adapter",
    "require_fingerprint",
    "unmerge",
    "write_adapter",
]
