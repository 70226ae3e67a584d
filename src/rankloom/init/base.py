"""The init contract: gather evidence on the bare model, then write the adapters' parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from rankloom.adapters import Binding
from rankloom.calibration import Calibration
from rankloom.calibration.sketch import target_generator
from rankloom.parts import Part

__all__ = ["InitContext", "InitPart"]


@dataclass
class InitContext:
    """What an init works with: the bindings, its evidence, the seed, the adapted model's loss, and a report to fill."""

    bindings: list[Binding]
    evidence: Any
    seed: int
    loss: Callable[[], float] | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def generator(self, binding: Binding) -> torch.Generator:
        """The binding's own generator."""
        return target_generator(self.seed, binding.name)


class InitPart(Part):
    """Settings and algorithm of a start.

    ``evidence`` names what it looks at. ``offset``: the start is subtracted again, ``delta = s (B A - B0 A0)``, so that the
    pretrained function stays while the factors do not start at zero. ``repeatable``: :meth:`apply` needs no evidence, moves
    nothing and may be called again on trained adapters, for chains of merged and restarted links.
    """

    evidence: ClassVar[Literal["none", "weight", "gradient", "activations"]] = "none"
    offset: ClassVar[bool] = False
    repeatable: ClassVar[bool] = False

    @property
    def moves_output(self) -> bool:
        """Whether the function at step 0 is, on purpose, not the pretrained one."""
        return False

    @property
    def offers(self) -> frozenset[str]:
        # What an offset subtracts stays subtracted when a schedule zeroes a component: pruning would cut into W itself.
        start = "a start with an offset" if self.offset else "a start without offset"
        return frozenset({start, "a repeatable start"} if self.repeatable else {start})

    def gather(self, model: nn.Module, bindings: list[Binding], calibration: Calibration, seed: int) -> Any:
        """Collect the evidence; the model carries no adapters yet. Called only where ``evidence`` needs data."""
        return None

    def ranks(self, bindings: list[Binding], evidence: Any) -> dict[str, int] | None:
        """Ranks by target that the evidence asks for, 0 for none at all; None where they stay as the recipe has them."""
        return None

    def apply(self, context: InitContext) -> None:
        """Write every binding's parameters (no gradients are recorded)."""
        raise NotImplementedError
