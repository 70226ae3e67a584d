"""Products of coordinates, grown from a constant one factor at a time: how all polynomial features are formed."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankloom.errors import RecipeError

__all__ = ["Products", "all_monomials", "best_monomials", "check_spectrum", "factorials"]

Monomial = tuple[int, ...]
"""Its variables, ascending: ``(0, 0, 2)`` is ``x_0^2 x_2``."""


class _Level(NamedTuple):
    """The products of one degree: ``phi[rows] = y[variables] phi[parents]``, plus ``less phi[before]`` at ``repeated``."""

    rows: slice
    parents: Tensor
    variables: Tensor
    repeated: Tensor
    before: Tensor
    less: Tensor


class Products:
    """Features ``phi_m(y)`` for a set of monomials that holds the parent (all but the last variable) of each.

    Plain: ``phi_m = phi_() y^m``. ``hermite``: ``phi_m = phi_() prod_i He_{m_i}(y_i)`` with the monic polynomials orthogonal for
    the standard normal, ``He_{n+1}(t) = t He_n(t) - n He_{n-1}(t)``. Either way one multiplication a feature (and one subtraction
    where a variable repeats), a level at a time: row gathers and whole-level products keep the number of operations small.
    """

    def __init__(self, monomials: Sequence[Monomial], *, hermite: bool = False) -> None:
        self.monomials = sorted(monomials, key=lambda m: (len(m), m))
        row = {m: i for i, m in enumerate(self.monomials)}
        levels = [list(level) for _, level in itertools.groupby(self.monomials[1:], len)]
        self._levels = [_level(level, row, hermite) for level in levels]

    def grow(self, seed: Tensor | float, y: Tensor) -> Tensor:
        """``phi`` (width, n) of ``y`` (dim, n), from ``seed`` (n,) or a number as the feature of the empty product."""
        phi = y.new_empty(len(self.monomials), y.shape[1])
        phi[0] = seed
        for rows, parents, variables, repeated, before, less in self._on(y):
            level = phi[rows]
            torch.index_select(phi[: rows.start], 0, parents, out=level)
            level *= y.index_select(0, variables)
            if len(repeated):
                level.index_add_(0, repeated, phi.index_select(0, before).mul_(less))
        return phi

    def pull_back(self, y: Tensor, phi: Tensor, grad: Tensor) -> Tensor:
        """The gradient in ``y``; ``grad`` (width, n) is used up, its first row ends as the gradient in the seed."""
        out = torch.zeros_like(y)
        for rows, parents, variables, repeated, before, less in reversed(self._on(y)):
            level = grad[rows]
            out.index_add_(0, variables, phi.index_select(0, parents).mul_(level))
            if len(repeated):
                grad.index_add_(0, before, level.index_select(0, repeated).mul_(less))
            grad.index_add_(0, parents, y.index_select(0, variables).mul_(level))
        return out

    def _on(self, y: Tensor) -> list[_Level]:
        """The levels on ``y``'s device, in its precision."""
        if self._levels and (self._levels[0].less.dtype, self._levels[0].parents.device) != (y.dtype, y.device):
            self._levels = [
                _Level._make([rows, *(t.to(y.device) for t in indices), less.to(y)])
                for rows, *indices, less in self._levels
            ]
        return self._levels


def _level(level: list[Monomial], row: dict[Monomial, int], hermite: bool) -> _Level:
    repeats = [(i, row[m[:-2]], 1 - m.count(m[-1])) for i, m in enumerate(level) if hermite and m[-2:-1] == m[-1:]]
    repeated, before, less = zip(*repeats, strict=True) if repeats else ((), (), ())
    first = row[level[0]]
    return _Level(
        slice(first, first + len(level)),
        torch.tensor([row[m[:-1]] for m in level]),
        torch.tensor([m[-1] for m in level]),
        torch.tensor(repeated, dtype=torch.long),
        torch.tensor(before, dtype=torch.long),
        torch.tensor(less, dtype=torch.float64)[:, None],
    )


def all_monomials(dim: int, degree: int) -> list[Monomial]:
    """The ``C(dim + degree, degree)`` monomials of degree at most ``degree``."""
    return [m for j in range(degree + 1) for m in itertools.combinations_with_replacement(range(dim), j)]


def best_monomials(ratios: Sequence[Sequence[float]], width: int) -> list[Monomial]:
    """At most ``width`` monomials of large score ``prod_i prod_{n <= m_i} ratios[n - 1][i]``, of degree at most ``len(ratios)``.

    Greedy from the constant, by the largest score among the monomials whose parent is in: the largest scores of all where
    no ratio exceeds 1.
    """
    chosen: list[Monomial] = []
    heap: list[tuple[float, Monomial]] = [(-1.0, ())]
    while heap and len(chosen) < width:
        score, monomial = heapq.heappop(heap)
        chosen.append(monomial)
        if len(monomial) < len(ratios):
            for i in range(monomial[-1] if monomial else 0, len(ratios[0])):
                heapq.heappush(heap, (score * ratios[monomial.count(i)][i], (*monomial, i)))
    return chosen


def factorials(monomial: Monomial) -> int:
    """``m!``."""
    return math.prod(math.factorial(len(list(run))) for _, run in itertools.groupby(monomial))


def check_spectrum(spectrum: Tensor, width: int, max_degree: int) -> None:
    """Raise ``RecipeError`` unless a set of products can be chosen by these."""
    if spectrum.dim() != 1 or not len(spectrum) or not bool((spectrum.isfinite() & (spectrum >= 0)).all()):
        raise RecipeError("a factor by spectrum needs a spectrum (dim,) of finite numbers >= 0")
    if width < 1 or max_degree < 0:
        raise RecipeError(f"a factor by spectrum needs width >= 1 and max_degree >= 0, got {width} and {max_degree}")
