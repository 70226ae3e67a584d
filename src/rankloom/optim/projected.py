"""The projected step: optimizer state in a low-dimensional subspace of every matrix's gradient (GaLore, 2403.03507)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankloom.adapters import Trainable
from rankloom.errors import CompositionError, RecipeError
from rankloom.optim.base import OptimizerPart
from rankloom.optim.projectors import Projection, SVDProjector
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["Projected", "ProjectedOptimizer"]

Carry = Literal["keep", "reset", "reproject"]
Inner = Callable[[list[nn.Parameter], float], Optimizer]


@dataclass
class _Slot:
    """One projected matrix: its proxy in the subspace, the projection, its own step count, low-rank gradient so far."""

    proxy: nn.Parameter
    projection: Projection | None = None
    step: int = 0
    low: Tensor | None = None


class ProjectedOptimizer(Optimizer):
    """Five slots a step: ``P = refresh(G)``, ``R = P.down(G)``, ``N = inner(R)``, ``U = scale * P.up(N)``, ``W <- W - lr U``.

    The outer optimizer owns the real parameters, learning rates and decay; the inner one, any ``torch.optim`` optimizer
    that does not read parameter values, owns a zero-filled proxy per matrix in the subspace's shape and is stepped once
    for all of them: ``W <- (1 - lr wd) W + scale * up(proxy)``. Parameters that are not projected follow the same kind of
    inner optimizer directly. Moments are kept, reset or re-projected when a basis moves (``carry``).

    ``low_rank_gradients``: between refreshes, gradients go to the subspace as soon as they are complete and the full ones
    are freed, so gradient accumulation takes ``max(m, n) r`` per matrix and the peak is one full gradient. Their norm is
    then not known, so gradients cannot be clipped by it.
    """

    def __init__(
        self,
        projected: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        projector: SVDProjector,
        every: int,
        scale: float,
        carry: Carry,
        inner: Inner,
        low_rank_gradients: bool = False,
    ) -> None:
        groups = [{"params": p, "weight_decay": wd} for p, wd in self._groups(projected, others, weight_decay) if p]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.projector, self.every, self.scale, self.carry = projector, every, scale, carry
        self.slots = {p: _Slot(nn.Parameter(p.new_zeros(projector.shape(p)))) for p in projected}
        self.low_rank_gradients = low_rank_gradients
        self.inner = inner([slot.proxy for slot in self.slots.values()] + others, lr)
        self._split_inner(others)
        hooked = projected if low_rank_gradients else []
        self._hooks = [p.register_post_accumulate_grad_hook(self._compress) for p in hooked]

    def close(self) -> None:
        """Leave the parameters' gradients alone from now on: another optimizer takes over."""
        for hook in self._hooks:
            hook.remove()

    def compressed(self) -> dict[Tensor, Tensor]:
        """Gradients that exist in their subspace only, by parameter."""
        return {p: slot.low for p, slot in self.slots.items() if slot.low is not None}

    @staticmethod
    def _groups(
        projected: list[nn.Parameter], others: list[nn.Parameter], decay: float
    ) -> Iterator[tuple[list[nn.Parameter], float]]:
        yield projected, decay
        yield [p for p in others if p.ndim > 1], decay
        yield [p for p in others if p.ndim <= 1], 0.0

    def _split_inner(self, others: list[nn.Parameter]) -> None:
        """Inner groups mirror the outer ones, so that each follows its own learning rate and decay."""
        template = {k: v for k, v in self.inner.param_groups[0].items() if k != "params"}
        self.inner.param_groups.clear()
        for group in self.param_groups:
            projected = group["params"][0] in self.slots
            params = [self.slots[p].proxy for p in group["params"]] if projected else group["params"]
            decay = 0.0 if projected else group["weight_decay"]
            self.inner.param_groups.append({**template, "params": params, "weight_decay": decay})

    def _compress(self, parameter: Tensor) -> None:
        slot = self.slots[parameter]  # type: ignore[index]
        if slot.projection is None or slot.step % self.every == 0 or parameter.grad is None:
            return  # a refresh is due: it needs the full gradient
        low = slot.projection.down(parameter.grad)
        slot.low = low if slot.low is None else slot.low.add_(low)
        parameter.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for slot in self.slots.values():
            slot.low = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One projected step for every matrix with a gradient, one plain step for the rest."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, slot in self.slots.items():
            slot.proxy.grad = self._low_gradient(parameter, slot)
            slot.proxy.zero_()
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner["lr"] = outer["lr"]
        self.inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.slots and self.slots[parameter].proxy.grad is not None:
                    self._write(parameter, self.slots[parameter], group)
        return loss

    def _low_gradient(self, parameter: nn.Parameter, slot: _Slot) -> Tensor | None:
        if slot.low is not None:
            low, slot.low = slot.low, None  # used up here: loops that clear gradients on the model do not reach it
            return low
        if parameter.grad is None:
            return None
        if slot.projection is None or slot.step % self.every == 0:
            fresh = self.projector.fit(parameter.grad, torch.Generator().manual_seed(slot.step))
            if slot.projection is not None:
                self._move_state(slot, slot.projection, fresh)
            slot.projection = fresh
        return slot.projection.down(parameter.grad)

    def _move_state(self, slot: _Slot, old: Projection, new: Projection) -> None:
        state = self.inner.state[slot.proxy]
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != slot.proxy.shape or self.carry == "keep":
                continue
            if self.carry == "reset":
                value.zero_()
            else:
                value.copy_(new.carry(value, old, squared="sq" in name))
        if self.carry == "reset" and "step" in state:
            state["step"] = torch.zeros_like(state["step"])

    def _write(self, parameter: nn.Parameter, slot: _Slot, group: dict[str, Any]) -> None:
        assert slot.projection is not None
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(slot.projection.up(slot.proxy), alpha=self.scale)
        slot.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Torch's state plus the inner optimizer's and, per projected matrix in order, basis, side and step (plain tensors)."""
        state = super().state_dict()
        state["inner"] = self.inner.state_dict()
        state["projections"] = [
            {"step": s.step, **({"basis": s.projection.basis, "right": s.projection.right} if s.projection else {})}
            for s in self.slots.values()
        ]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit: bases keep their own dtype."""
        state = dict(state_dict)
        self.inner.load_state_dict(state.pop("inner"))
        for slot, saved in zip(self.slots.values(), state.pop("projections"), strict=True):
            slot.step = int(saved["step"])
            if "basis" in saved:
                slot.projection = Projection(saved["basis"].to(slot.proxy.device), bool(saved["right"]))
        super().load_state_dict(state)

    def state_bytes(self) -> int:
        """Bytes of optimizer state: inner moments and projections."""
        inner = [v for s in self.inner.state.values() for v in s.values() if isinstance(v, Tensor) and v.ndim]
        bases = [s.projection.basis for s in self.slots.values() if s.projection]
        return sum(t.nbytes for t in inner + bases)


