"""The adapter contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rankloom.events import Schedule
from rankloom.layers import EmbeddingLayer, Layer
from rankloom.parts import Part
from rankloom.targets import Target, Targets, find_targets

__all__ = ["Adapter", "AdapterPart", "Binding", "Dtype", "Form", "Trainable", "adapter_dtype"]

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


class Form(nn.Module, ABC):
    """What every adapter is, whatever it sits on: trainable tensors with roles, and their start.

    Class facts: ``linear_in_x`` (the update is a matrix), ``mergeable``, ``needs_base`` (when ``W`` has to be readable),
    ``seeded`` (frozen tensors are regenerated from a seed, not stored), ``shares_input`` (siblings may run as one kernel).
    """

    linear_in_x: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    needs_base: ClassVar[Literal["never", "init", "merge", "every_step"]] = "never"
    seeded: ClassVar[bool] = False
    shares_input: ClassVar[bool] = False  # offers `operands` and `together`
    scale: float = 1.0  # the factor s on the product of the factors, where there are factors
    roles: ClassVar[dict[str, str]] = {}  # parameter name -> role, for optimizers that treat factors differently

    def reset(self, base: Any, generator: torch.Generator) -> None:
        """Write the form's own start (init ``own``), drawing from ``generator``; for parts that offer ``own start``.

        ``base``: what the adapter sits on.
        """
        raise NotImplementedError

    def initialized(self, base: Any) -> None:
        """Called once after the init part has written the parameters; for what is derived from them."""

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise :class:`ArtifactError` where saved tensors were made with other frozen tensors than these (seeded forms)."""


class Adapter(Form):
    """One adapted weight: ``y = x (W + delta)^T + b`` with ``delta`` a function of this module's parameters.

    A few forms move the bias too, by :meth:`bias_delta`.
    """

    @abstractmethod
    def forward(self, x: Tensor, base: Layer) -> Tensor:
        """The adapted output; ``base(x)`` is the frozen layer's."""

    @abstractmethod
    def delta(self, base: Layer) -> Tensor:
        """The dense update (out, in), exact: the oracle for tests, merging and export."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """``(B, A)`` with ``delta = B A`` exactly, scale folded in; None where the update has no such form."""
        return None

    def factors_on(self, base: Layer) -> tuple[Tensor, Tensor] | None:
        """:meth:`factors`, for forms whose factors hold the weight as well."""
        return self.factors()

    def bias_delta(self, base: Layer) -> Tensor | None:
        """What the form adds to the layer's bias (out,), which has to have one; None where it leaves it alone."""
        return None


class AdapterPart(Part):
    """Settings that build one adapter per target.

    A form has its own start (:meth:`Form.reset`) unless its part offers something else instead, as LoRA's family does.
    """

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"own start"})

    def targets_on(self, model: nn.Module, settings: Targets) -> list[Target]:
        """What of a model the form sits on. Raises :class:`TargetError` as :func:`find_targets` does."""
        return find_targets(model, settings)

    def check_on(self, targets: list[Target]) -> None:
        """Raise :class:`TargetError` where the settings do not fit the targets; nothing is allocated yet."""

    def schedule(self, bindings: list[Binding], total_steps: int | None) -> Schedule | None:
        """What the form itself does over time, or None; see :class:`rankloom.events.Schedule`."""
        return None

    def build(self, target: Target) -> Form:
        """A new adapter, its parameters uninitialised. Raises :class:`TargetError` where the target does not fit."""
        raise NotImplementedError

    def build_all(self, targets: list[Target]) -> Sequence[Form]:
        """An adapter for every target of a model; for forms whose adapters share tensors."""
        return [self.build(target) for target in targets]


class Trainable(NamedTuple):
    """A tensor the optimizer moves: full name, parameter, its role (``A``, ``B``, ``dense``, ``whole`` ...), its target.

    ``scale`` is the adapter's ``s``; ``lookup`` says that the target is a look-up table, indexed instead of multiplied.
    """

    name: str
    parameter: nn.Parameter
    role: str
    target: str | None
    scale: float = 1.0
    lookup: bool = False


@dataclass(eq=False)
class Binding:
    """A target and the adapter that sits on it."""

    target: Target
    adapter: Any  # a Form; Any because parts work with the concrete forms whose capabilities they asked for

    @property
    def name(self) -> str:
        """The target's name."""
        return self.target.name

    @property
    def layer(self) -> Layer:
        """The target's frozen layer."""
        return self.target.layer

    def trainables(self) -> list[Trainable]:
        """The adapter's trainable tensors."""
        roles, scale, lookup = self.adapter.roles, self.adapter.scale, isinstance(self.layer, EmbeddingLayer)
        return [
            Trainable(f"{self.name}.{n}", p, roles[n], self.name, scale, lookup)
            for n, p in self.adapter.named_parameters()
        ]


def adapter_dtype(setting: Dtype, layer: Layer) -> torch.dtype:
    """The dtype of trainable tensors: ``auto`` keeps float64 and raises everything narrower to float32.

    Optimizer steps are far below half precision's resolution, so trainable tensors are held in float32 over a half-precision
    base; kernels cast the (small) factors, never the activations.
    """
    if setting != "auto":
        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
            "float64": torch.float64,
        }[setting]
    return torch.promote_types(layer.dtype, torch.float32)
