"""Polynomial factors of the softmax kernel: ``exp(s) ~ p(s)``, written as an inner product of weighted monomials.

With the monomials ``phi(x) = (x^m)`` and the weights ``w_m = a_|m| |m|! / m!`` (multinomial theorem)

    p(q . k) = sum_j a_j (q . k)^j = phi(q)^T diag(w) phi(k),      C(d + g, g) of them for all degrees j <= g

(arXiv 2302.13214, 2406.03136).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.attention.contract import Factor
from rankloom.attention.products import (
    Monomial,
    Products,
    all_monomials,
    best_monomials,
    check_spectrum,
    factorials,
)
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


class _Monomials(Factor):
    """What the polynomial factors share: plain products and a diagonal core."""

    def __init__(self, dim: int, monomials: Sequence[Monomial], series: Sequence[float]) -> None:
        self._products = Products(monomials)
        monomials = self._products.monomials
        self.dim, self.width, self.degree = dim, len(monomials), len(monomials[-1])
        weights = [series[len(m)] * math.factorial(len(m)) / factorials(m) for m in monomials]
        self._weights = torch.tensor(weights, dtype=torch.float64)[:, None]

    def features(self, x: Tensor) -> Tensor:
        return self._products.grow(1.0, x)

    def pull_back(self, x: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        return self._products.pull_back(x, features, grad)

    def mix(self, state: Tensor) -> Tensor:
        return state * self._weights.to(state)


class _Series(torch.autograd.Function):
    """``sum_j a_j s^j`` by Horner's rule, with its derivative alongside."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, series: Sequence[float]) -> Tensor:
        value, slope = torch.full_like(s, series[-1]), torch.zeros_like(s)
        for a in reversed(series[:-1]):
            if ctx.needs_input_grad[0]:
                slope.mul_(s).add_(value)
            value.mul_(s).add_(a)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class Isotropic(_Monomials):
    """All monomials up to a degree ``g``: ``p_g(q . k)`` exactly, width ``C(dim + g, g)``; see :func:`exponential_series`."""

    def __init__(self, dim: int, degree: int, coefficients: str = "taylor", radius: float | None = None) -> None:
        self.series = exponential_series(degree, coefficients, radius)
        self.coefficients, self.radius = coefficients, radius
        super().__init__(dim, all_monomials(dim, degree), self.series)

    def kernel(self, logits: Tensor) -> Tensor:
        """``p(logits)`` without features: what dense rows of attention need. Differentiable once."""
        value: Tensor = _Series.apply(logits, self.series)
        return value

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


class Anisotropic(_Monomials):
    """The ``width`` monomials that matter most for clouds of covariance ``diag(spectrum)``, of degree at most ``max_degree``.

    For Gaussian coordinates the term of exponents ``m`` has the root mean square ``prod_i Sig_i^m_i (2 m_i - 1)!! / m_i!``,
    by which they are chosen; the core holds Taylor's weights ``1 / m!``. As a cut set is no polynomial in ``q . k``,
    denominators can come out negative for large logits: check them.

    Raises ``RecipeError`` for a spectrum that is not a vector of finite non-negative numbers, or a width below 1.
    """

    def __init__(self, spectrum: Tensor, width: int, max_degree: int = 10) -> None:
        check_spectrum(spectrum, width, max_degree)
        ratios = [(spectrum.double() * (2 * n - 1) / n).tolist() for n in range(1, max_degree + 1)]
        chosen = best_monomials(ratios, width)
        super().__init__(len(spectrum), chosen, exponential_series(max_degree))
