"""The two contracts of this package: a factor of the softmax kernel, and an approximation of one head's attention.

Shapes throughout: ``g`` query heads share one key head; ``q`` is (g, L, d), ``k`` (L, d), ``v`` (L, d_v), an output
(g, L, d_v). Features run along the rows, tokens along the columns: (width, n).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from rankloom.attention.precondition import Preconditioner

__all__ = ["Approximation", "Factor", "Rows"]

Rows = Callable[[Tensor, Tensor], Tensor]
"""From queries ``q`` (m, d) at the positions ``at`` (m,) to their dense rows (m, n)."""


class Factor(ABC):
    """``exp(q . k) ~ phi(q)^T M phi(k)`` with one feature map ``phi`` from ``dim`` to ``width`` and a symmetric ``M``."""

    dim: int
    width: int

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """``phi`` of the columns of ``x`` (dim, n): (width, n)."""

    @abstractmethod
    def pull_back(self, x: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        """The gradient in ``x`` (dim, n) from ``grad`` (width, n), the gradient in ``features = phi(x)``.

        ``grad`` may be used up as working memory.
        """

    @abstractmethod
    def mix(self, state: Tensor) -> Tensor:
        """``M @ state`` for ``state`` (width, m)."""


class Approximation(ABC):
    """One head's attention ``softmax(scale * q k^T) v``, approximated, with everything it was fitted to held fixed.

    Differentiable once in ``q``, ``k`` and ``v``: the gradient is that of the approximate map itself.
    """

    preconditioner: Preconditioner
    scale: float
    causal: bool

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The output (g, L, d_v), and the denominators (g, L), which have no gradient: a head where one of them is not
        positive and finite has no valid output."""

    @abstractmethod
    def kernel(self, k: Tensor, to: Tensor, every: Tensor) -> Rows:
        """The kernel that :meth:`__call__` amounts to, before its rows are divided by their denominators, at keys ``k`` (n, d)
        of the positions ``to`` (n,) among ``every`` key (L, d): what gives the rows of single queries, 0 where masked,
        differentiable in ``q`` and ``k``. For certificates and tests. What many queries share, as features of keys, is computed
        once and held: O(width n)."""

    def difficulty(self, q: Tensor) -> Tensor:
        """What grows with a query row's expected error, 0 for rows without one: (g, L). Here the row's norm in the factor's
        coordinates."""
        return self.preconditioner.queries(q.detach()).norm(dim=-1)
