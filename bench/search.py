"""Searches of a learning rate: which rates a method tries, from what it has seen so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

__all__ = ["LADDER", "Climb", "Grid", "Search"]

LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


class Search(Protocol):
    """``found`` maps rates to the final loss of their runs, infinite for a run that diverged."""

    def visit(self, found: Mapping[float, float]) -> tuple[list[float], float | None]:
        """The rates that the search has tried, in order, and the next one it wants; None once it is over."""

    def at_edge(self, rate: float, found: Mapping[float, float]) -> bool:
        """Whether the rate below or the one above has not been tried, so that a better one may lie there."""


def best(search: Search, found: Mapping[float, float]) -> float | None:
    """The rate of the lowest loss, once the search is over and one has not diverged."""
    visited, wanted = search.visit(found)
    if wanted is not None:
        return None
    chosen = min(visited, key=lambda rate: (found[rate], rate))
    return chosen if math.isfinite(found[chosen]) else None


@dataclass(frozen=True)
class Grid:
    """All of some rates."""

    rates: tuple[float, ...]

    def visit(self, found: Mapping[float, float]) -> tuple[list[float], float | None]:
        tried = [rate for rate in self.rates if rate in found]
        return tried, next((rate for rate in self.rates if rate not in found), None)

    def at_edge(self, rate: float, found: Mapping[float, float]) -> bool:
        return rate in (self.rates[0], self.rates[-1])


@dataclass(frozen=True)
class Climb:
    """Three decades first, then each time the untried rate nearest to the best so far, the higher one of two.

    Equally many runs whoever is searched, and no idea of where its rates lie. A loss need not have one minimum: where rates
    that are too low change nothing, and the least too high ones diverge, a search that halves an interval follows the noise
    of the plateau, so decades come first. Of two equal losses the lower rate is kept.
    """

    first: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    runs: int = 6
    rates: tuple[float, ...] = LADDER

    def visit(self, found: Mapping[float, float]) -> tuple[list[float], float | None]:
        tried: list[float] = []
        while len(tried) < self.runs:
            wanted = self.first[len(tried)] if len(tried) < len(self.first) else self._nearest(tried, found)
            if wanted not in found:
                return tried, wanted
            tried.append(wanted)
        return tried, None

    def _nearest(self, tried: list[float], found: Mapping[float, float]) -> float:
        at = self.rates.index(min(sorted(tried), key=lambda rate: found[rate]))
        left = [place for place, rate in enumerate(self.rates) if rate not in tried]
        return self.rates[min(left, key=lambda place: (abs(place - at), -place))]

    def at_edge(self, rate: float, found: Mapping[float, float]) -> bool:
        at, tried = self.rates.index(rate), self.visit(found)[0]
        return not set(self.rates[max(0, at - 1) : at + 2]) <= set(tried)
