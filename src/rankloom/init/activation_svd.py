"""EVA (2410.07170): start on the directions in which the inputs vary most, and give rank where they vary most."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from rankloom.adapters import Binding, LowRankAdapter
from rankloom.calibration import ActivationComponents, Calibration, activation_components
from rankloom.errors import RecipeError
from rankloom.init.base import InitContext, InitPart
from rankloom.init.random import kaiming_rows, start_at_zero
from rankloom.parts import part

__all__ = ["ActivationSVD", "redistribute"]


def redistribute(ratios: dict[str, list[float]], budget: int) -> dict[str, int]:
    """Ranks by target: the ``budget`` largest of all explained-variance ratios, each counted where it belongs.

    Ties fall to the earlier target. Fewer ratios than the budget all win.
    """
    pool = sorted(((ratio, name) for name, own in ratios.items() for ratio in own), key=lambda pair: -pair[0])
    ranks = dict.fromkeys(ratios, 0)
    for _, name in pool[:budget]:
        ranks[name] += 1
    return ranks


@part("init", "activation-svd")
@dataclass(frozen=True)
class ActivationSVD(InitPart):
    """EVA's start: ``A = V_r^T`` (orthonormal rows), the leading right singular vectors of the target's inputs ``X``
    (tokens, in) on the calibration data, and ``B = 0``. Forward passes only.

    ``rho > 1`` redistributes ranks: each target enters ``rho r`` components, the recipe's total budget goes to those with
    the largest explained-variance ratio, alpha follows in proportion (``alpha / r`` stays), and targets that win none are
    left out. ``center=True`` subtracts the mean, as released; ``whiten`` divides each row by ``sqrt(S_i)``. Components that
    the data does not have start as LoRA's rows. Where ``B`` is frozen it is random, and the core starts at zero.
    """

    rho: float = 2.0
    center: bool = True
    whiten: bool = False

    evidence: ClassVar[Literal["none", "weight", "gradient", "activations"]] = "activations"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"factors"})

    def check(self) -> None:
        if self.rho < 1:
            raise RecipeError(f"init rho must be at least 1 (1 keeps every rank as it is), got {self.rho}")

    def gather(
        self, model: nn.Module, bindings: list[Binding], calibration: Calibration, seed: int
    ) -> tuple[dict[str, ActivationComponents], float]:
        begin = time.perf_counter()
        components = max(round(self.rho * binding.adapter.rank) for binding in bindings)
        targets = [binding.target for binding in bindings]
        found = activation_components(model, targets, calibration, components=components, center=self.center, seed=seed)
        return found, time.perf_counter() - begin

    def ranks(self, bindings: list[Binding], evidence: Any) -> dict[str, int] | None:
        if self.rho == 1:
            return None
        ratios = {}
        for b in bindings:
            most = min(round(self.rho * b.adapter.rank), *b.target.shape)
            ratios[b.name] = evidence[0][b.name].ratio[:most].tolist()
        return redistribute(ratios, sum(b.adapter.rank for b in bindings))

    def apply(self, context: InitContext) -> None:
        found: dict[str, ActivationComponents]
        found, seconds = context.evidence
        for binding in context.bindings:
            adapter: LowRankAdapter = binding.adapter
            generator = context.generator(binding)
            rows = kaiming_rows(adapter.A, binding.layer, generator)
            own = found[binding.name]
            live = int((own.S[: adapter.rank] > torch.finfo(own.S.dtype).eps * own.S[0]).sum())
            directions = own.V[:, :live].mT
            rows[:live] = directions / own.S[:live, None].sqrt() if self.whiten else directions
            start_at_zero(adapter, rows, generator)
        context.report.update(seconds=seconds, ranks={b.name: b.adapter.rank for b in context.bindings})
