"""A single phase."""

from __future__ import annotations

from dataclasses import dataclass

from rankloom.adapters import Binding
from rankloom.init import InitPart
from rankloom.lifecycle.base import LifecyclePart
from rankloom.parts import part

__all__ = ["Once"]


@part("lifecycle", "once")
@dataclass(frozen=True)
class Once(LifecyclePart):
    """Adapters are attached once and trained to the end: no merging, restarting or freezing on the way."""

    def build(self, bindings: list[Binding], total_steps: int | None, init: InitPart) -> None:
        return None
