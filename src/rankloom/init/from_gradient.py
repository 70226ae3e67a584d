"""What starts from the full gradient have in common: its leading triplets, sketched or exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from rankloom.adapters import Binding
from rankloom.calibration import Calibration, GradientReport, exact_gradients, gradient_svd
from rankloom.errors import RecipeError
from rankloom.init.base import InitPart

__all__ = ["FromGradient"]


@dataclass(frozen=True)
class FromGradient(InitPart):
    """A start from the leading singular triplets of every target's full gradient on the calibration data.

    ``method``: ``"sketch"`` streams the triplets in ``passes`` passes over the data at width ``oversample`` beyond their
    number (more passes where ``tolerance`` asks for captured energy; ``lean`` for half the memory at one side a pass, which
    takes a pass more for the same energy); ``"exact"`` holds the full gradients of all targets,
    after one pass.
    """

    method: Literal["sketch", "exact"] = "sketch"
    oversample: int = 24
    passes: int = 3
    tolerance: float | None = None
    lean: bool = False

    evidence: ClassVar[Literal["none", "weight", "gradient", "activations"]] = "gradient"
    triplets: ClassVar[int] = 1
    """Triplets used for every unit of rank."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"factors"})

    def check(self) -> None:
        if self.passes < 2:
            raise RecipeError(f"init passes must be at least 2 (range, projection), got {self.passes}")

    def gather(self, model: nn.Module, bindings: list[Binding], calibration: Calibration, seed: int) -> GradientReport:
        targets = [binding.target for binding in bindings]
        rank = self.triplets * max(binding.adapter.rank for binding in bindings)
        if self.method == "exact":
            return exact_gradients(model, targets, calibration, rank=rank)[1]
        return gradient_svd(
            model,
            targets,
            calibration,
            rank=rank,
            oversample=self.oversample,
            passes=self.passes,
            tolerance=self.tolerance,
            lean=self.lean,
            seed=seed,
        )
