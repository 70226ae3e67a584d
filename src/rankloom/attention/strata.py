r"""Sums over many rows, and squared norms of such sums, from a few rows drawn in strata.

``N`` rows are ordered by falling difficulty: the top ``M/4`` are all taken, strata of ``3M/4``, ``3M`` and the remaining rows
give ``M/4`` samples each, in ``R`` replicates drawn independently with replacement, of ``m`` rows per stratum.
(Cochran, Sampling Techniques, chapter 5.) Keys are drawn in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["FEWEST", "Sample", "SumOfRows", "stratify", "sum_at_keys", "sum_of_rows", "total"]

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


def stratify(difficulties: Sequence[Tensor], rows: int, generator: torch.Generator | None = None) -> Sample:
    """About ``rows >= FEWEST`` of the rows, by the highest of their ranks in several ``difficulties`` (N,), as no single one
    finds all that are hard; all of them where there are no more than that."""
    count, each = len(difficulties[0]), rows // (4 * _REPLICATES)
    order = torch.arange(count, device=difficulties[0].device)
    if count <= rows:
        return Sample(order, order.new_empty(0, 0, 0), difficulties[0].new_empty(0))
    quarter = each * _REPLICATES
    ordered = min(16 * quarter, count)  # the order within the last stratum is of no matter
    ranks = torch.zeros_like(order)
    places = torch.arange(ordered, 0, -1, device=order.device)
    for difficulty in difficulties:
        leading = difficulty.topk(ordered).indices
        ranks[leading] = ranks[leading].maximum(places)
    order = ranks.argsort(descending=True)
    top, *strata = order.tensor_split([quarter, 4 * quarter, 16 * quarter])
    top = torch.cat([top, *(s for s in strata if len(s) <= quarter)])
    strata = [s for s in strata if len(s) > quarter]
    size = _REPLICATES, each
    drawn = [s[torch.randint(len(s), size, generator=generator).to(s.device)] for s in strata]
    return Sample(top, torch.stack(drawn, 1), torch.tensor([float(len(s)) for s in strata], device=order.device))


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
    """``D = sum_i D_i`` from replicates: their ``mean``, the trace of its ``variance``, and ``|D|^2`` with its upper limit.

    ``spread`` is the variance of ``squared_norm``, ``unseen`` what the limit keeps in reserve for terms that were not drawn.
    """

    mean: Tensor
    variance: float
    squared_norm: float
    spread: float
    unseen: float = 0.0

    @property
    def upper(self) -> float:
        return max(self.squared_norm, 0.0) + _STUDENT * math.sqrt(self.spread) + self.unseen


def sum_of_rows(cells: Tensor) -> SumOfRows:
    """What independent unbiased estimates of ``D`` say about it: ``cells`` (R, G, ...), ``D_rg`` from a sample ``r`` of rows and,
    where these are sums over keys too, a sample ``g`` of keys; ``R`` or ``G`` is 1 where all are taken.

    The squared norm of their mean is biased by its own variance, ``E |mean|^2 = |D|^2 + trace Var(mean)``. The products of cells
    that have neither rows nor keys in common are not,

        |D|^2 ~ sum_{r != s, g != h} <D_rg, D_sh> / (R (R - 1) G (G - 1)),

    a U-statistic; its variance comes from the jackknife over the samples of rows, and that over the samples of keys. Each errs
    upwards (Efron and Stein, 1981). The limit is 4.5 standard errors above.

    *How far above.* Where the ``D_i`` point in incoherent directions, ``|D|^2`` is near ``sum_i |D_i|^2``, or ``N s^2``, while
    a product of replicates varies by ``N^2 s^2 / (m sqrt(n))``, with ``n = (tr C)^2 / tr C^2`` the effective dimension of the
    ``D_i``, ``C`` their covariance. So the limit is about ``sqrt(1 + 10 N / (M sqrt(n)))`` times the truth: nine times for one
    row in 256 and ``n = 1000``. The cause is that ``M`` rows cannot tell such a sum from a coherent one of that size, whatever is
    made of them: in simulations, Hoeffding's unbiased variance and fewer standard errors tightened it by 10 to 25 %, and lost
    coverage for ``n`` near 1. Only more rows help, or rows that differ less. For sums over keys too, ``K`` of ``L`` sampled,
    the same holds with ``N L / (M K)`` where errors are as incoherent from key to key, as those of wide factors are.
    """
    counts, flat = cells.shape[:2], cells.flatten(2).flatten(0, 1)
    gram = (flat @ flat.mT).double().view(*counts, *counts)
    biased = float(gram.mean())
    for axis, count in enumerate(counts):
        if count > 1:
            gram.diagonal(dim1=axis, dim2=axis + 2).zero_()
    products, pairs = gram.sum((2, 3)), math.prod(count * max(count - 1, 1) for count in counts)
    squared, spread = products.sum() / pairs, 0.0
    for axis, count in enumerate(counts):
        if count > 1:
            leave_one_out = (products.sum() - 2 * products.sum(1 - axis)) * count / ((count - 2) * pairs)
            spread += (count - 1) * float(leave_one_out.var(correction=0))
    return SumOfRows(cells.mean((0, 1)), biased - float(squared), float(squared), spread)


def sum_at_keys(replicates: Tensor, keys: Sample) -> SumOfRows:
    """The same of a ``D`` with a row for every key, whose replicates (R, M, d) hold those of a sample of ``keys`` alone.

    The products of replicates are sums over keys, of which ``_stratified`` then gives the estimate, the variance that is added to
    the jackknife's (whose expectation is no smaller for a few keys than for all of them), and the reserve for skew.
    """
    products = keys.parts(_products(replicates))
    _, between, unseen = _stratified(keys, *products)
    weights = (keys.weights / max(len(keys.drawn), 1)).expand(keys.drawn.shape).flatten()
    weights = torch.cat([torch.ones_like(products[0]), weights.to(products[0])])
    found = sum_of_rows((replicates * weights.sqrt().to(replicates)[:, None])[:, None])
    return replace(found, spread=found.spread + between, unseen=unseen)


def _products(replicates: Tensor) -> Tensor:
    """Each key's part in the products of different replicates (R, M, d), or in the square of the only one: (M,)."""
    count, squares = len(replicates), replicates.square().sum((0, 2))
    return squares if count == 1 else (replicates.sum(0).square().sum(1) - squares) / (count * (count - 1))
