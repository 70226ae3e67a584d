"""AdamW, torch's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rankloom.adapters import Trainable
from rankloom.optim.base import OptimizerPart
from rankloom.optim.groups import parameter_groups
from rankloom.parts import part

__all__ = ["AdamW"]


@part("optimizer", "adamw")
@dataclass(frozen=True)
class AdamW(OptimizerPart):
    """``torch.optim.AdamW`` over all trainable tensors; decoupled weight decay, on matrices only."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def build(self, trainables: list[Trainable], lr: float, weight_decay: float | None = None) -> torch.optim.AdamW:
        groups = parameter_groups(trainables, lr, self.weight_decay if weight_decay is None else weight_decay)
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps, fused=True)
