"""The heads of one attention layer: the fits in force, the fits found for later, and how both come about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.attention.cost import CostModel
from rankloom.attention.fitting import Fit, Sample, fit
from rankloom.attention.masks import Plain
from rankloom.errors import AttentionError

__all__ = ["Layer", "Tensors", "observe"]

_FIRST = Fit("not measured yet")


@dataclass(frozen=True)
class Tensors:
    """One call: ``query`` (B, H, L, d), ``key`` (B, H / g, L, d), ``value`` (B, H / g, L, d_v), what they attend to."""

    query: Tensor
    key: Tensor
    value: Tensor
    plain: Plain
    scale: float

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.query.shape[1] // self.key.shape[1]

    def queries(self, head: int) -> slice:
        """The query heads of a key head."""
        return slice(head * self.group, (head + 1) * self.group)

    def sequence(self, head: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """``q`` (g, n, d), ``k`` (n, d), ``v`` (n, d_v) of a head in a batch row, without padding, in float32 at least."""
        at = slice(*self.plain.ranges[row])
        parts = self.query[row, self.queries(head), at], self.key[row, head, at], self.value[row, head, at]
        q, k, v = (_wide(part) for part in parts)
        return q, k, v


@dataclass
class Layer:
    """``fits`` are in force, by key head; ``found`` come into force with the next optimizer step; ``due`` is the step from which
    on a measurement is wanted, ``measured`` whether this step has made it."""

    name: str
    index: int
    due: int = 0
    measured: bool = False
    fits: dict[int, Fit] = field(default_factory=dict)
    found: dict[int, Fit] = field(default_factory=dict)

    def advance(self, step: int, refresh: int) -> None:
        """``step`` is over."""
        if self.measured:
            self.due, self.measured = step + refresh, False
        self.fits.update(self.found)
        self.found = {}

    def attend(self, head: int, given: Tensors, *, training: bool) -> tuple[Tensor | None, str]:
        """One key head's output (B, L, g, d_v) and by which factor it was made; or no output, and the reason.

        Padded positions get zeros. Raises :class:`AttentionError` where the inputs are NaN or infinite.
        """
        chosen = self.fits.get(head, _FIRST)
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
                        self.found[head] = Fit("denominator")
                    return None, "denominator"
                outs.append(F.pad(out, (0, 0, start, given.key.shape[2] - stop)))
            return torch.stack(outs).transpose(1, 2).to(dtype), chosen.reason

    @torch.no_grad()
    def measure(
        self,
        given: Tensors,
        grad: Tensor | None,
        *,
        cost: Callable[[Tensors], CostModel],
        eps: float,
        hysteresis: float,
        seed: int,
    ) -> None:
        """Fit every head to one training pass, ``grad`` (B, L, H, d_v) being the gradient of the layer's output."""
        if self.measured or not (grad is None or (bool(grad.isfinite().all()) and bool(grad.any()))):
            return  # a gradient that overflowed or vanished says nothing: the next step is asked
        self.measured = True
        with torch.autocast(given.query.device.type, enabled=False):
            for head in range(given.key.shape[1]):
                samples = []
                for row, ends in enumerate(given.plain.ranges):
                    g = None if grad is None else _wide(grad[row, slice(*ends), given.queries(head)].transpose(0, 1))
                    samples.append(Sample(*given.sequence(head, row), g))
                # A generator of its own, as layers come in no particular order.
                generator = torch.Generator().manual_seed(hash((seed, self.due, self.index, head)))
                self.found[head] = fit(
                    samples,
                    scale=given.scale,
                    causal=given.plain.causal,
                    eps=eps,
                    cost=cost(given),
                    before=self.fits.get(head),
                    hysteresis=hysteresis,
                    generator=generator,
                )

    def require_finite(self, given: Tensors) -> None:
        """Raises :class:`AttentionError` for NaN or infinity outside padding."""
        for row, ends in enumerate(given.plain.ranges):
            if not all(bool(t[row, :, slice(*ends)].isfinite().all()) for t in (given.query, given.key, given.value)):
                raise AttentionError(
                    f"queries, keys or values of {self.name} hold NaN or infinity: lower the learning rate, or check the "
                    "model's weights and inputs"
                )

    def state(self) -> dict[str, Any]:
        """Everything that decides, as tensors and plain values."""
        fits, found = ({head: chosen.state() for head, chosen in table.items()} for table in (self.fits, self.found))
        return {"due": self.due, "measured": self.measured, "fits": fits, "found": found}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from :meth:`state`."""
        self.due, self.measured = state["due"], state["measured"]
        for table, stored in ((self.fits, state["fits"]), (self.found, state["found"])):
            table.update({head: Fit.restore(each, device) for head, each in stored.items()})


def observe(out: Tensor, given: Tensors, measure: Callable[[Tensors, Tensor | None], None]) -> Tensor:
    """``out``, with ``measure(given, gradient of out)`` called when that gradient comes; at once where none will come."""
    if not out.requires_grad:
        measure(given, None)
        return out
    watched: Tensor = _Observe.apply(out, given.query, given.key, given.value, given.plain, given.scale, measure)
    return watched


class _Observe(torch.autograd.Function):
    """The identity on ``out``. Its saved tensors are those that attention saves; a checkpoint drops and recomputes both."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, query: Tensor, key: Tensor, value: Tensor, plain: Plain, scale: float, measure: Any
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rest = plain, scale, measure
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (query, key, value), (plain, scale, measure) = ctx.saved_tensors, ctx.rest
        measure(Tensors(query, key, value, plain, scale), grad)
        return grad, None, None, None, None, None, None


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


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
