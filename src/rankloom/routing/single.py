"""One adapter for everything."""

from __future__ import annotations

from dataclasses import dataclass

from rankloom.parts import Part, part

__all__ = ["Single"]


@part("routing", "single")
@dataclass(frozen=True)
class Single(Part):
    """Every token passes through the one adapter of its target."""
