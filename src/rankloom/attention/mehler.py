"""The factor that is best for Gaussian queries and keys: the softmax kernel's own singular functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankloom.attention.contract import Factor
from rankloom.attention.products import Products, best_monomials, check_spectrum, factorials

__all__ = ["Mehler"]

_LARGEST = 0.48  # of the effective variance; at 1/2 the kernel stops being square integrable, and rho reaches 1


class Mehler(Factor):
    """The ``width`` leading terms of Mehler's expansion of ``exp(q . k)``, for clouds of covariance ``diag(spectrum)``.

    In each coordinate, for any ``0 < rho < 1`` and with ``c^2 = (1 - rho^2) / rho``,

        exp(q k) = sqrt(1 - rho^2) sum_n rho^n / n! h_n(q) h_n(k),      h_n(x) = exp(rho x^2 / 2) He_n(c x).

    The ``h_n`` are orthogonal for a Gaussian of variance ``rho / (1 + rho^2)``: this is then a singular value decomposition,
    and no expansion of this width has a smaller mean square error. The error that counts is relative to a row's denominator,
    which is near ``exp(Sig q^2 / 2)`` and gives large queries less weight: ``rho`` is fitted to ``Sig / sqrt(1 + 2 Sig^2)``, the
    geometric mean of both sides' variances. Products over coordinates are kept by their singular value ``prod_i rho_i^m_i``.

    In one coordinate singular values fall like ``Sig^n`` where Taylor's terms fall like ``(2 Sig)^n``. Uniform and
    clustered clouds gain as Gaussian ones do; much heavier tails lose, as ``h_n`` grows like ``exp(rho x^2 / 2)``.
    As for every cut expansion, check the denominators.

    Raises ``RecipeError`` for a spectrum that is not a vector of finite non-negative numbers, or a width below 1.
    """

    def __init__(self, spectrum: Tensor, width: int, max_degree: int = 10) -> None:
        check_spectrum(spectrum, width, max_degree)
        variance = spectrum.double().clamp(min=1e-12)
        variance = (variance / (1 + 2 * variance.square()).sqrt()).clamp(max=_LARGEST)
        rho = 2 * variance / (1 + (1 - 4 * variance.square()).sqrt())
        self._rho, self._slope = rho[:, None], ((1 - rho.square()) / rho).sqrt()[:, None]
        self._products = Products(best_monomials([rho.tolist()] * max_degree, width), hermite=True)
        monomials = self._products.monomials
        self.dim, self.width, self.degree = len(spectrum), len(monomials), len(monomials[-1])
        first = float((1 - rho.square()).sqrt().prod())
        weights = [first * math.prod(float(rho[i]) for i in m) / factorials(m) for m in monomials]
        self._weights = torch.tensor(weights, dtype=torch.float64)[:, None]

    def features(self, x: Tensor) -> Tensor:
        return self._products.grow((self._rho.to(x) * x.square()).sum(0).div_(2).exp_(), self._slope.to(x) * x)

    def pull_back(self, x: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        slope = self._slope.to(x)
        out = self._products.pull_back(slope * x, features, grad).mul_(slope)
        return out.addcmul_(self._rho.to(x) * x, grad[0] * features[0])

    def mix(self, state: Tensor) -> Tensor:
        return state * self._weights.to(state)
