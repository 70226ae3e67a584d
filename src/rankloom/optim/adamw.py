"""AdamW, torch's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rankloom.adapters import Trainable
from rankloom.optim.base import OptimizerPart
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
        decay = self.weight_decay if weight_decay is None else weight_decay
        matrices = [t.parameter for t in trainables if t.parameter.ndim > 1]
        vectors = [t.parameter for t in trainables if t.parameter.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=self.betas, eps=self.eps, fused=True)
