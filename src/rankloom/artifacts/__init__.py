"""Save, load, merge, export: nothing is pickled, nothing loads loosely, every loss of precision is measured and said."""

from rankloom.artifacts.identity import Fingerprint, fingerprint, require_fingerprint
from rankloom.artifacts.merge import Drift, MergeReport, MergeState, merge, unmerge
from rankloom.artifacts.merged import export_merged
from rankloom.artifacts.peft_export import export_peft
from rankloom.artifacts.store import Stored, read_adapter, write_adapter

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
