"""From gradients in a head's queries, keys and values to those of the adapters that made them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rankloom.kernels.lowrank import Linear

__all__ = ["Projection"]


@dataclass(frozen=True)
class Projection:
    """The low-rank ``linear`` that makes the queries, the keys or the values of a head from ``x`` (L, D).

    ``linear.b`` is (heads * d, r), with ``heads = g`` for queries and 1 for keys and values. ``pull_back(grad, at)`` undoes what
    stands between the projection and attention, such as rotary positions: it takes gradients (any, n, d) at the positions
    ``at`` (n,), of several heads or samples alike, to those in the projection's own output; None where nothing does.
    """

    x: Tensor
    linear: Linear
    pull_back: Callable[[Tensor, Tensor], Tensor] | None = None

    def to(self, dtype: torch.dtype) -> Projection:
        """The same in ``dtype``, as a constant."""
        a, b = (t.detach().to(dtype) for t in (self.linear.a, self.linear.b))
        return replace(self, x=self.x.detach().to(dtype), linear=self.linear._replace(a=a, b=b))

    @cached_property
    def inner(self) -> Tensor:
        """``X A^T`` (L, r), which the gradients of all samples of rows share."""
        return self.x @ self.linear.a.mT

    def gradients(self, grad: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``dA`` (.., r, D) and ``dB`` (.., heads * d, r) from ``grad`` (.., heads, n, d) at the positions ``at`` (n,), or at all
        of them; several gradients at the same positions share what they have in common."""
        if self.pull_back is not None:
            at = torch.arange(len(self.x), device=grad.device) if at is None else at
            grad = self.pull_back(grad.flatten(0, -3), at).reshape(grad.shape)
        grad = grad.transpose(-3, -2).flatten(-2)
        x, inner = (t if at is None else t[at] for t in (self.x, self.inner))
        return self.linear.scale * (grad @ self.linear.b).mT @ x, self.linear.scale * grad.mT @ inner
