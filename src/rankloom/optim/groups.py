"""Parameter groups: who follows which learning rate, and who decays."""

from __future__ import annotations

from typing import Any

from torch import nn

from rankloom.adapters import Trainable

__all__ = ["parameter_groups"]


def parameter_groups(
    trainables: list[Trainable],
    lr: float,
    weight_decay: float,
    *,
    lr_ratio: float = 1.0,
    lookup_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for a ``torch.optim`` optimizer, matrices first; weight decay acts on matrices only.

    ``B`` factors and vectors have ``lr * lr_ratio`` (LoRA+, 2402.12354), adapters of look-up tables ``lookup_lr`` where
    given, all else ``lr``. Groups are by rate, so a ratio of one gives the very groups of plain AdamW.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for t in trainables:
        matrix = t.parameter.ndim > 1
        rate = lr * lr_ratio if t.role == "B" or not matrix else lr
        rate = lookup_lr if t.lookup and lookup_lr is not None else rate
        groups.setdefault((not matrix, rate), []).append(t.parameter)
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    return [
        {"params": params, "lr": rate, "weight_decay": 0.0 if vectors else weight_decay}
        for (vectors, rate), params in ordered
    ]
