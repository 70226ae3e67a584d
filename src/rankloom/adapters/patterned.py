"""Settings that hold for some targets only: ``rank_pattern`` and ``alpha_pattern``, the last match wins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rankloom.adapters.base import AdapterPart
from rankloom.errors import RecipeError, TargetError, near_names
from rankloom.targets import Target, matches

__all__ = ["PatternedPart", "last_match", "require_matches"]

T = TypeVar("T")


def last_match(patterns: dict[str, T], name: str, default: T) -> T:
    """The value of the last pattern that matches a target's name."""
    found = [value for pattern, value in patterns.items() if _matches(pattern, name)]
    return found[-1] if found else default


def require_matches(patterns: Iterable[str], targets: list[Target]) -> None:
    """Raise :class:`TargetError` where a pattern matches none of the targets."""
    names = [target.name for target in targets]
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in names):
            raise TargetError(f"adapter pattern {pattern!r} matches none of the targets{near_names(pattern, names)}")


def _matches(pattern: str, name: str) -> bool:
    """A pattern for a fused module holds for its slices too."""
    return matches(pattern, name) or matches(pattern, name.partition("[")[0])


class PatternedPart(AdapterPart):
    """Settings with a ``rank`` and an ``alpha`` that patterns override, for forms scaled by ``alpha / rank``."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    def check(self) -> None:
        if min([self.rank, *self.rank_pattern.values()]) < 1:
            given = f" with rank_pattern {self.rank_pattern}" if self.rank_pattern else ""
            raise RecipeError(f"adapter rank must be at least 1, got {self.rank}{given}")

    def check_on(self, targets: list[Target]) -> None:
        require_matches((*self.rank_pattern, *self.alpha_pattern), targets)

    def rank_of(self, target: str) -> int:
        """The rank set for a target name."""
        return last_match(self.rank_pattern, target, self.rank)

    def alpha_of(self, target: str) -> float:
        """Alpha for a target name."""
        return last_match(self.alpha_pattern, target, self.alpha)

    def scale_of(self, target: str) -> float:
        """``alpha / rank`` for a target name."""
        return self.alpha_of(target) / self.rank_of(target)
