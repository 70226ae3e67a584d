"""The contract of rank allocation: settings that build a schedule over the run's bindings."""

from __future__ import annotations

from rankloom.adapters import Binding
from rankloom.events import Schedule
from rankloom.parts import Part

__all__ = ["RankPart"]


class RankPart(Part):
    """Settings of a rank schedule."""

    def ranks(self, bindings: list[Binding]) -> dict[str, int] | None:
        """Ranks by target that the weights ask for, before the init; None where they stay as the recipe has them."""
        return None

    def build(self, bindings: list[Binding], total_steps: int | None) -> Schedule | None:
        """The schedule of a run of ``total_steps`` optimizer steps, or None where nothing happens over time.

        Raises:
            RecipeError: ``total_steps`` is needed and missing, or too short for the settings.
        """
        raise NotImplementedError
