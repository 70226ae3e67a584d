"""LoRA+ (2402.12354): a higher learning rate for ``B`` than for ``A``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rankloom.adapters import Trainable
from rankloom.errors import RecipeError
from rankloom.optim.adamw import AdamW
from rankloom.optim.groups import parameter_groups
from rankloom.parts import part

__all__ = ["LoRAPlus"]


@part("optimizer", "lora-plus")
@dataclass(frozen=True)
class LoRAPlus(AdamW):
    """AdamW with ``lr_B = lr_ratio * lr_A``: features are learnt well at any width n for ``lr_A = O(1/n)``, ``lr_B = O(1)``.

    Vectors (biases, magnitudes) follow ``B``, everything else ``A``; adapters of look-up tables have ``embedding_lr``
    (``None``: like the others). A ratio of one is AdamW, bit for bit.
    """

    lr_ratio: float = 16.0
    embedding_lr: float | None = 1e-6

    def check(self) -> None:
        if self.lr_ratio <= 0 or (self.embedding_lr is not None and self.embedding_lr < 0):
            raise RecipeError(
                f"LoRA+ needs optimizer.lr_ratio > 0 and optimizer.embedding_lr >= 0, got {self.lr_ratio} and "
                f"{self.embedding_lr}"
            )

    def build(self, trainables: list[Trainable], lr: float, weight_decay: float | None = None) -> torch.optim.AdamW:
        decay = self.weight_decay if weight_decay is None else weight_decay
        groups = parameter_groups(trainables, lr, decay, lr_ratio=self.lr_ratio, lookup_lr=self.embedding_lr)
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps, fused=True)
