"""How the frozen weights are stored."""

from __future__ import annotations

from dataclasses import dataclass

from rankloom.parts import Part, part

__all__ = ["AsLoaded"]


@part("base", "as-loaded")
@dataclass(frozen=True)
class AsLoaded(Part):
    """The base stays in whatever dtype or quantised form the model was loaded with."""
