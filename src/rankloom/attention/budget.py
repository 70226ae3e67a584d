r"""What looking for approximations may cost: a share of the exact attention that they might replace.

All in seconds that a :class:`~rankloom.attention.cost.CostModel` predicts; no clock decides anything, so a run continued from
its state decides as it would have done. With ``E`` what exact attention takes for all training passes so far, ``S`` what
approximations saved of that, and ``M`` what measurements and calibrations took,

    balance = share E + S / 2 - M,

and a measurement waits until the balance covers what it is expected to take; booked is what it then tried. The attention of a
run takes ``E - S + M``, so at any time about ``(1 + share) E`` at most, and at least half of what is saved stays saved.

*To start with*, a head whose logits vary little is measured in advance, once, and the cost model calibrated for it, if half of
what exact attention takes in one refresh period, or in the steps that the run still has where that is known to be less, pays for
that. The first such head whose measurement fails ends this credit for good, so heads that fail exceed the bound by one
calibration a head geometry and one measurement at most. Heads that pass win their advance back within steps, but a run of
unknown length that ends before that has paid for it. Heads that do not look like passing get nothing in advance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import comb, exp
from typing import Any

import torch
from torch import Tensor

from rankloom.attention.cost import CostModel
from rankloom.attention.precondition import Preconditioner
from rankloom.attention.search import search_seconds

__all__ = ["Budget", "Place", "calibration_pairs", "promise", "too_short"]

Place = tuple[int, int, int, bool, str, str]
"""What decides about time beside the length: ``(d, d_v, g, causal, device, dtype)``."""

# Query-key pairs of exact attention that take as long as one calibration, times d. Measured on a CPU: 1.7e10 and 2.5e10, for d
# of 16 and 64. Elsewhere an estimate: a timed call lasts 4 ms or more, in which an accelerator does 1000 times the pairs.
_CALIBRATION, _ACCELERATED = 2e10, 1000
_SEARCHED = 6.0  # passes of exact attention that the search takes where one passes: 2 to 6 were measured
_LOOK_ROWS, _MOST_DEGREE = 256, 8
_GRADIENTS = 10.0  # times the output's error is what gradients err by, give or take
_TOKENS_A_FEATURE = 4  # from about so many on approximations are faster


class Budget:
    """The account of one run, of ``total`` steps where that is known. ``trusted`` is whether heads are still measured in
    advance."""

    def __init__(self, share: float, refresh: int, given: CostModel | None, total: int | None = None) -> None:
        self.share, self.refresh, self.given, self.total = share, refresh, given, total
        self.costs: dict[Place, CostModel] = {}
        self.passes: dict[Place, tuple[float, float]] = {}
        self.saved = self.spent = 0.0
        self.trusted = True

    def model(self, place: Place) -> CostModel | None:
        """Predicted times, where they are known."""
        return self.given or self.costs.get(place)

    def ran(self, place: Place, lengths: Sequence[int], heads: int) -> None:
        """A training pass of so many key heads over sequences of these lengths."""
        tokens, squares = self.passes.get(place, (0.0, 0.0))
        self.passes[place] = tokens + heads * sum(lengths), squares + heads * sum(n * n for n in lengths)

    @property
    def exact(self) -> float:
        """Seconds of exact attention for all training passes, as far as times are known."""
        known = ((self.model(place), sums) for place, sums in self.passes.items())
        return sum(
            c.quadratic[0] * tokens + c.quadratic[1] * squares for c, (tokens, squares) in known if c is not None
        )

    @property
    def balance(self) -> float:
        """Seconds that may be spent now."""
        return self.share * self.exact + self.saved / 2 - self.spent

    def admit(
        self,
        place: Place,
        lengths: Sequence[int],
        allowance: float,
        calibrate: Callable[[], CostModel],
        *,
        steps: int = 0,
        features: int = 0,
    ) -> CostModel | str:
        """The times to measure a head by, within ``allowance`` seconds or in advance if it promises to pass with so many
        ``features``; or why it has to wait."""
        advance = features > 0 and self.trusted
        ahead = self.refresh if self.total is None else min(self.refresh, self.total - steps)
        cost = self.model(place)
        if cost is None:
            pairs, ran = calibration_pairs(place), self.passes.get(place, (0.0, 0.0))[1]
            if not (pairs <= self.share * ran or (advance and pairs <= ran / (steps + 1) * (ahead / 2 - _SEARCHED))):
                return "calibration"
            cost = self.costs[place] = calibrate()
            self.spent += cost.quadratic[1] * pairs
            allowance = min(allowance, max(self.balance, 0.0))
        if too_short(cost, lengths):
            return "length"
        if search_seconds(cost, place[0], lengths) <= allowance:
            return cost
        lent = sum(map(cost.exact, lengths)) * ahead / 2
        if advance and search_seconds(cost, place[0], lengths, features=features) <= lent:
            return cost
        return "budget"

    def calibrates(self, place: Place) -> bool:
        """Whether a calibration that nobody lends for is paid for."""
        return calibration_pairs(place) <= self.share * self.passes.get(place, (0.0, 0.0))[1]

    def report(self) -> dict[str, Any]:
        """The account, in predicted seconds."""
        return {name: getattr(self, name) for name in ("share", "exact", "saved", "spent", "trusted")}

    def state(self) -> dict[str, Any]:
        """Everything that decides, as plain values."""
        costs = [(place, asdict(cost)) for place, cost in self.costs.items()]
        passes = list(self.passes.items())
        return {"costs": costs, "passes": passes, "saved": self.saved, "spent": self.spent, "trusted": self.trusted}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.costs = {_place(place): CostModel(**cost) for place, cost in state["costs"]}
        self.passes = {_place(place): (tokens, squares) for place, (tokens, squares) in state["passes"]}
        self.saved, self.spent, self.trusted = state["saved"], state["spent"], state["trusted"]


def too_short(cost: CostModel, lengths: Sequence[int]) -> bool:
    """Whether no factor, however narrow, is faster than exact attention on sequences of these lengths."""
    return not any(cost.widest(max(lengths), kind, most=1) for kind in cost.linear)


@torch.no_grad()
def promise(q: Tensor, k: Tensor, scale: float, eps: float, generator: torch.Generator) -> int:
    """With how many features a polynomial may serve queries ``q`` (n, d) and keys ``k`` (L, d), or 0 where with too many.

    For centred normal logits of variance ``V`` the best polynomial of degree ``g`` misses ``P(Poisson(V) > g)`` of the squared
    norm of ``e^s`` (the tail of its Hermite series). The degree is the least that leaves ``(eps / 10)^2``, as gradients err
    more than the output, and ``L / 4`` features are too many. A look decides about an advance, never about a head.
    """
    spectrum = Preconditioner.fit(q, k, scale, rows=_LOOK_ROWS, generator=generator).spectrum
    variance, dim = float(spectrum.double().square().sum()), len(spectrum)
    term = exp(-variance)
    tail = 1.0 - term
    for degree in range(1, _MOST_DEGREE + 1):
        term *= variance / degree
        tail -= term
        if tail <= (eps / _GRADIENTS) ** 2:
            features = comb(dim + degree, degree)
            return features if _TOKENS_A_FEATURE * features <= len(k) else 0
    return 0


def calibration_pairs(place: Place) -> float:
    """Query-key pairs of exact attention that take about as long as calibrating the cost model."""
    dim, device = place[0], place[4]
    return _CALIBRATION / dim * (1 if device == "cpu" else _ACCELERATED)


def _place(stored: Sequence[Any]) -> Place:
    dim, dim_v, group, causal, device, dtype = stored
    return dim, dim_v, group, causal, device, dtype
