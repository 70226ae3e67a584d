"""Polynomial factors of the softmax kernel: ``exp(s) ~ p(s)``, written as an inner product of weighted monomials.

With the monomials ``phi(x) = (x^m)`` and the weights ``w_m = a_|m| |m|! / m!`` (multinomial theorem)

    p(q . k) = sum_j a_j (q . k)^j = phi(q)^T diag(w) phi(k),      C(d + g, g) of them for all degrees j <= g

(arXiv 2302.13214, 2406.03136). A monomial is its parent, one degree lower, times its largest variable, so each costs one
multiplication forward and two on the way back.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from rankloom.attention.contract import Factor
from rankloom.errors import RecipeError

__all__ = ["Anisotropic", "Isotropic", "exponential_series"]


def exponential_series(degree: int, coefficients: str = "taylor", radius: float | None = None) -> list[float]:
    """``a_0 .. a_g`` with ``exp(s) ~ sum_j a_j s^j``: Taylor's about 0, or the interpolant at the Chebyshev nodes of
    ``[-radius, radius]``, which is close to the best polynomial there.

    Raises ``RecipeError`` for an unknown name, a negative degree, or Chebyshev coefficients without a positive radius.
    """
    if degree < 0:
        raise RecipeError(f"a polynomial needs a degree >= 0, got {degree}")
    if coefficients == "taylor":
        return [1 / math.factorial(j) for j in range(degree + 1)]
    if coefficients != "chebyshev":
        raise RecipeError(f"coefficients are 'taylor' or 'chebyshev', got {coefficients!r}")
    if radius is None or not 0 < radius < math.inf:
        raise RecipeError(f"Chebyshev coefficients need the largest |logit| as a positive radius, got {radius}")
    fitted = Chebyshev.interpolate(np.exp, degree, domain=[-radius, radius])
    series = fitted.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef
    return [float(a) for a in series] + [0.0] * (degree + 1 - len(series))


def _multinomial(exponents: tuple[int, ...]) -> float:
    """``|m|! / m!``."""
    return math.factorial(sum(exponents)) / math.prod(math.factorial(e) for e in exponents)


class _Monomials(Factor):
    """What the polynomial factors share: a diagonal core."""

    _weights: Tensor

    def mix(self, state: Tensor) -> Tensor:
        return state * self._weights.to(state)[:, None]


class Isotropic(_Monomials):
    """All monomials up to a degree ``g``: ``p_g(q . k)`` exactly, width ``C(dim + g, g)``.

    Monomials of degree ``j`` are ordered by their largest variable ``i``: block ``(j, i)`` is ``x_i`` times the first
    ``C(i + j - 1, j - 1)`` monomials of degree ``j - 1``, so every step reads and writes contiguous rows.
    """

    def __init__(self, dim: int, degree: int, coefficients: str = "taylor", radius: float | None = None) -> None:
        self.dim, self.degree, self.coefficients, self.radius = dim, degree, coefficients, radius
        self.series = exponential_series(degree, coefficients, radius)
        self.width = math.comb(dim + degree, degree)
        self._starts = [math.comb(dim + j - 1, j - 1) if j else 0 for j in range(degree + 2)]
        level: list[tuple[int, ...]] = [()]
        weights = [self.series[0]]
        for j in range(1, degree + 1):
            level = [m + (i,) for i in range(dim) for m in level[: math.comb(i + j - 1, j - 1)]]
            weights += [self.series[j] * _multinomial(_exponents(m)) for m in level]
        self._weights = torch.tensor(weights, dtype=torch.float64)

    def features(self, x: Tensor) -> Tensor:
        phi = x.new_empty(self.width, x.shape[1])
        phi[0] = 1
        if self.degree:
            phi[1 : self.dim + 1] = x
        for j in range(2, self.degree + 1):
            below, row = phi[self._starts[j - 1] :], self._starts[j]
            for i in range(self.dim):
                count = math.comb(i + j - 1, j - 1)
                torch.mul(below[:count], x[i], out=phi[row : row + count])
                row += count
        return phi

    def pull_back(self, x: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        most = math.comb(self.dim + self.degree - 2, self.degree - 1) if self.degree > 1 else 0
        scratch = x.new_empty(most, x.shape[1])
        for j in range(self.degree, 1, -1):
            below, up, row = features[self._starts[j - 1] :], grad[self._starts[j - 1] :], self._starts[j]
            for i in range(self.dim):
                count = math.comb(i + j - 1, j - 1)
                block = grad[row : row + count]
                out[i] += torch.mul(block, below[:count], out=scratch[:count]).sum(0)
                up[:count].addcmul_(block, x[i])
                row += count
        return out.add_(grad[1 : self.dim + 1]) if self.degree else out

    def bound(self, radius: float) -> float:
        """An upper bound of ``|p(s) / exp(s) - 1|`` over ``|s| <= radius``; above the fitted radius infinite for Chebyshev.

        ``R^(g+1)/(g+1)! e^R`` for Taylor, by Lagrange's remainder on either side of 0; the interpolation error
        ``2 (R/2)^(g+1)/(g+1)! e^2R`` for Chebyshev. With ``eps`` the bound, outputs of attention are off by at most
        ``2 eps / (1 - eps) max |v|``.
        """
        g = self.degree + 1
        if self.coefficients == "taylor":
            return radius**g / math.factorial(g) * math.exp(radius)
        fitted = self.radius or 0.0
        return 2 * (fitted / 2) ** g / math.factorial(g) * math.exp(2 * fitted) if radius <= fitted else math.inf


def _exponents(variables: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(variables.count(i) for i in set(variables))


class _Level(NamedTuple):
    """The monomials of one degree: ``phi[rows] = phi[parents] * x[variables]``, variables ascending."""

    rows: slice
    parents: Tensor
    variables: Tensor
    runs: list[tuple[int, int, int]]
    """``(variable, first, last + 1)`` within the level."""


class Anisotropic(_Monomials):
    """The ``width`` monomials that matter most for clouds of covariance ``diag(spectrum)``, of degree at most ``max_degree``.

    For Gaussian coordinates the term of exponents ``m`` has the root mean square ``prod_i Sig_i^m_i (2 m_i - 1)!! / m_i!``.
    The set grows greedily from the constant by the largest such score, a monomial being reachable once its parent is in.
    The core holds Taylor's weights ``1 / m!``. As a cut set is no polynomial in ``q . k``, denominators can come out
    negative for large logits: check them.

    Raises ``RecipeError`` for a spectrum that is not a vector of finite non-negative numbers, or a width below 1.
    """

    def __init__(self, spectrum: Tensor, width: int, max_degree: int = 10) -> None:
        if spectrum.dim() != 1 or not len(spectrum) or not bool((spectrum.isfinite() & (spectrum >= 0)).all()):
            raise RecipeError("an anisotropic polynomial needs a spectrum (dim,) of finite numbers >= 0")
        if width < 1 or max_degree < 0:
            raise RecipeError(
                f"an anisotropic polynomial needs width >= 1 and max_degree >= 0, got {width}, {max_degree}"
            )
        self.dim = len(spectrum)
        chosen = _greedy(spectrum.double().tolist(), width, max_degree)
        self.width, self.degree = len(chosen), max(map(len, chosen))
        # By degree, then by largest variable: gradients of one variable are then sums over consecutive rows.
        chosen.sort(key=lambda m: (len(m), m[::-1]))
        row = {m: i for i, m in enumerate(chosen)}
        weights = [_multinomial(_exponents(m)) / math.factorial(len(m)) for m in chosen]
        self._weights = torch.tensor(weights, dtype=torch.float64)
        self._levels = [_level([m for m in chosen if len(m) == j], row) for j in range(1, self.degree + 1)]

    def features(self, x: Tensor) -> Tensor:
        phi = x.new_empty(self.width, x.shape[1])
        phi[0] = 1
        for rows, parents, variables, _ in self._levels:
            torch.index_select(phi[: rows.start], 0, parents.to(x.device), out=phi[rows])
            phi[rows] *= x.index_select(0, variables.to(x.device))
        return phi

    def pull_back(self, x: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for rows, parents, variables, runs in reversed(self._levels):
            parents = parents.to(x.device)
            block = grad[rows]
            product = features.index_select(0, parents).mul_(block)
            for i, first, last in runs:
                out[i] += product[first:last].sum(0)
            grad.index_add_(0, parents, torch.mul(block, x.index_select(0, variables.to(x.device)), out=product))
        return out


def _greedy(spectrum: list[float], width: int, max_degree: int) -> list[tuple[int, ...]]:
    """Monomials as ascending tuples of variables, the best first."""
    chosen: list[tuple[int, ...]] = []
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    while heap and len(chosen) < width:
        score, monomial = heapq.heappop(heap)
        chosen.append(monomial)
        if len(monomial) == max_degree:
            continue
        for i in range(monomial[-1] if monomial else 0, len(spectrum)):
            # (2m+1)!!/(m+1)! over (2m-1)!!/m!
            power = monomial.count(i)
            heapq.heappush(heap, (score * spectrum[i] * (2 * power + 1) / (power + 1), monomial + (i,)))
    return chosen


def _level(level: list[tuple[int, ...]], row: dict[tuple[int, ...], int]) -> _Level:
    variables = [m[-1] for m in level]
    starts = [n for n, i in enumerate(variables) if not n or variables[n - 1] != i]
    runs = [(variables[a], a, b) for a, b in zip(starts, [*starts[1:], len(level)], strict=True)]
    first = row[level[0]]
    parents = torch.tensor([row[m[:-1]] for m in level])
    return _Level(slice(first, first + len(level)), parents, torch.tensor(variables), runs)
