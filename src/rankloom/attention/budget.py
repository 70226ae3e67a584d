r"""What looking for approximations may cost: a share of the exact attention that they might replace.

All in seconds that a :class:`~rankloom.attention.cost.CostModel` predicts; no clock decides anything, so a run continued from
its state decides as it would have done. With ``E`` what exact attention takes for all training passes so far, ``S`` what
approximations saved of that, and ``M`` what measurements and calibrations took,

    balance = share E + S / 2 - M,

and a measurement waits until the balance covers it. The attention of a run takes ``E - S + M``, so at any time at most
``(1 + share) E``, and at least half of what is saved stays saved.

*To start with*, a head whose logits vary little is measured in advance, once, and the cost model calibrated for it, if half of
what exact attention takes in one refresh period pays for that. The first such head whose measurement fails ends this credit
for good, so heads that fail exceed the bound by one calibration a head geometry and one measurement at most. Heads that pass
win their advance back within steps, but a run that ends before that has paid for it. Heads that do not look like passing get
nothing in advance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import comb, exp, inf
from typing import Any

import torch
from torch import Tensor

from rankloom.attention.candidates import MOST_FEATURES
from rankloom.attention.cost import CostModel
from rankloom.attention.fitting import Fit
from rankloom.attention.precondition import Preconditioner

__all__ = ["HOPELESS", "Budget", "Place", "booked", "calibration_pairs", "promise", "search_seconds", "too_short"]

Place = tuple[int, int, int, bool, str, str]
"""What decides about time beside the length: ``(d, d_v, g, causal, device, dtype)``."""

HOPELESS = 10.0
"""A head whose best candidate errs by this many times ``eps`` is not about to pass."""

# Query-key pairs of exact attention that take as long as one calibration, times d. Measured on a CPU: 0.6e10 to 4.2e10, for d
# of 16 to 128. Elsewhere an estimate: a timed call lasts 4 ms or more, in which an accelerator does 1000 times the pairs.
_CALIBRATION, _ACCELERATED = 3e10, 1000
_SCREENED, _NARROWEST = 1024, 64
_LOOK_ROWS, _MOST_DEGREE = 256, 8
_GRADIENTS = 10.0  # times the output's error is what gradients err by, give or take
_TOKENS_A_FEATURE = 4  # from about so many on approximations are faster


class Budget:
    """The account of one run. ``trusted`` is whether heads are still measured in advance."""

    def __init__(self, share: float, refresh: int, given: CostModel | None) -> None:
        self.share, self.refresh, self.given = share, refresh, given
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
        cost = self.model(place)
        if cost is None:
            pairs, ran = calibration_pairs(place), self.passes.get(place, (0.0, 0.0))[1]
            if not (pairs <= self.share * ran or (advance and pairs <= ran / (steps + 1) * self.refresh / 2)):
                return "calibration"
            cost = self.costs[place] = calibrate()
            self.spent += cost.quadratic[1] * pairs
            allowance = min(allowance, max(self.balance, 0.0))
        if too_short(cost, lengths):
            return "length"
        price = search_seconds(cost, lengths)
        if price <= allowance:
            return cost
        if advance and _expected(cost, lengths, features) <= sum(map(cost.exact, lengths)) * self.refresh / 2:
            return cost
        return "budget"

    def calibrates(self, place: Place) -> bool:
        """Whether a calibration that nobody lends for is paid for."""
        return calibration_pairs(place) <= self.share * self.passes.get(place, (0.0, 0.0))[1]

    def pay(self, cost: CostModel, lengths: Sequence[int], found: Fit, eps: float) -> None:
        """Book a measurement by what it found."""
        self.spent += booked(cost, lengths, found, eps)

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


def search_seconds(cost: CostModel, lengths: Sequence[int], *, within: float = inf, certified: bool = True) -> float:
    """About what :func:`~rankloom.attention.fitting.fit` takes for one head.

    With ``a(n, w)`` the approximation's time of width ``w``, over all kinds and widths (64, 128, ... 4096) that are worth using
    at the longest length and no slower than ``within``,

        (2 + 6 / g) sum_w [ a(1024, w) + 1/2 sum_n a(n, w) ],

    as a certificate evaluates the approximation and forms its keys' features for each batch of rows (shared by the ``g`` query
    heads), every candidate is screened, and half of them (none unless ``certified``) are certified at full length. That is more
    than it takes: 1.0 to 4 times (``bench/limits_overhead.py``).
    """
    longest = max(lengths)
    screened = -(-longest // max(1, longest // _SCREENED))
    limit, total = min(cost.worth(longest), within), 0.0
    for kind in cost.linear:
        width = _NARROWEST
        while width <= MOST_FEATURES and cost.approximate(longest, width, kind) <= limit:
            total += cost.approximate(screened, width, kind)
            total += certified * sum(cost.approximate(n, width, kind) for n in lengths) / 2
            width *= 2
    return (2 + 6 / cost.group) * total


def booked(cost: CostModel, lengths: Sequence[int], found: Fit, eps: float) -> float:
    """What a search took by what it found: all candidates as fast as that, its own certificate at the least."""
    if found.approximation is None:
        return search_seconds(cost, lengths, certified=found.error <= HOPELESS * eps)
    last = (2 + 6 / cost.group) * found.seconds * sum(lengths) / max(lengths)
    return max(last, search_seconds(cost, lengths, within=found.seconds))


def _expected(cost: CostModel, lengths: Sequence[int], features: int) -> float:
    """A search that ends, after screens only, with the first certificate of so many features."""
    last = [cost.approximate(n, features, "isotropic") for n in lengths]
    return search_seconds(cost, lengths, within=max(last), certified=False) + (2 + 6 / cost.group) * sum(last)


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
