"""LoCA (2502.06820): the update is the inverse cosine transform of a few learned coefficients at learned places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankloom.adapters.base import AdapterPart, Binding, Dtype, adapter_dtype
from rankloom.adapters.factored import FactoredAdapter
from rankloom.adapters.materialized import MaterializedAdapter
from rankloom.adapters.seeded import require_room
from rankloom.errors import RecipeError
from rankloom.events import Schedule
from rankloom.kernels.cosines import cosine_rows, cosine_waves, snapped
from rankloom.kernels.separable import separable_sum
from rankloom.layers import Layer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["Alternation", "LoCA", "LoCAAdapter"]

Form = Literal["auto", "factored", "dense"]


class LoCAAdapter(FactoredAdapter, MaterializedAdapter):
    """``delta = s * sum_k a_k c_{i_k} d_{j_k}^T``, rows of the orthonormal DCT-II of lengths ``out`` and ``in``.

    ``a`` (n,) and ``u`` (2 n,), which the places ``i, j`` are rounded from, are trained, one at a time: ``placing`` says that it
    is ``u``. Factored, the sum is a product of rank n; dense, it is formed: terms of one wave are added up first, and one
    product with the waves in use is left.
    """

    roles: ClassVar[dict[str, str]] = {"a": "coefficients", "u": "places"}

    def __init__(self, layer: Layer, n: int, scale: float, form: Form, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.shape, self.placing = scale, (layer.out_features, layer.in_features), False
        self.dense = form == "dense" or (form == "auto" and n * sum(self.shape) > self.shape[0] * self.shape[1])
        self.a = nn.Parameter(torch.zeros(n, dtype=dtype, device=layer.device))
        self.u = nn.Parameter(torch.zeros(2 * n, dtype=dtype, device=layer.device))

    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """``a = 0`` and ``u`` uniform in [0, 1)."""
        nn.init.zeros_(self.a)
        self.u.copy_(torch.rand(self.u.shape, generator=generator, dtype=self.u.dtype))

    def tensors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Coefficients and places (2, n); only what the phase trains has a gradient other than zero."""
        places = snapped(self.u.view(2, -1), self.shape)
        return (self.a.detach() if self.placing else self.a).to(dtype), places

    def effective(self) -> tuple[Tensor, Tensor]:
        a, (i, j) = self.tensors()
        right = cosine_rows(j if self.placing else j.detach(), self.shape[1])
        return cosine_rows(i, self.shape[0], learned=self.placing).mT * a, right

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return super().factors() if len(self.a) <= min(self.shape) else None

    def rows(self, weight: Tensor | None, span: slice, *tensors: Tensor) -> Tensor:
        a, places = tensors
        left, right = (cosine_waves(size, a.dtype, a.device) for size in self.shape)
        return separable_sum(self.scale * a, places, left[:, span], right, learned=self.placing)

    def operands(self, x: Tensor, base: Layer) -> Any:
        return None if self.dense else super().operands(x, base)

    def delta(self, base: Layer) -> Tensor:
        return (MaterializedAdapter if self.dense else FactoredAdapter).delta(self, base)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        return (MaterializedAdapter if self.dense else FactoredAdapter).forward(self, x, base)


class Alternation(Schedule):
    """Coefficients for some steps, places for some, in turn; coefficients alone from step ``last`` on.

    What does not learn has no gradient at all, so that neither moments nor decay move it.
    """

    def __init__(self, bindings: list[Binding], coefficient_steps: int, place_steps: int, last: int) -> None:
        self.adapters: list[LoCAAdapter] = [binding.adapter for binding in bindings]
        self.coefficient_steps, self.cycle, self.last = coefficient_steps, coefficient_steps + place_steps, last
        self.after_step(0)

    def placing(self, step: int) -> bool:
        """Whether places learn in the step after ``step`` finished ones."""
        return step < self.last and step % self.cycle >= self.coefficient_steps

    def after_backward(self, step: int) -> None:
        for adapter in self.adapters:
            (adapter.a if adapter.placing else adapter.u).grad = None

    def after_step(self, step: int) -> None:
        self.step = step
        for adapter in self.adapters:
            adapter.placing = self.placing(step)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.after_step(int(state["step"]))


@part("adapter", "loca")
@dataclass(frozen=True)
class LoCA(AdapterPart):
    """``y = x (W + s C^T S D)^T + b``: orthonormal cosine matrices ``C``, ``D``, and ``n = coefficients`` learned entries ``S``.

    The entries' places are learned too: for the first ``placing`` optimizer steps (a fraction of the run below 1) phases of
    ``coefficient_steps`` alternate with phases of ``place_steps``, in which places move by central differences of the cosine
    rows, ``di_k = clamp(a_k (K[i_k + 1, j_k] - K[i_k - 1, j_k]) / 2, -1, 1)`` with ``K = C G D^T``. Entries at one place add up.
    Starts at zero, at random places. ``form``: ``factored`` multiplies the input with n rows, ``dense`` forms the update;
    ``auto`` does what takes fewer multiply-adds. All layers share the cosine waves of their sides, ``length^2`` numbers for each
    length. Parameters per target: ``n``, and ``2 n`` places while those learn.

    Raises:
        RecipeError: fewer than one coefficient or step of a phase; a run of unknown length where ``placing`` is a fraction.
        TargetError: more coefficients than a target has entries.
    """

    coefficients: int = 1000
    scale: float = 1.0
    placing: int | float = 0.1
    coefficient_steps: int = 10
    place_steps: int = 20
    form: Form = "auto"
    dtype: Dtype = "auto"

    def check(self) -> None:
        if min(self.coefficients, self.coefficient_steps, self.place_steps) < 1 or self.placing < 0:
            raise RecipeError(
                "LoCA needs coefficients, coefficient_steps and place_steps >= 1 and adapter.placing >= 0"
            )

    def check_on(self, targets: list[Target]) -> None:
        require_room(self.coefficients, targets)

    def schedule(self, bindings: list[Binding], total_steps: int | None) -> Alternation:
        last = self.placing
        if isinstance(last, float) and last < 1:
            if total_steps is None and last:
                raise RecipeError(
                    "LoCA learns places for a fraction of the run: pass its length, optimizer(lr, total_steps=...), or set "
                    "adapter.placing to a number of steps"
                )
            last = round(last * (total_steps or 0))
        return Alternation(bindings, self.coefficient_steps, self.place_steps, int(last))

    def build(self, target: Target) -> LoCAAdapter:
        dtype = adapter_dtype(self.dtype, target.layer)
        return LoCAAdapter(target.layer, self.coefficients, self.scale, self.form, dtype)
