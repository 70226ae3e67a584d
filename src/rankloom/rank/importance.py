"""What allocators over time share: a smoothed sensitivity score and a budget that falls to its target (AdaLoRA, 2303.10512)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Sensitivity", "budget_at", "steps_of"]


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
