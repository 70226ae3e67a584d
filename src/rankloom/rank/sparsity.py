"""SNELLA's allocator (2510.24037): layers compete for a global number of nonzero entries, by AdaLoRA's importance."""

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

__all__ = ["SparsityBudget", "SparsitySchedule", "allocate"]


def allocate(scores: Tensor, budget: int, caps: Tensor) -> Tensor:
    """Shares (n,) of ``budget`` in proportion to ``scores``, whole numbers of at most ``caps`` that add up to it exactly.

    What a full share leaves over goes to the others, in proportion again; what rounding leaves, to the highest scores.
    """
    weights = scores.double() if bool(scores.sum() > 0) else torch.ones(len(scores), dtype=torch.float64)
    shares = torch.zeros_like(caps)
    rest = min(budget, int(caps.sum()))
    while rest > 0:
        room = caps - shares
        open_ = weights * (room > 0)
        if not open_.sum() > 0:  # only layers without any importance have room
            weights = torch.ones_like(weights)
            continue
        more = torch.minimum((rest * (open_ / open_.sum())).long(), room)
        if not more.any():
            order = torch.argsort(open_, descending=True, stable=True)
            more[order[room[order] > 0][:rest]] = 1
        shares += more
        rest -= int(more.sum())
    return shares


class SparsitySchedule(BudgetSchedule):
    """The allocator of one run: sets every adapter's ``kept``."""

    def __init__(self, settings: SparsityBudget, bindings: list[Binding], total_steps: int) -> None:
        self.caps = torch.tensor([b.target.shape[0] * b.target.shape[1] for b in bindings])
        caps = self.caps.tolist()
        first = sum(cap - int(b.adapter.sparsity * cap) for b, cap in zip(bindings, caps, strict=True))
        last = sum(cap - int(settings.target_sparsity * cap) for cap in caps)
        scores = {b.name: {n: Sensitivity(getattr(b.adapter, n)) for n in "QP"} for b in bindings}
        super().__init__(settings, bindings, total_steps, (first, last), scores)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if step <= self.total - self.final:
            self.update_scores()
        if step == self.total - self.final:
            self.apply(self.plan(step))

    def layer_scores(self) -> Tensor:
        """``mean(I U)`` over ``Q`` plus that over ``P``, of every target."""
        means = [[tensors[n].score().mean() for n in "QP"] for tensors in self.scores.values()]
        return torch.tensor([float(q) + float(p) for q, p in means], dtype=torch.float64)

    def plan(self, step: int) -> Tensor:
        """Nonzero entries of every target."""
        return broadcast(allocate(self.layer_scores(), self.budget(step), self.caps))

    def apply(self, plan: Tensor) -> None:
        """Set them."""
        for b, kept in zip(self.bindings, plan, strict=True):
            b.adapter.kept.copy_(kept)


@part("rank", "sparsity-budget")
@dataclass(frozen=True)
class SparsityBudget(RankPart):
    """SNELLA's budget: from the adapters' sparsity to ``target_sparsity`` on average, along a cubic, shared out by importance.

    ``warmup`` and ``final`` are optimizer steps, or fractions of the run below 1; between them the entries are allocated anew
    every ``interval`` steps. ``beta1``, ``beta2`` smooth sensitivity and uncertainty, as in AdaLoRA. Needs a form with a sparsity
    of its own in every target; the run's length has to be known.
    """

    target_sparsity: float = 0.3
    warmup: int | float = 0
    final: int | float = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"sparsity"})

    def check(self) -> None:
        if not 0 <= self.target_sparsity < 1 or self.interval < 1:
            raise RecipeError("a sparsity budget needs rank.target_sparsity in [0, 1) and rank.interval >= 1")

    def build(self, bindings: list[Binding], total_steps: int | None) -> SparsitySchedule:
        if total_steps is None:
            raise RecipeError(
                "the entries are shared out over the whole run: pass its length, optimizer(lr, total_steps=...)"
            )
        return SparsitySchedule(self, bindings, total_steps)
