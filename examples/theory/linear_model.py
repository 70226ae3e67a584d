"""The toy problem of LoRA-One's theory (2502.01235): a linear model, a low-rank shift, least squares.

``W* = W0 + Delta`` with ``rank(Delta) = r*``, isotropic inputs ``X`` (n, in), ``Sigma = X^T X / n``; in terms of the product
``P = B A`` of the factors the loss is ``1/2 tr((P - Delta) Sigma (P - Delta)^T)`` and its full gradient ``(P - Delta) Sigma``.
``W0`` cancels, so nothing here needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rankloom.linalg import truncated_svd

SINGULAR = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)  # of Delta, unless a program says otherwise


@dataclass(frozen=True)
class LinearModel:
    """``delta`` (out, in), the shift to be learnt; ``sigma`` (in, in), the inputs' second moment."""

    delta: Tensor
    sigma: Tensor

    def gradient(self, product: Tensor) -> Tensor:
        """Full gradient at ``W0 + product``."""
        return (product - self.delta) @ self.sigma

    @property
    def negative(self) -> Tensor:
        """``N = -G`` at ``W0``: ``Delta Sigma``."""
        return -self.gradient(torch.zeros_like(self.delta))

    def error(self, product: Tensor) -> float:
        """Distance to ``Delta`` in Frobenius norm, relative."""
        return float((product - self.delta).norm() / self.delta.norm())


def problem(size: int, singular: Tensor, samples: int | None, seed: int = 0) -> LinearModel:
    """A square problem with the given singular values of ``Delta``; ``samples=None`` for ``Sigma = I``."""
    g = torch.Generator().manual_seed(seed)
    rank = len(singular)
    u, v = (torch.linalg.qr(torch.randn(size, rank, generator=g, dtype=torch.float64)).Q for _ in range(2))
    sigma = torch.eye(size, dtype=torch.float64)
    if samples is not None:
        x = torch.randn(samples, size, generator=g, dtype=torch.float64)
        sigma = x.T @ x / samples
    return LinearModel((u * singular) @ v.T, sigma)


def spectral_start(model: LinearModel, rank: int, step: float = 1.0) -> tuple[Tensor, Tensor]:
    """LoRA-One's factors without the practical normalisation: ``B0 = U sqrt(step S)``, ``A0 = sqrt(step S) V^T``."""
    u, s, v = truncated_svd(model.negative, rank)
    root = (step * s).sqrt()
    return u * root, root[:, None] * v.T


def lora_start(model: LinearModel, rank: int, std: float, seed: int = 1) -> tuple[Tensor, Tensor]:
    """LoRA's: ``A`` random, ``B`` zero."""
    g = torch.Generator().manual_seed(seed)
    fan_out, fan_in = model.delta.shape
    return torch.zeros(fan_out, rank, dtype=torch.float64), std * torch.randn(
        rank, fan_in, generator=g, dtype=torch.float64
    )


def lora_ga_start(model: LinearModel, rank: int) -> tuple[Tensor, Tensor]:
    """LoRA-GA's split (2407.05000): ``A`` from the first r right directions, ``B`` from the next r left ones."""
    u, _, v = truncated_svd(model.negative, 2 * rank)
    return u[:, rank:], v[:, :rank].T


def iterates(
    model: LinearModel,
    b: Tensor,
    a: Tensor,
    *,
    lr: float,
    preconditioned: bool = False,
    ridge: float = 1e-6,
    offset: Tensor | float = 0.0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradient descent on both factors of ``B A - offset``, written out: the start, then every iterate, without end.

    ``preconditioned``: ``A <- A - lr (B^T B)^-1 dA``, ``B <- B - lr dB (A A^T)^-1`` (LoRA-One's eq. 9; 2402.02347).
    """
    eye = ridge * torch.eye(a.shape[0], dtype=a.dtype)
    while True:
        yield b, a
        g = model.gradient(b @ a - offset)
        grad_b, grad_a = g @ a.T, b.T @ g
        if preconditioned:
            grad_a = torch.linalg.solve(b.T @ b + eye, grad_a)
            grad_b = torch.linalg.solve(a @ a.T + eye, grad_b.T).T
        b, a = b - lr * grad_b, a - lr * grad_a


def errors(
    model: LinearModel,
    b: Tensor,
    a: Tensor,
    *,
    steps: int,
    tolerance: float = 0.0,
    offset: Tensor | float = 0.0,
    **descent: Any,
) -> list[float]:
    """Relative errors of ``B A - offset`` at the start and after every step, up to ``steps`` or the ``tolerance``."""
    found: list[float] = []
    for b_t, a_t in islice(iterates(model, b, a, offset=offset, **descent), steps + 1):
        found.append(model.error(b_t @ a_t - offset))
        if found[-1] <= tolerance:
            break
    return found
