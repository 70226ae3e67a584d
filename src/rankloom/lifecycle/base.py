"""The contract of lifecycles: settings that build a schedule over the run's bindings."""

from __future__ import annotations

from rankloom.adapters import Binding
from rankloom.events import Schedule
from rankloom.parts import Part

__all__ = ["LifecyclePart"]


class LifecyclePart(Part):
    """Settings of what happens between the phases of a run."""

    def build(self, bindings: list[Binding], total_steps: int | None) -> Schedule | None:
        """The schedule of a run of ``total_steps`` optimizer steps, or None where nothing happens between phases.

        Raises:
            RecipeError: ``total_steps`` is needed and missing, or too short for the settings.
        """
        raise NotImplementedError
