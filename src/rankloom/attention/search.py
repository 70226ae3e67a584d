"""What is tried on a head, in which order, and how long that takes as the cost model predicts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rankloom.attention.candidates import CANDIDATES, MOST_FEATURES, Kind
from rankloom.attention.certificate import KEYS
from rankloom.attention.cost import CostModel

__all__ = [
    "ROWS",
    "SCREEN_ROWS",
    "Candidate",
    "candidates",
    "certificate_seconds",
    "screen_seconds",
    "screen_step",
    "search_seconds",
]

# Hopeless candidates are told apart on a thinned head and few rows, at a cost that does not grow with the length.
_SCREEN_TOKENS, SCREEN_ROWS, ROWS = 1024, 64, 256
_CERTIFIED = 0.5  # of those screened
_PULLED = 5.0  # steps of the keys that nine samples of rows take
_MATERIALISED = 2.0  # times a row of exact attention takes where its weights are written down


class Candidate(NamedTuple):
    """One size of one kind, its features, and the predicted seconds of a step with it."""

    seconds: float
    kind: Kind
    size: int
    width: int


def candidates(cost: CostModel, dim: int, lengths: Sequence[int]) -> list[Candidate]:
    """Everything worth its certificate on sequences of ``lengths``, fastest first."""
    longest = max(lengths)
    sizes = [(k, c.width(dim, n), n) for k, c in CANDIDATES.items() for n in c.sizes(dim, MOST_FEATURES, sum(lengths))]
    timed = (Candidate(cost.approximate(longest, width, kind), kind, size, width) for kind, width, size in sizes)
    return sorted(candidate for candidate in timed if candidate.seconds < cost.worth(longest))


def certificate_seconds(cost: CostModel, length: int, width: int, kind: Kind, rows: int = ROWS) -> float:
    """About what one certificate takes, the forward and backward pass that it judges included.

    With ``a(n)`` the approximation's and ``E(n)`` exact attention's time for the ``g`` query heads, ``K`` the keys compared,

        a(n) + 5 a(min(n, K)) / (1 + g) + 2 E(n) rows / (g n),

    as keys have a share of ``1 / (1 + g)`` in a step, and each of nine samples of rows takes about half of that.
    """
    rows = min(rows, cost.group * length)
    pulled = _PULLED / (1 + cost.group) * cost.approximate(min(length, KEYS), width, kind)
    exact = _MATERIALISED * cost.exact(length) * rows / (cost.group * length)
    return cost.approximate(length, width, kind) + pulled + exact


def screen_step(length: int) -> int:
    """Every so many-th token of a sequence is screened."""
    return max(1, length // _SCREEN_TOKENS)


def screen_seconds(cost: CostModel, length: int, width: int, kind: Kind) -> float:
    """:func:`certificate_seconds` of a screen."""
    return certificate_seconds(cost, -(-length // screen_step(length)), width, kind, SCREEN_ROWS)


def search_seconds(cost: CostModel, dim: int, lengths: Sequence[int], *, features: int | None = None) -> float:
    """What to expect of :func:`~rankloom.attention.fitting.fit` for one head of ``dim``, before it is known what it finds.

    All candidates screened and half of them certified; or where the isotropic polynomial of so many ``features`` is expected to
    pass, everything as fast screened and that certified.
    """

    def certified(width: int, kind: Kind) -> float:
        return sum(certificate_seconds(cost, n, width, kind) for n in lengths)

    def screened(width: int, kind: Kind) -> float:
        return screen_seconds(cost, lengths[0], width, kind)

    tried = candidates(cost, dim, lengths)
    if features is None:
        return sum(screened(c.width, c.kind) + _CERTIFIED * certified(c.width, c.kind) for c in tried)
    within = cost.approximate(max(lengths), features, "isotropic")
    return sum(screened(c.width, c.kind) for c in tried if c.seconds <= within) + certified(features, "isotropic")
