"""AdaLoRA (2303.10512): a global rank budget, pruned to its target by a smoothed sensitivity score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankloom.adapters import Binding
from rankloom.errors import RecipeError
from rankloom.events import broadcast
from rankloom.parts import part
from rankloom.rank.base import RankPart
from rankloom.rank.importance import BudgetSchedule, Sensitivity

__all__ = ["AdaLoRA", "AdaLoRASchedule"]


def decide(scores: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` highest scores; ties fall to the earlier component, so exactly ``keep`` survive."""
    order = torch.argsort(scores, descending=True, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[:keep]] = True
    return mask


class AdaLoRASchedule(BudgetSchedule):
    """The allocator of one run. A component is pruned by zeroing its core entry; until the final phase it may revive."""

    def __init__(self, settings: AdaLoRA, bindings: list[Binding], total_steps: int) -> None:
        budget = sum(b.adapter.rank for b in bindings), settings.target_rank * len(bindings)
        scores = {b.name: {n: Sensitivity(p) for n, p in b.adapter.named_parameters() if n in "ABE"} for b in bindings}
        super().__init__(settings, bindings, total_steps, budget, scores)

    def extra_loss(self, step: int) -> Tensor | None:
        """``weight / N * sum ||A A^T - I||_F + ||B^T B - I||_F`` over the N factor tensors (norms, not squared)."""
        if not self.settings.orthogonality:
            return None
        grams = [gram for b in self.bindings for gram in (b.adapter.A @ b.adapter.A.mT, b.adapter.B.mT @ b.adapter.B)]
        norms = [(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).norm() for gram in grams]
        return self.settings.orthogonality * torch.stack(norms).mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Scores move while the budget does; the pattern, once final, is enforced after every step."""
        if step < self.total - self.final:
            self.update_scores()
        if step == self.total - self.final:
            self.apply(self.plan(step), final=True)
        for b in self.bindings:
            b.adapter.E.mul_(b.adapter.mask)

    def component_scores(self) -> Tensor:
        """``q(E_i) + mean_j q(A_ij) + mean_j q(B_ji)`` of every component, targets in order."""
        return torch.cat(
            [s["E"].score() + s["A"].score().mean(1) + s["B"].score().mean(0) for s in self.scores.values()]
        )

    def plan(self, step: int) -> Tensor:
        """Which components stay (one mask over all targets)."""
        return broadcast(decide(self.component_scores(), self.budget(step)))

    def apply(self, plan: Tensor, *, final: bool = False) -> None:
        """Zero the core of pruned components; factors and optimizer moments stay, so a component can come back.

        ``final`` fixes the pattern in the adapters' masks: from then on nothing comes back.
        """
        for b, live in zip(self.bindings, plan.split([b.adapter.rank for b in self.bindings]), strict=True):
            b.adapter.E.mul_(live)
            if final:
                b.adapter.mask.copy_(live)  # the plan, not E != 0: a kept component may be at zero


@part("rank", "adalora")
@dataclass(frozen=True)
class AdaLoRA(RankPart):
    """AdaLoRA's budget: start at the adapters' rank, end at ``target_rank`` per target on average.

    ``warmup`` and ``final`` are optimizer steps, or fractions of the run below 1; between them the budget falls cubically
    and is allocated every ``interval`` steps. ``beta1``, ``beta2`` smooth sensitivity and uncertainty; ``orthogonality``
    weighs the regulariser. Needs a diagonal core; the run's length has to be known.
    """

    target_rank: int = 8
    warmup: int | float = 0.1
    final: int | float = 0.3
    interval: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ranked components", "a start without offset"})

    def check(self) -> None:
        if self.target_rank < 0 or self.interval < 1:
            raise RecipeError("AdaLoRA needs rank.target_rank >= 0 and rank.interval >= 1")

    def build(self, bindings: list[Binding], total_steps: int | None) -> AdaLoRASchedule:
        if total_steps is None:
            raise RecipeError("AdaLoRA prunes over the whole run: pass its length, optimizer(lr, total_steps=...)")
        return AdaLoRASchedule(self, bindings, total_steps)
