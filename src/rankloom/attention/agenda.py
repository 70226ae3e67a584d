"""When the heads of a model are measured: due by back-off, in turn by layer, and as far as the budget goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from rankloom.attention.budget import Budget, too_short
from rankloom.attention.fitting import Fit
from rankloom.attention.search import search_seconds

if TYPE_CHECKING:
    from rankloom.attention.heads import Layer

__all__ = ["Turn", "plan"]

_LONGEST = 64
_HOPELESS = 10.0  # times eps: a head whose best candidate errs so much is not about to pass
_SLACK = 2.0  # the lengths of the next batch may differ from those of the last


@dataclass
class Turn:
    """One head's place in the queue.

    ``due`` is the step from which on it wants to be measured, ``waits`` why it waits although it is due; ``measurements`` counts
    all, ``failures`` those since the last that passed (a hopeless one twice); ``promised`` are the features that the first
    look expects to do (0 for none), ``rate`` the predicted seconds a token of its last fit and ``saved`` what that saved since.
    """

    due: int = 0
    failures: int = 0
    measurements: int = 0
    waits: str = ""
    promised: int = 0
    rate: float = 0.0
    saved: float = 0.0

    @property
    def proven(self) -> bool:
        """Whether the last measurement passed."""
        return self.measurements > 0 and self.failures == 0

    def measured(self, found: Fit, *, step: int, refresh: int, eps: float, length: int) -> None:
        """Due again after one refresh period, or after ``2^failures`` of them, at most 64."""
        if found.approximation is not None:
            self.failures, self.rate = 0, found.seconds / length
        else:
            self.failures += 1 if found.error <= _HOPELESS * eps else 2
        self.due = step + refresh * min(2**self.failures, _LONGEST)
        self.measurements, self.waits, self.saved = self.measurements + 1, "", 0.0


@dataclass
class _Wish:
    layer: Layer
    head: int
    turn: Turn
    price: float | None
    reason: str
    done: int

    def rank(self) -> tuple[Any, ...]:
        turn, price = self.turn, inf if self.price is None else self.price
        done = 0 if turn.proven else self.done
        return not turn.proven, done, turn.measurements, not turn.promised, price, self.head, self.layer.index


def plan(layers: Iterable[Layer], budget: Budget, step: int) -> None:
    """Decide which due heads are measured in ``step``: ``layer.wanted[head]`` are the seconds they may take.

    Proven heads come first; then those of the layer with the fewest measurements, of these the least measured, the promising,
    the cheapest. The first of them that the balance does not cover ends the list, or what it waits for would never come together.
    A proven head may also be paid for by half of what it saved; where nothing pays for a new certificate the old one lapses,
    and the head is exact until its turn. With many processes each plans for itself: nothing here waits for another.
    """
    wishes: list[_Wish] = []
    for layer in layers:
        layer.wanted = {}
        due = {head: turn for head, turn in layer.turns.items() if turn.due <= step}
        if due:
            cost, done = budget.model(layer.place), sum(turn.measurements for turn in layer.turns.values())
            price = None
            if cost is not None and not too_short(cost, layer.lengths):
                price = search_seconds(cost, layer.place[0], layer.lengths)
            reason = "calibration" if cost is None else "length"
            wishes += [_Wish(layer, head, turn, price, reason, done) for head, turn in due.items()]
    left, calibrating = budget.balance, set()
    for wish in sorted(wishes, key=_Wish.rank):
        layer, turn, price = wish.layer, wish.turn, wish.price
        turn.waits = wish.reason if price is None else ""
        if turn.waits == "calibration" and layer.place not in calibrating and budget.calibrates(layer.place):
            calibrating.add(layer.place)
            turn.waits, layer.wanted[wish.head] = "", inf
        elif price is not None and (price <= left or (turn.proven and price <= turn.saved / 2)):
            left -= price
            layer.wanted[wish.head] = _SLACK * price
        elif price is not None:
            turn.waits = "budget"
            left = left if turn.proven else -inf
        if turn.waits:
            layer.lapse(wish.head)
