"""Searches of a learning rate: which rates a method tries, from what it has seen so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

__all__ = ["LADDER", "Fibonacci", "Grid", "Search"]

LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


class Search(Protocol):
    """``found`` maps rates to the final loss of their runs, infinite for a run that diverged."""

    def visit(self, found: Mapping[float, float]) -> tuple[list[float], float | None]:
        """The rates that the search has tried, in order, and the next one it wants; None once it is over."""

    def at_edge(self, rate: float) -> bool:
        """Whether no lower or no higher rate could have been tried."""


def best(search: Search, found: Mapping[float, float]) -> float | None:
    """The rate of the lowest loss, once the search is over and one has not diverged."""
    visited, wanted = search.visit(found)
    if wanted is not None:
        return None
    chosen = min(visited, key=lambda rate: found[rate])
    return chosen if math.isfinite(found[chosen]) else None


@dataclass(frozen=True)
class Grid:
    """All of some rates."""

    rates: tuple[float, ...]

    def visit(self, found: Mapping[float, float]) -> tuple[list[float], float | None]:
        tried = [rate for rate in self.rates if rate in found]
        return tried, next((rate for rate in self.rates if rate not in found), None)

    def at_edge(self, rate: float) -> bool:
        return rate in (self.rates[0], self.rates[-1])


@dataclass(frozen=True)
class Fibonacci:
    """The lattice search of Kiefer (1953): the lowest of ``F - 1`` losses with one minimum, ``F`` a Fibonacci number.

    Twelve rates take five runs, wherever the best one lies: a search that needs no idea of where a method's rates are. Of two
    equal losses the lower rate is kept. Where rates that are too small and rates that are too large both leave a loss higher
    than between the first two tried, the minimum is missed: a study has to look at its rows for that.
    """

    rates: tuple[float, ...] = LADDER

    def visit(self, found: Mapping[float, float]) -> tuple[list[float], float | None]:
        tried: list[float] = []
        short, long = 1, 1
        while short + long < len(self.rates) + 1:
            short, long = long, short + long
        if short + long != len(self.rates) + 1:
            raise ValueError(f"{len(self.rates)} rates: a Fibonacci search takes one less than a Fibonacci number")
        before = -1  # the minimum lies in the `short + long - 1` rates after this one
        while long > 1:
            low, high = before + short, before + long
            for rate in dict.fromkeys((self.rates[low], self.rates[high])):
                if rate not in tried:
                    if rate not in found:
                        return tried, rate
                    tried.append(rate)
            if found[self.rates[high]] < found[self.rates[low]]:
                before = low
            short, long = long - short, short
        return tried, None

    def at_edge(self, rate: float) -> bool:
        return rate in (self.rates[0], self.rates[-1])
