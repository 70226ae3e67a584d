"""The optimizer contract."""

from __future__ import annotations

from torch.optim import Optimizer

from rankloom.adapters import Trainable
from rankloom.parts import Part
from rankloom.targets import Target

__all__ = ["OptimizerPart"]


class OptimizerPart(Part):
    """Settings that build a ``torch.optim.Optimizer`` over named trainable tensors with roles."""

    def check_on(self, targets: list[Target]) -> None:
        """Raise :class:`CompositionError` where the settings do not fit the targets; nothing is allocated yet."""

    def build(self, trainables: list[Trainable], lr: float, weight_decay: float | None = None) -> Optimizer:
        """The optimizer; ``weight_decay`` overrides the part's own setting where given."""
        raise NotImplementedError
