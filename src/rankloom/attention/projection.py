"""From gradients in a head's queries, keys and values to those of the adapters that made them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rankloom.attention.exact import factor_gradients
from rankloom.kernels.lowrank import Linear

__all__ = ["Projection"]


@dataclass(frozen=True)
class Projection:
    """The low-rank ``linear`` that makes the queries, the keys or the values of a head from ``x`` (L, D).

    ``linear.b`` is (heads * d, r), with ``heads = g`` for queries and 1 for keys and values. ``pull_back(grad, at)`` undoes what
    stands between the projection and attention, such as rotary positions: it takes gradients (heads, n, d) at the positions
    ``at`` (n,) to those in the projection's own output; None where nothing does.
    """

    x: Tensor
    linear: Linear
    pull_back: Callable[[Tensor, Tensor], Tensor] | None = None

    def gradients(self, grad: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """``dA`` (r, D) and ``dB`` (heads * d, r) from ``grad`` (heads, n, d) at the positions ``at`` (n,)."""
        grad = grad if self.pull_back is None else self.pull_back(grad, at)
        x, a, b = (t.detach().to(grad.dtype) for t in (self.x[at], self.linear.a, self.linear.b))
        return factor_gradients(x, self.linear._replace(a=a, b=b), grad.transpose(0, 1).flatten(1))
