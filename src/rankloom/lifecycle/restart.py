"""Chains of links: ReLoRA (2307.05695), COLA (2401.04151), RAC-LoRA (2410.08305)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankloom.adapters import Binding, FactoredAdapter
from rankloom.adapters.chain import chained
from rankloom.calibration.sketch import target_generator
from rankloom.errors import RecipeError
from rankloom.events import Schedule
from rankloom.init import InitContext, InitPart
from rankloom.lifecycle.base import LifecyclePart
from rankloom.parts import part

__all__ = ["MergeAndRestart", "RestartSchedule"]


class RestartSchedule(Schedule):
    """One run of a chain. Everything that decides is in the step count and in the adapters' ``chain``."""

    def __init__(self, settings: MergeAndRestart, bindings: list[Binding], init: InitPart) -> None:
        self.settings, self.bindings, self.init = settings, bindings, init
        self.interval, self.warmup = settings.every, settings.warmup_steps
        self._optimizer: Optimizer | None = None
        self._rates: list[Any] = []
        self._choose_side()

    def attached(self, optimizer: Optimizer) -> None:
        """Rates and moments are this optimizer's."""
        self._optimizer = optimizer

    def factor(self, step: int) -> float:
        """What multiplies the learning rate of the step after ``step`` finished ones: 0 right after a restart, then linearly
        up to 1. The first link follows the run's own warm-up."""
        since = step % self.interval
        return since / self.warmup if step >= self.interval and since < self.warmup else 1.0

    def after_backward(self, step: int) -> None:
        """Lower the learning rate for this very step, whatever schedule has set it and will read it."""
        assert self._optimizer is not None
        self._restore_rates()
        if (factor := self.factor(step)) < 1:
            self._rates = [group["lr"] for group in self._optimizer.param_groups]
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def after_step(self, step: int) -> None:
        """The rates are again what the run's own schedule made them."""
        self._restore_rates()

    def _restore_rates(self) -> None:
        assert self._optimizer is not None
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False):  # none, or all of them
            group["lr"] = rate
        self._rates = []

    @torch.no_grad()
    def on_interval(self, step: int) -> None:
        """Merge every link, draw new factors, and forget the moments of the old ones."""
        for binding in self.bindings:
            binding.adapter.merge_link(binding.layer)
        self._choose_side()
        self.init.apply(InitContext(self.bindings, None, self._draw("start").initial_seed()))
        for binding in self.bindings:
            binding.adapter.initialized(binding.layer)
        self._forget()

    def _draw(self, what: str) -> torch.Generator:
        """This link's generator for one purpose."""
        adapter = self.bindings[0].adapter
        return target_generator(adapter.seed, f"link {adapter.links}: {what}")

    def _choose_side(self) -> None:
        """Which factor is frozen in this link, where that is drawn; the first link starts as the recipe's init has it."""
        if self.settings.sketch == "recipe" or not self.bindings:
            return
        links = self.bindings[0].adapter.links
        left = links > 0 and float(torch.rand((), generator=self._draw("side"))) < 0.5
        for binding in self.bindings:
            for name, trained in (("A", left), ("B", not left)):
                factor = binding.adapter.get_parameter(name).requires_grad_(trained)
                factor.grad = factor.grad if trained else None

    def _forget(self) -> None:
        """The optimizer's moments of the adapters' tensors: dropped, or pruned as ReLoRA's code does."""
        assert self._optimizer is not None
        generator = self._draw("moments") if self.bindings else None
        for binding in self.bindings:
            for parameter in binding.adapter.parameters():
                if self.settings.moments == "reset" or not parameter.requires_grad:
                    self._optimizer.state.pop(parameter, None)
                if moments := _moments(self._optimizer, parameter):
                    # One mask for all: a first moment without its second one would be a step many times the learning rate.
                    kept = self._kept(moments[0], generator)
                    for moment in moments:
                        moment.mul_(kept)

    def _kept(self, moment: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.settings.moments == "random":
            return (torch.rand(moment.shape, generator=generator) >= self.settings.prune).to(moment.device)
        size = moment.abs().flatten()
        kept = torch.zeros_like(size, dtype=torch.bool)
        kept[size.topk(round((1 - self.settings.prune) * len(size))).indices] = True
        return kept.view_as(moment)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The adapters have been loaded: which side is frozen is theirs."""
        self._choose_side()


def _moments(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """What an optimizer has accumulated elementwise, the first moment first (not its step count)."""
    state = optimizer.state.get(parameter, {})  # asking by index would make an entry
    return [t for t in state.values() if isinstance(t, Tensor) and t.ndim]


@part("lifecycle", "merge-and-restart")
@dataclass(frozen=True)
class MergeAndRestart(LifecyclePart):
    """``W^{t+1} = W^t + s B^t A^t``: every ``every`` optimizer steps the link is merged and a new one starts at zero.

    The sum of T links has rank up to ``T r``, at the memory of one link's gradients and moments. The stored weight is never
    edited: the sum is part of the adapter (:class:`~rankloom.adapters.ChainAdapter`, which says what it takes), is saved with
    it, and merging leaves the function as it is (to the rounding of a half-precision weight).

    A new link starts as the recipe's init has it, from a generator of its own: an init that needs no data and subtracts
    nothing (Kaiming, Gaussian); others are refused. Optimizer moments of the factors are dropped (``moments="reset"``), or,
    as ReLoRA does, a share ``prune`` of them is zeroed, ``"random"`` or the smallest (``"magnitude"``), the step count kept;
    both of Adam's moments under one mask, where the released code draws two. The learning rate of all tensors starts again
    at zero and rises linearly to what the run's schedule asks for, over ``warmup`` steps (below 1: that fraction of a link, a
    step at least where links are longer than one).

    ``sketch="random"``: each link freezes one factor, drawn by a fair coin for the whole model, and trains the other
    (the first link trains ``B``); ``"recipe"``: what the adapter's ``train`` says.
    """

    every: int = 1000
    warmup: int | float = 0.1
    moments: Literal["reset", "random", "magnitude"] = "reset"
    prune: float = 0.9
    sketch: Literal["recipe", "random"] = "recipe"

    @property
    def needs(self) -> frozenset[str]:
        pairs = {"trained pairs"} if self.sketch == "random" else set[str]()
        return frozenset({"links", "a repeatable start", "fixed ranks", *pairs})

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up after each restart."""
        if not 0 < self.warmup < 1:
            return int(self.warmup)
        return min(max(round(self.warmup * self.every), 1), self.every - 1)

    def check(self) -> None:
        if self.every < 1:
            raise RecipeError(f"lifecycle.every must be at least 1, got {self.every}")
        if not 0 <= self.warmup_steps < self.every:
            raise RecipeError(f"lifecycle.warmup takes {self.warmup_steps} of a link's {self.every} steps: lower it")
        if not 0 <= self.prune <= 1:
            raise RecipeError(f"lifecycle.prune is a share of the moments, in [0, 1], got {self.prune}")

    def prepare(self, bindings: list[Binding], seed: int) -> None:
        for binding in bindings:
            form: type[FactoredAdapter] = type(binding.adapter)
            binding.adapter.__class__ = chained(form)
            binding.adapter.begin(binding.layer, seed)

    def build(self, bindings: list[Binding], total_steps: int | None, init: InitPart) -> RestartSchedule:
        return RestartSchedule(self, bindings, init)
