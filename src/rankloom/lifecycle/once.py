"""A single phase."""

from __future__ import annotations

from dataclasses import dataclass

from rankloom.parts import Part, part

__all__ = ["Once"]


@part("lifecycle", "once")
@dataclass(frozen=True)
class Once(Part):
    """Adapters are attached once and trained to the end: no merging, restarting or freezing on the way."""
