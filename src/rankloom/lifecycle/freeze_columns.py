"""LaMDA's gradual freezing (2406.12832): the columns of ``B`` stop learning one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankloom.adapters import Binding
from rankloom.errors import RecipeError
from rankloom.events import Schedule
from rankloom.init import InitPart
from rankloom.lifecycle.base import LifecyclePart
from rankloom.parts import part

__all__ = ["FreezeColumns", "FreezeColumnsSchedule", "frozen_columns"]


def frozen_columns(step: int, rank: int, last: float) -> int:
    """``f(t) = min(r, floor(r t / last))``: how many columns are frozen after ``step`` steps, all of them from ``last`` on."""
    return min(rank, int(rank * step / last + 1e-9))


class FreezeColumnsSchedule(Schedule):
    """Holds the first ``f(t)`` columns of every ``B`` where they were when they froze.

    Their gradients are zeroed before clipping, and what momentum or weight decay still do to them is put back, to the bit.
    Once all columns of a ``B`` are frozen it takes no gradient any more and the optimizer forgets its state; until then that
    keeps its full size.
    """

    def __init__(self, bindings: list[Binding], last: float) -> None:
        self.factors: list[nn.Parameter] = [binding.adapter.B for binding in bindings]
        self.last, self.frozen = last, 0
        self.optimizer: Optimizer | None = None
        self.held: list[Tensor] = []

    def attached(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        for b in self.factors:
            b.requires_grad_(True)  # an earlier run may have frozen it

    def columns(self, b: Tensor) -> Tensor:
        """The frozen columns of a factor (a view)."""
        return b[:, : frozen_columns(self.frozen, b.shape[1], self.last)]

    @torch.no_grad()
    def before_clip(self, step: int) -> None:
        for b in self.factors:
            if b.grad is not None:
                self.columns(b.grad).zero_()
        self.held = [self.columns(b).clone() for b in self.factors]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for b, held in zip(self.factors, self.held, strict=True):
            self.columns(b).copy_(held)
        self.held = []
        self._freeze(step)

    def _freeze(self, step: int) -> None:
        self.frozen = step
        for b in self.factors:
            if b.requires_grad and self.columns(b).shape == b.shape:
                b.requires_grad_(False)
                b.grad = None
                if self.optimizer is not None:
                    self.optimizer.state.pop(b, None)

    def state_dict(self) -> dict[str, Any]:
        return {"frozen": self.frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._freeze(int(state["frozen"]))


@part("lifecycle", "freeze-columns")
@dataclass(frozen=True)
class FreezeColumns(LifecyclePart):
    """``B`` learns in full at first, then loses its columns one by one: after t of T steps ``min(r, floor(r t / (eta T)))`` of
    them are frozen, all of them from ``eta T`` on. The run's length has to be known."""

    eta: float = 0.3

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"trained B"})

    def check(self) -> None:
        if not 0 < self.eta <= 1:
            raise RecipeError(f"lifecycle eta is a share of the run in (0, 1], got {self.eta}")

    def build(self, bindings: list[Binding], total_steps: int | None, init: InitPart) -> FreezeColumnsSchedule:
        if total_steps is None:
            raise RecipeError("columns are frozen over the whole run: pass its length, optimizer(lr, total_steps=...)")
        return FreezeColumnsSchedule(bindings, self.eta * total_steps)
