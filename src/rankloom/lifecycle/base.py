"""The contract of lifecycles: settings that build a schedule over the run's bindings."""

from __future__ import annotations

from rankloom.adapters import Binding
from rankloom.events import Schedule
from rankloom.init import InitPart
from rankloom.parts import Part

__all__ = ["LifecyclePart"]


class LifecyclePart(Part):
    """Settings of what happens between the phases of a run."""

    def prepare(self, bindings: list[Binding], seed: int) -> None:
        """Make room in fresh adapters for what phases leave behind; ``seed`` is of everything random in later phases."""

    def build(self, bindings: list[Binding], total_steps: int | None, init: InitPart) -> Schedule | None:
        """The schedule of a run of ``total_steps`` optimizer steps, or None where nothing happens between phases.

        ``init`` is the recipe's start, for phases that start again.

        Raises:
            RecipeError: ``total_steps`` is needed and missing, or too short for the settings.
        """
        raise NotImplementedError
