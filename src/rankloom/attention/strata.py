r"""Sums over many rows, and squared norms of such sums, from a few rows drawn in strata.

``N`` rows are ordered by falling ``difficulty``: the top ``M/4`` are all taken, strata of ``3M/4``, ``3M`` and the remaining rows
give ``M/4`` samples each, in ``R`` replicates drawn independently of each other (without replacement within one), of ``m`` rows
per stratum. (Cochran, Sampling Techniques, chapter 5.) Keys are drawn in the same way, in a single replicate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FEWEST", "Sample", "SumOfRows", "stratify", "sum_of_rows", "total"]

_REPLICATES = 8
FEWEST = 64  # two rows per stratum and replicate, and as many on top
_STANDARD_ERRORS = 3.0
_STUDENT = (
    4.5  # the same level as three normal ones, when the standard error itself comes from 8 replicates (7 degrees)
)
_UNSEEN = 2.0


@dataclass(frozen=True)
class Sample:
    """The rows ``top`` (n,), and ``drawn`` (R, H, m) from strata of ``sizes`` (H,): nothing where all rows are on top."""

    top: Tensor
    drawn: Tensor
    sizes: Tensor

    @property
    def weights(self) -> Tensor:
        """``N_h / m`` of each row of one replicate: (H, m)."""
        return (self.sizes / self.drawn.shape[2])[:, None].expand(self.drawn.shape[1:])

    @property
    def index(self) -> Tensor:
        """All rows, those drawn after those on top: (M,)."""
        return torch.cat([self.top, self.drawn.flatten()])

    def parts(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """``values`` (M,) of :attr:`index`, apart: (n,) and (R, H, m)."""
        top, drawn = values.tensor_split([len(self.top)])
        return top, drawn.view(self.drawn.shape)


def stratify(
    difficulty: Tensor, rows: int, generator: torch.Generator | None = None, *, replicates: int = _REPLICATES
) -> Sample:
    """About ``rows >= FEWEST`` of the rows ranked by ``difficulty`` (N,); all of them where there are no more than that."""
    count, each = len(difficulty), rows // (4 * replicates)
    order = difficulty.argsort(descending=True)
    if count <= rows:
        return Sample(order, order.new_empty(0, 0, 0), difficulty.new_empty(0))
    quarter = each * replicates
    top, *strata = order.tensor_split([quarter, 4 * quarter, 16 * quarter])
    top = torch.cat([top, *(s for s in strata if len(s) <= quarter)])
    strata = [s for s in strata if len(s) > quarter]

    def draw(stratum: Tensor) -> Tensor:
        return stratum[torch.randperm(len(stratum), generator=generator)[:each].to(stratum.device)]

    drawn = torch.stack([torch.stack([draw(s) for s in strata]) for _ in range(replicates)])
    return Sample(top, drawn, torch.tensor([float(len(s)) for s in strata], device=order.device))


def total(sample: Sample, top: Tensor, drawn: Tensor) -> tuple[float, float]:
    """``sum_i e_i`` and its upper limit, from ``e >= 0`` on the rows of ``sample.top`` and ``sample.drawn``.

    ``sum_top e_i + sum_h N_h mean_h(e)`` is unbiased, with variance ``sum_h N_h^2 var_h(e) / M_h``, ``M_h = R m``. The limit is
    three standard errors above, and two draws more like the largest of each stratum: few draws from a skewed stratum show
    too small a mean and too small a variance together.
    """
    estimate, variance, unseen = _stratified(sample, top, drawn)
    return estimate, estimate + _STANDARD_ERRORS * math.sqrt(variance) + unseen


def _stratified(sample: Sample, top: Tensor, drawn: Tensor) -> tuple[float, float, float]:
    """The estimate of :func:`total`, its variance, and what two more draws like the largest would add; for ``e`` of any sign."""
    whole = float(top.double().sum())
    if not len(sample.sizes):
        return whole, 0.0, 0.0
    per_stratum = drawn.double().transpose(0, 1).flatten(1)
    sizes, count = sample.sizes.double(), per_stratum.shape[1]
    variance = (sizes.square() * per_stratum.var(1) / count).sum()
    unseen = _UNSEEN * (sizes * per_stratum.amax(1).clamp(min=0) / count).sum()
    return whole + float((sizes * per_stratum.mean(1)).sum()), float(variance), float(unseen)


@dataclass(frozen=True)
class SumOfRows:
    """``D = sum_i D_i`` from replicates: their ``mean``, the trace of its ``variance``, and ``|D|^2`` with its upper limit."""

    mean: Tensor
    variance: float
    squared_norm: float
    upper: float


def sum_of_rows(replicates: Tensor, keys: Sample | None = None) -> SumOfRows:
    """What independent unbiased estimates ``D_r`` (R, ...) of ``D`` say about it.

    The squared norm of their mean is biased by its own variance, ``E |mean|^2 = |D|^2 + trace Var(mean)``. Subtracting the
    estimate of that leaves the products of different replicates, unbiased as the replicates are independent:

        |D|^2 ~ |mean|^2 - sum_r |D_r - mean|^2 / (R (R - 1))  =  sum_{r != s} <D_r, D_s> / (R (R - 1)),

    a U-statistic; its variance comes from the jackknife over replicates, which errs upwards (Efron and Stein, 1981). The limit
    is 4.5 standard errors above. A single replicate is ``D`` itself.

    *Some keys.* Where ``D`` has a row for every key, ``D_r`` (R, M, d) may hold those of the ``keys`` of a sample alone. The
    products are sums over keys, of which ``_stratified`` then gives the estimate, the variance that is added to the jackknife's
    (whose expectation is no smaller for a few keys than for all of them), and the reserve for skew.

    *How far above.* Where the ``D_i`` point in incoherent directions, ``|D|^2`` is near ``sum_i |D_i|^2``, or ``N s^2``, while
    a product of replicates varies by ``N^2 s^2 / (m sqrt(n))``, with ``n = (tr C)^2 / tr C^2`` the effective dimension of the
    ``D_i``, ``C`` their covariance. So the limit is about ``sqrt(1 + 10 N / (M sqrt(n)))`` times the truth: nine times for one
    row in 256 and ``n = 1000``. The cause is that ``M`` rows cannot tell such a sum from a coherent one of that size, whatever is
    made of them: in simulations, Hoeffding's unbiased variance and fewer standard errors tightened it by 10 to 25 %, and lost
    coverage for ``n`` near 1. Only more rows help, or rows that differ less.
    """
    count, mean = len(replicates), replicates.mean(0)
    between = unseen = 0.0
    if keys is not None and len(keys.sizes):
        parts = keys.parts(_products(replicates))
        _, between, unseen = _stratified(keys, *parts)
        weights = torch.cat([torch.ones_like(parts[0]), keys.weights.flatten().to(parts[0])])
        replicates = replicates * weights.sqrt().to(replicates)[:, None]
    flat = replicates.flatten(1)
    gram = (flat @ flat.mT).double()
    if count == 1:
        return SumOfRows(mean, 0.0, float(gram), float(gram) + _STUDENT * math.sqrt(between) + unseen)
    across = gram.sum(1) - gram.diagonal()
    estimate = across.sum() / (count * (count - 1))
    leave_one_out = (across.sum() - 2 * across) / ((count - 1) * (count - 2))
    jackknife = (count - 1) * leave_one_out.var(correction=0)
    variance = (gram.diagonal().mean() - estimate) / count
    upper = estimate.clamp(min=0) + _STUDENT * (jackknife + between).sqrt() + unseen
    return SumOfRows(mean, float(variance), float(estimate), float(upper))


def _products(replicates: Tensor) -> Tensor:
    """Each key's part in the products of different replicates (R, M, d), or in the square of the only one: (M,)."""
    count, squares = len(replicates), replicates.square().sum((0, 2))
    return squares if count == 1 else (replicates.sum(0).square().sum(1) - squares) / (count * (count - 1))
