"""Ranks stay as built."""

from __future__ import annotations

from dataclasses import dataclass

from rankloom.adapters import Binding
from rankloom.parts import part
from rankloom.rank.base import RankPart

__all__ = ["Fixed"]


@part("rank", "fixed")
@dataclass(frozen=True)
class Fixed(RankPart):
    """Every adapter keeps the rank it was built with."""

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"fixed ranks"})

    def build(self, bindings: list[Binding], total_steps: int | None) -> None:
        return None