@part("optimizer", "projected")
@dataclass(frozen=True)
class Projected(OptimizerPart):
    """GaLore: AdamW in the top-``rank`` singular subspace of each dense weight's gradient, refreshed every ``every`` steps.

    ``W <- (1 - lr wd) W - lr * scale * up(N)``, ``N`` torch's AdamW step on the projected gradient. State per matrix:
    ``2 max(m, n) r`` moments and a ``min(m, n) r`` basis. Biases, norms and embeddings follow plain AdamW.
    ``carry``: what happens to the moments at a refresh (the paper keeps them).
    """

    rank: int = 128
    every: int = 200
    scale: float = 0.25
    carry: Carry = "keep"
    method: Literal["exact", "randomized"] = "exact"
    low_rank_gradients: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"dense weights"})

    def check(self) -> None:
        if self.rank < 1 or self.every < 1:
            raise RecipeError(f"projected optimizer needs rank >= 1 and every >= 1, got {self.rank} and {self.every}")

    def check_on(self, targets: list[Target]) -> None:
        for target in targets:
            if self.rank > min(target.shape):
                raise CompositionError(
                    f"optimizer rank {self.rank} is above min(out, in) = {min(target.shape)} of {target.name}: "
                    f"lower optimizer.rank"
                )

    def build(self, trainables: list[Trainable], lr: float, weight_decay: float | None = None) -> ProjectedOptimizer:
        dense = [t.parameter for t in trainables if t.role == "dense"]
        others = [t.parameter for t in trainables if t.role != "dense"]

        def inner(parameters: list[nn.Parameter], rate: float) -> Optimizer:
            return torch.optim.AdamW(parameters, lr=rate, betas=self.betas, eps=self.eps, weight_decay=0.0)

        return ProjectedOptimizer(
            dense,
            others,
            lr=lr,
            weight_decay=self.weight_decay if weight_decay is None else weight_decay,
            projector=SVDProjector(self.rank, self.method),
            every=self.every,
            scale=self.scale,
            carry=self.carry,
            inner=inner,
            low_rank_gradients=self.low_rank_gradients,
        )
