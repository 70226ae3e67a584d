"""The one event protocol: whatever decides something during training is a schedule.

Events are counted in optimizer steps and raised by the library from inside the optimizer's step, so a plain loop, a
trainer and gradient accumulation all drive them alike, and a skipped step skips them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Schedule", "broadcast"]


class Schedule:
    """Hooks of a part that acts over time; every one is optional. ``step`` counts finished optimizer steps, from 0.

    A decision has three parts: a local accumulator, a pure ``decide(scores, step, rng) -> plan``, and ``apply(plan)``; pass
    plans through :func:`broadcast`, so that data-parallel ranks cannot disagree.
    """

    interval: int = 0
    """``on_interval`` comes after every ``interval``-th step; 0 for never."""

    def attached(self, optimizer: Optimizer) -> None:
        """The run's optimizer exists; for schedules that keep, zero or permute its state."""

    def before_forward(self, step: int) -> None:
        """Before each forward pass in training mode."""

    def extra_loss(self, step: int) -> Tensor | None:
        """A scalar added to the task's loss once per optimizer step."""
        return None

    def before_clip(self, step: int) -> None:
        """Gradients are complete, neither checked nor clipped yet: what must not count in their norm is zeroed here."""

    def after_backward(self, step: int) -> None:
        """Gradients are complete and clipped; the optimizer has not moved yet."""

    def after_step(self, step: int) -> None:
        """The optimizer has moved; gradients are still those it moved on."""

    def on_interval(self, step: int) -> None:
        """After ``after_step`` of every ``interval``-th step."""

    def on_task_end(self) -> None:
        """The current task of a sequence is over."""

    def on_export(self) -> None:
        """The adapter is about to be saved, merged or exported."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides: plain scalars and tensors, by name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit."""


def broadcast(plan: Tensor) -> Tensor:
    """Rank 0's plan on every rank; the plan itself in a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(plan, src=0)
    return plan
