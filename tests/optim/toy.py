"""Pairs with a full gradient each, so that every preconditioner can be compared with what it does to the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.adapters import Trainable
from rankloom.optim import OptimizerPart


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(eq=False)
class Toy:
    """One weight ``s B A`` (out, in) under a constant full gradient ``g``."""

    a: nn.Parameter
    b: nn.Parameter
    g: Tensor
    scale: float
    name: str = "layer"

    @property
    def trainables(self) -> list[Trainable]:
        return [
            Trainable(f"{self.name}.{role}", p, role, self.name, self.scale)
            for role, p in (("A", self.a), ("B", self.b))
        ]

    @property
    def weight(self) -> Tensor:
        return (self.scale * self.b @ self.a).detach()

    def backward(self) -> None:
        """LoRA's gradients: ``s B^T G`` and ``s G A^T``."""
        self.a.grad = (self.scale * self.b.mT @ self.g).detach()
        self.b.grad = (self.scale * self.g @ self.a.mT).detach()


def toy(out: int = 7, fan_in: int = 6, rank: int = 3, scale: float = 1.7, seed: int = 0, name: str = "layer") -> Toy:
    """A random one, with a well-conditioned pair."""
    a, b = nn.Parameter(rand(seed, rank, fan_in)), nn.Parameter(rand(seed + 1, out, rank))
    return Toy(a, b, rand(seed + 2, out, fan_in), scale, name)


def turned(of: Toy, q: Tensor) -> Toy:
    """The same weight from other factors: ``(B Q, Q^-1 A)``."""
    a, b = torch.linalg.solve(q, of.a.detach()), of.b.detach() @ q
    return Toy(nn.Parameter(a), nn.Parameter(b), of.g, of.scale, of.name)


def moved(part: OptimizerPart, of: Toy, lr: float = 1.0, **options: Any) -> tuple[Tensor, Tensor]:
    """``(dA, dB) / -lr`` of one step: the gradients that a plain descent would have needed."""
    a, b = of.a.detach().clone(), of.b.detach().clone()
    optimizer = part.build(of.trainables, lr, **options)
    of.backward()
    optimizer.step()
    steps = (a - of.a.detach()) / lr, (b - of.b.detach()) / lr
    with torch.no_grad():
        of.a.copy_(a)
        of.b.copy_(b)
    return steps


def equivalent(of: Toy, grad_a: Tensor, grad_b: Tensor) -> Tensor:
    """What a step along pair gradients does to the weight, to first order: ``s (B g_A + g_B A)``."""
    return (of.scale * (of.b @ grad_a + grad_b @ of.a)).detach()


def projector(columns: Tensor) -> Tensor:
    """The orthogonal projector on a matrix's columns."""
    u, s, _ = torch.linalg.svd(columns.detach(), full_matrices=False)
    u = u[:, s > 1e-12 * s[0]] if s[0] > 0 else u[:, :0]
    return u @ u.mT
