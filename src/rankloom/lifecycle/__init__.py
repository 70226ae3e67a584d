"""What happens between the phases of a run."""

from rankloom.lifecycle.base import LifecyclePart
from rankloom.lifecycle.freeze_columns import FreezeColumns
from rankloom.lifecycle.once import Once
from rankloom.lifecycle.restart import MergeAndRestart

__all__ = [
    "FreezeColumns",
    "LifecyclePart",
    "MergeAndRestart",
    "Once",
]
