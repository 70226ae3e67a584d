"""The heads of one attention layer: the fits in force, the fits found for later, and how both come about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.attention.agenda import Turn
from rankloom.attention.budget import Budget, Place, promise
from rankloom.attention.calls import Tensors, wide
from rankloom.attention.cost import CostModel
from rankloom.attention.fitting import Fit, Sample, fit
from rankloom.errors import AttentionError

__all__ = ["Layer"]

_PLAIN = ("measured", "place", "lengths", "wanted")


@dataclass
class Layer:
    """``fits`` are in force, by key head; ``found`` come into force with the next optimizer step.

    ``turns`` are the heads' places in the queue for measurements, empty until the first look at them; ``wanted`` the heads to
    be measured in this step and the seconds that each may take, ``measured`` whether that has been done. ``place`` and
    ``lengths`` are those of the last training pass.
    """

    name: str
    index: int
    measured: bool = False
    place: Place = (0, 0, 0, False, "", "")
    lengths: tuple[int, ...] = ()
    turns: dict[int, Turn] = field(default_factory=dict)
    wanted: dict[int, float] = field(default_factory=dict)
    fits: dict[int, Fit] = field(default_factory=dict)
    found: dict[int, Fit] = field(default_factory=dict)

    @property
    def asks(self) -> bool:
        """Whether this step measures, or takes the first look."""
        return bool(self.wanted) or not self.turns or self.measured

    def advance(self) -> None:
        """A step is over."""
        self.measured = False
        self.fits.update(self.found)
        self.found = {}

    def lapse(self, head: int) -> None:
        """No longer use a fit whose certificate is out of date."""
        if (chosen := self.fits.get(head)) is not None and chosen.approximation is not None:
            del self.fits[head]

    def waiting(self, head: int) -> str:
        """Why a head has no fit."""
        turn = self.turns.get(head)
        return f"put off: {turn.waits}" if turn is not None and turn.waits else "not measured yet"

    def attend(self, head: int, given: Tensors, *, training: bool) -> tuple[Tensor | None, str]:
        """One key head's output (B, L, g, d_v) and by which factor it was made; or no output, and the reason.

        Padded positions get zeros. Raises :class:`AttentionError` where the inputs are NaN or infinite.
        """
        chosen = self.fits.get(head)
        if chosen is None:
            return None, self.waiting(head)
        approximation, plain = chosen.approximation, given.plain
        if approximation is None:
            return None, chosen.reason
        if plain.shortest < chosen.length:
            return None, "break-even"
        if approximation.causal != plain.causal or approximation.scale != given.scale:
            return None, "fitted to another mask or scale"
        device = given.query.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else given.value.dtype
        outs = []
        with torch.autocast(device, enabled=False):
            for row, (start, stop) in enumerate(plain.ranges):
                q, k, v = given.sequence(head, row)
                out, denominators = approximation(q, _shift_invariant(k), v)
                if not bool(((denominators > 0) & denominators.isfinite()).all()):
                    self.require_finite(given)
                    if training:
                        self.found[head], self.turns[head].failures = Fit("denominator"), 1
                    return None, "denominator"
                outs.append(F.pad(out, (0, 0, start, given.key.shape[2] - stop)))
            return torch.stack(outs).transpose(1, 2).to(dtype), chosen.reason

    def book(self, reasons: Sequence[str], used: Sequence[bool], given: Tensors, budget: Budget) -> None:
        """Enter a training pass into the accounts: what exact attention would have taken, and what the heads ``used`` saved."""
        self.place, self.lengths = given.place, given.lengths
        budget.ran(self.place, self.lengths, len(used))
        cost = budget.model(self.place)
        for head, (reason, saves) in enumerate(zip(reasons, used, strict=True)):
            tried = saves or (reason == "denominator" and self.fits[head].approximation is not None)
            if tried and cost is not None:
                turn = self.turns[head]
                saved = sum(saves * cost.exact(n) - turn.rate * n for n in self.lengths)
                turn.saved += saved
                budget.saved += saved

    @torch.no_grad()
    def measure(
        self,
        given: Tensors,
        grad: Tensor | None,
        *,
        budget: Budget,
        calibrate: Callable[[Tensors], CostModel],
        step: int,
        refresh: int,
        eps: float,
        hysteresis: float,
        seed: int,
    ) -> None:
        """Fit the wanted heads to one training pass, ``grad`` (B, L, H, d_v) being the gradient of the layer's output."""
        if self.measured or not (grad is None or (bool(grad.isfinite().all()) and bool(grad.any()))):
            return  # a gradient that overflowed or vanished says nothing: the next step is asked
        self.measured = True
        first = not self.turns
        if first:
            self.turns = {head: Turn(due=step) for head in range(given.key.shape[1])}
        with torch.autocast(given.query.device.type, enabled=False):
            for head in self.turns if first else self.wanted:
                turn = self.turns[head]
                # A generator of its own, as layers come in no particular order.
                generator = torch.Generator().manual_seed(hash((seed, step, self.index, head)))
                if first:
                    q, k, _ = given.sequence(head, 0)
                    turn.promised = promise(q.flatten(0, 1), k, given.scale, eps, generator)
                cost = budget.admit(
                    given.place,
                    given.lengths,
                    budget.balance if first else self.wanted[head],
                    lambda: calibrate(given),
                    steps=step,
                    features=turn.promised if first else 0,
                )
                if isinstance(cost, str):
                    turn.waits = cost
                    continue
                samples = []
                for row, ends in enumerate(given.plain.ranges):
                    g = None if grad is None else wide(grad[row, slice(*ends), given.queries(head)].transpose(0, 1))
                    samples.append(Sample(*given.sequence(head, row), g))
                found = self.found[head] = fit(
                    samples,
                    scale=given.scale,
                    causal=given.plain.causal,
                    eps=eps,
                    cost=cost,
                    before=self.fits.get(head),
                    hysteresis=hysteresis,
                    generator=generator,
                )
                budget.spent += found.spent
                budget.trusted &= not turn.promised or found.approximation is not None
                turn.measured(found, step=step, refresh=refresh, eps=eps, length=max(given.lengths))

    def require_finite(self, given: Tensors) -> None:
        """Raises :class:`AttentionError` for NaN or infinity outside padding."""
        for row, ends in enumerate(given.plain.ranges):
            if not all(bool(t[row, :, slice(*ends)].isfinite().all()) for t in (given.query, given.key, given.value)):
                raise AttentionError(
                    f"queries, keys or values of {self.name} hold NaN or infinity: lower the learning rate, or check the "
                    "model's weights and inputs"
                )

    def report(self, step: int) -> list[dict[str, Any]]:
        """Of every head its fit, and when it will be measured or why it is not."""
        rows = []
        for head, turn in sorted(self.turns.items()):
            chosen = self.fits.get(head) or Fit(self.waiting(head))
            backs_off = "back-off" if turn.failures and turn.due > step else ""
            row = {"layer": self.name, "head": head, "choice": chosen.reason, "error": chosen.error}
            row |= {"accelerated": chosen.approximation is not None, "measurements": turn.measurements}
            rows.append(row | {"due": turn.due, "put_off": turn.waits or backs_off})
        return rows

    def state(self) -> dict[str, Any]:
        """Everything that decides, as tensors and plain values."""
        fits, found = ({head: chosen.state() for head, chosen in table.items()} for table in (self.fits, self.found))
        turns = {head: asdict(turn) for head, turn in self.turns.items()}
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {**plain, "turns": turns, "fits": fits, "found": found}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from :meth:`state`."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.turns = {head: Turn(**turn) for head, turn in state["turns"].items()}
        for table, stored in ((self.fits, state["fits"]), (self.found, state["found"])):
            table.clear()
            table.update({head: Fit.restore(each, device) for head, each in stored.items()})


def _shift_invariant(k: Tensor) -> Tensor:
    """``k``, its gradient projected to mean zero.

    Softmax does not see a vector added to all keys, so the exact gradient sums to zero over the keys and a projection can
    only bring the approximate one nearer; where a layer's inputs have a large common part, or the keys a bias, much nearer.
    """
    if not k.requires_grad:
        return k
    k = k.view_as(k)
    k.register_hook(lambda grad: grad - grad.mean(0))
    return k
