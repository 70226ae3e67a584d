"""SaRA (2409.06633): train the weights that are smallest in the pretrained model, under a nuclear norm, in two phases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankloom.adapters.base import AdapterPart, Binding, Dtype, adapter_dtype
from rankloom.adapters.materialized import MaterializedAdapter
from rankloom.errors import RecipeError, TargetError
from rankloom.events import Schedule, broadcast
from rankloom.layers import Layer
from rankloom.linalg import polar_factor
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["SaRA", "SaRAAdapter", "SaRASchedule", "smallest"]


def smallest(weight: Tensor, fraction: float, threshold: float | None) -> Tensor:
    """Positions, ascending in the flattened ``weight``, of what is below ``threshold`` in magnitude; without one, of the
    smallest ``fraction``, ties going to the earlier position."""
    size = weight.abs().flatten().to(torch.promote_types(weight.dtype, torch.float32))
    if threshold is not None:
        return (size < threshold).nonzero().flatten()
    count = max(round(fraction * size.numel()), 1)
    edge = size.kthvalue(count).values
    chosen = size < edge
    chosen[(size == edge).nonzero().flatten()[: count - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()


class SaRAAdapter(MaterializedAdapter):
    """``delta`` is ``values`` (n,) at the positions ``index`` (n,) and zero elsewhere; those that are not ``live`` are frozen."""

    needs_base: ClassVar[Literal["never", "init", "merge", "every_step"]] = "init"
    roles: ClassVar[dict[str, str]] = {"values": "sparse"}
    index: Tensor
    live: Tensor

    def __init__(self, layer: Layer, fraction: float, threshold: float | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.threshold = (layer.out_features, layer.in_features), threshold
        index = smallest(layer.weight(), fraction, threshold)
        fits = self.shape[0] * self.shape[1] < 2**31
        self.register_buffer("index", index.int() if fits else index)
        self.register_buffer("live", torch.ones_like(index, dtype=torch.bool))
        self.values = nn.Parameter(torch.zeros(len(index), dtype=dtype, device=layer.device))

    def reset(self, base: Layer, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.values.zero_()

    def tensors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return (torch.where(self.live, self.values, self.values.detach()).to(dtype),)

    def rows(self, weight: Tensor | None, span: slice, *tensors: Tensor) -> Tensor:
        (values,), width, height = tensors, self.shape[1], span.stop - span.start
        index = self.index
        if height < self.shape[0]:
            ends = torch.tensor([span.start * width, span.stop * width], dtype=index.dtype, device=index.device)
            own = slice(*torch.searchsorted(index, ends).tolist())
            index, values = index[own] - span.start * width, values[own]
        return values.new_zeros(height * width).scatter(0, index.long(), values).view(height, width)

    def pretrained(self, base: Layer) -> Tensor:
        """The chosen entries of ``W`` (n,)."""
        return base.weight().flatten()[self.index.long()].to(self.values.dtype)

    @torch.no_grad()
    def still_small(self, base: Layer) -> Tensor:
        """Which live entries (n,) are, by now, not above what was the limit when they were chosen."""
        before = self.pretrained(base)
        size = (before + self.values).abs()
        return self.live & (size < self.threshold if self.threshold is not None else size <= before.abs().max())

    def nuclear_norm(self, base: Layer) -> Tensor:
        """``||Z||_*`` of the chosen entries of ``W + delta``, zeros elsewhere; its gradient is ``U V^T`` at the live ones.

        Exact up to singular values near zero, see :func:`rankloom.linalg.polar_factor`.
        """
        entries = self.pretrained(base) + self.tensors()[0]
        with torch.no_grad():
            matrix = self.rows(None, slice(0, self.shape[0]), entries)
            slope = polar_factor(matrix).flatten()[self.index.long()]
        return (slope * entries).sum()


class SaRASchedule(Schedule):
    """The penalty, and the shrinking of the trained set after the first phase."""

    def __init__(self, settings: SaRA, bindings: list[Binding], until: int) -> None:
        self.settings, self.bindings, self.until = settings, bindings, until
        self.before: list[Tensor] = []

    def attached(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def extra_loss(self, step: int) -> Tensor | None:
        """``nuclear`` times the sum of all nuclear norms, estimated without bias from one target a step."""
        if not self.settings.nuclear:
            return None
        drawn = torch.randint(len(self.bindings), (), generator=torch.Generator().manual_seed(step))
        b = self.bindings[int(drawn)]
        norm: Tensor = b.adapter.nuclear_norm(b.layer)
        return self.settings.nuclear * len(self.bindings) * norm

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        if self.until and step >= self.until:
            self.before = [b.adapter.values.clone() for b in self.bindings]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        # Frozen entries have no gradient, but weight decay would move them all the same.
        for b, before in zip(self.bindings, self.before, strict=False):
            b.adapter.values.copy_(torch.where(b.adapter.live, b.adapter.values, before))
        if self.until and step == self.until:
            self.reselect()

    def reselect(self) -> None:
        """Freeze what has grown out of the limit, and start the optimizer anew."""
        for b in self.bindings:
            b.adapter.live.copy_(broadcast(b.adapter.still_small(b.layer)))
            for moment in self.optimizer.state[b.adapter.values].values():
                if isinstance(moment, Tensor):
                    moment.zero_()


@part("adapter", "sara")
@dataclass(frozen=True)
class SaRA(AdapterPart):
    """``delta`` trains, from zero, the smallest entries of ``W``: a ``fraction`` of them, or those below ``threshold``.

    ``nuclear`` weighs the nuclear norm of the chosen entries of ``W + delta`` (zeros elsewhere). After ``first_phase`` optimizer
    steps (or that fraction of the run, below 1; 0 for one phase only) the entries that have grown out of the limit are frozen
    where they are, and the others go on with fresh moments. The positions are stored with the values, 4 bytes each.
    Parameters per target: ``fraction in out``.

    Raises:
        RecipeError: a phase that is a fraction of a run of unknown length.
        TargetError: no weight of a target is below ``threshold``.
    """

    fraction: float = 0.15
    threshold: float | None = None
    nuclear: float = 5e-4
    first_phase: int | float = 0.5
    dtype: Dtype = "auto"

    def check(self) -> None:
        if not 0 < self.fraction <= 1:
            raise RecipeError(f"adapter fraction must be in (0, 1], got {self.fraction}")
        if (self.threshold is not None and self.threshold <= 0) or self.nuclear < 0 or self.first_phase < 0:
            raise RecipeError("adapter threshold must be positive, nuclear and first_phase at least 0")

    def check_on(self, targets: list[Target]) -> None:
        if self.threshold is None:
            return
        for target in targets:
            least = float(target.layer.weight().abs().min())
            if least >= self.threshold:
                raise TargetError(
                    f"no weight of {target.name} is below {self.threshold}, the least is {least:.2g}: raise adapter.threshold, "
                    f"or use adapter.fraction instead"
                )

    def schedule(self, bindings: list[Binding], total_steps: int | None) -> SaRASchedule:
        until = self.first_phase
        if 0 < until < 1:
            if total_steps is None:
                raise RecipeError(
                    "SaRA's first phase is a fraction of the run: pass its length, optimizer(lr, total_steps=...), or give "
                    "adapter.first_phase in steps"
                )
            until = round(until * total_steps)
        return SaRASchedule(self, bindings, int(until))

    def build(self, target: Target) -> SaRAAdapter:
        dtype = adapter_dtype(self.dtype, target.layer)
        return SaRAAdapter(target.layer, self.fraction, self.threshold, dtype)
