"""A preconditioner before (or after) any torch optimizer: the gradients of every (A, B) pair are transformed together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankloom.adapters import Trainable
from rankloom.errors import RecipeError
from rankloom.optim.base import OptimizerPart
from rankloom.optim.groups import parameter_groups
from rankloom.optim.pairs import Pair, PairStack, find_pairs, stacked

__all__ = ["ActsOn", "Gradients", "Order", "Preconditioned", "PreconditionedOptimizer", "by_parameter"]

Transform = Callable[[PairStack], tuple[Tensor, Tensor]]
ActsOn = Literal["gradient", "direction"]
Order = Literal["jacobi", "gauss-seidel"]
Gradients = dict[Tensor, Tensor | None]


class PreconditionedOptimizer(Optimizer):
    """An inner ``torch.optim`` optimizer whose pair gradients (or pair directions) go through ``transform`` first.

    Parameters, groups and state are the inner optimizer's own, so schedulers, checkpoints and moments are torch's. Tensors
    that are in no pair follow the inner optimizer unchanged. A step leaves every ``.grad`` as it found it.

    ``acts_on``: ``"gradient"``: the inner optimizer is fed with ``transform(gradient)``, so its moments are of that.
    ``"direction"``: it is fed with the gradient, and what it would add to a pair goes through ``transform`` (weight decay is
    then decoupled, whatever the inner one's is). ``order``: ``"jacobi"`` transforms both gradients at the old factors,
    ``"gauss-seidel"`` that of ``B`` at the ``A`` already moved.

    Clipping by a global norm before the step multiplies all gradients by one number, which linear transforms pass on.
    """

    def __init__(
        self,
        inner: Optimizer,
        pairs: list[Pair],
        transform: Transform,
        *,
        acts_on: ActsOn = "gradient",
        order: Order = "jacobi",
    ) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.pairs, self.transform, self.acts_on, self.order = inner, pairs, transform, acts_on, order
        self.state, self.param_groups = inner.state, inner.param_groups

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict()``, bit for bit."""
        super().load_state_dict(state_dict)
        self.inner.__setstate__({"state": self.state, "param_groups": self.param_groups})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        raw: Gradients = {p: p.grad for group in self.param_groups for p in group["params"]}
        try:
            self._step(raw)
        finally:
            for parameter, gradient in raw.items():
                parameter.grad = gradient
        return loss

    def _step(self, raw: Gradients) -> None:
        if self.acts_on == "direction":
            self._write(self._transformed(self._directions()))
        elif self.order == "gauss-seidel":
            later = {pair.b for pair in self.pairs}
            self._feed({p: g for p, g in {**raw, **self._transformed(raw)}.items() if p not in later})
            self._feed({p: g for p, g in {**raw, **self._transformed(raw)}.items() if p in later})
        else:
            self._feed({**raw, **self._transformed(raw)})

    def _feed(self, gradients: Gradients) -> None:
        """The inner optimizer's step on these gradients; a parameter without one stays."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = gradients.get(parameter)
        self.inner.step()

    def _transformed(self, gradients: Gradients) -> Gradients:
        new: Gradients = {}
        for members, stack in stacked(self.pairs, gradients):
            new.update(by_parameter(members, *self.transform(stack)))
        return new

    def _directions(self) -> Gradients:
        """What the inner optimizer would add to each factor: it steps on zeros in the factors' place."""
        held = {p: p.data for pair in self.pairs for p in pair.factors if p.grad is not None}
        moved: Gradients = {p: None for pair in self.pairs for p in pair.factors}
        try:
            for parameter in held:
                parameter.data = torch.zeros_like(parameter)
            self.inner.step()
            moved.update({p: p.data for p in held})
        finally:
            for parameter, data in held.items():
                parameter.data = data
        return moved

    def _write(self, moves: Gradients) -> None:
        """``p <- (1 - lr wd) p + move``."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if (move := moves.get(parameter)) is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(move)


def by_parameter(pairs: list[Pair], grad_a: Tensor, grad_b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Stacked results, (n, r, in) and (n, out, r), by the parameters they belong to, in their dtype."""
    for pair, a, b in zip(pairs, grad_a.to(pairs[0].a.dtype), grad_b.to(pairs[0].b.dtype), strict=True):
        yield pair.a, a
        yield pair.b, b


@dataclass(frozen=True)
class Preconditioned(OptimizerPart):
    """Settings that all preconditioners share: the inner optimizer, and LoRA+'s ratio of B's learning rate to A's.

    ``momentum`` is of ``inner="sgd"``, ``betas`` and ``eps`` are of ``inner="adamw"``. ``weight_decay`` acts on matrices only
    and is not preconditioned.
    """

    inner: Literal["adamw", "sgd"] = "adamw"
    lr_ratio: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"trained pairs"})

    def check(self) -> None:
        if self.lr_ratio <= 0:
            raise RecipeError(f"optimizer.lr_ratio must be above 0, got {self.lr_ratio}")

    def precondition(self, pairs: PairStack) -> tuple[Tensor, Tensor]:
        """The transformed gradients of ``A`` (n, r, in) and ``B`` (n, out, r)."""
        raise NotImplementedError

    def build(self, trainables: list[Trainable], lr: float, weight_decay: float | None = None) -> Optimizer:
        inner, pairs = self.build_inner(trainables, lr, weight_decay), find_pairs(trainables)
        return PreconditionedOptimizer(inner, pairs, self.precondition, **self.options())

    def options(self) -> dict[str, Any]:
        """What else the optimizer is told: ``acts_on``, ``order``."""
        return {}

    def build_inner(self, trainables: list[Trainable], lr: float, weight_decay: float | None) -> Optimizer:
        """The optimizer that moves the parameters."""
        decay = self.weight_decay if weight_decay is None else weight_decay
        groups = parameter_groups(trainables, lr, decay, lr_ratio=self.lr_ratio)
        if self.inner == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=self.momentum)
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps, fused=True)
