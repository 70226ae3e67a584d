"""What allocators over time share: a smoothed sensitivity score and a budget that falls to its target (AdaLoRA, 2303.10512)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankloom.adapters import Binding
from rankloom.errors import RecipeError
from rankloom.events import Schedule

__all__ = ["BudgetSchedule", "Sensitivity", "budget_at", "steps_of"]


def budget_at(step: int, *, first: int, last: int, warmup: int, final: int, total: int) -> int:
    """The size of a budget after ``step`` steps: ``first``, then a cubic descent to ``last`` at ``total - final``."""
    if step <= warmup:
        return first
    if step > total - final:
        return last
    left = 1 - (step - warmup) / (total - final - warmup)
    return int(last + (first - last) * left**3)


class Sensitivity:
    """``I``, ``U``: running sensitivity ``|p * grad|`` and its uncertainty, elementwise over one tensor."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.mean, self.spread = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def update(self, beta1: float, beta2: float) -> None:
        """Take in the gradients of one step."""
        grad = self.parameter.grad
        score = (self.parameter * grad).abs() if grad is not None else torch.zeros_like(self.parameter)
        self.mean.mul_(beta1).add_(score, alpha=1 - beta1)
        self.spread.mul_(beta2).add_((score - self.mean).abs(), alpha=1 - beta2)

    def score(self) -> Tensor:
        """``I U``, elementwise."""
        return self.mean * self.spread


def steps_of(setting: float, total: int) -> int:
    """A setting in optimizer steps: given so, or, below 1, as a fraction of the run."""
    return round(setting * total) if isinstance(setting, float) and setting < 1 else int(setting)


class BudgetSchedule(Schedule):
    """A budget over all targets that falls from ``first`` to ``last``, shared out every ``interval`` steps by importance.

    ``settings`` has ``warmup``, ``final``, ``interval``, ``beta1`` and ``beta2``; ``scores``: sensitivities by target and tensor.
    """

    def __init__(
        self,
        settings: Any,
        bindings: list[Binding],
        total_steps: int,
        budget: tuple[int, int],
        scores: dict[str, dict[str, Sensitivity]],
    ) -> None:
        self.settings, self.bindings, self.total = settings, bindings, total_steps
        self.warmup, self.final = (steps_of(s, total_steps) for s in (settings.warmup, settings.final))
        if self.warmup >= total_steps - self.final:
            raise RecipeError(
                f"{settings.kind} has no steps left to act in: warmup {self.warmup} + final {self.final} of {total_steps} "
                f"steps; train longer or lower rank.warmup and rank.final"
            )
        self.interval = settings.interval
        self.first, self.last = budget
        self.scores = scores

    def budget(self, step: int) -> int:
        """What is wanted over all targets after ``step`` steps."""
        return budget_at(step, first=self.first, last=self.last, warmup=self.warmup, final=self.final, total=self.total)

    def update_scores(self) -> None:
        """Take in the gradients of one step."""
        for tensors in self.scores.values():
            for sensitivity in tensors.values():
                sensitivity.update(self.settings.beta1, self.settings.beta2)

    @torch.no_grad()
    def on_interval(self, step: int) -> None:
        if self.warmup < step < self.total - self.final:
            self.apply(self.plan(step))

    def plan(self, step: int) -> Tensor:
        """The shares of all targets, the same on every rank."""
        raise NotImplementedError

    def apply(self, plan: Tensor) -> None:
        """Put a plan into effect."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {
            f"{target}.{name}.{key}": getattr(sensitivity, key)
            for target, tensors in self.scores.items()
            for name, sensitivity in tensors.items()
            for key in ("mean", "spread")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, tensor in self.state_dict().items():
            tensor.copy_(state[key])
