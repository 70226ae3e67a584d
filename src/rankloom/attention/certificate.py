r"""How wrong an approximate attention head is, measured on a few of its query rows.

Everything a head gives, forward and backward, is a sum over its ``N = g L`` query rows, and a row costs ``O(L d)`` to compute
exactly. So the error of the whole head follows from a few rows; but not from uniform ones, which miss the few large rows that
most of the error is in. :mod:`rankloom.attention.strata` draws them by ``approximation.difficulty``.

**Per row** (the output, dQ): the squared error is a sum of the rows' own, estimated by stratified means.

**Summed over rows** (dK, dV and all adapter factors): the error is ``D = sum_i D_i``, ``D_i`` being what row ``i`` adds to the
exact gradient less what it adds to the approximate one, at the same output gradient. ``|D|^2`` is estimated without bias from
products of independent replicates of the sample (:func:`rankloom.attention.strata.sum_of_rows`). dK and dV have a row for every
key, and such products are sums over keys: some of these, drawn in strata like the rows, say as much about them as all do, and
the features of wide factors are formed for no others.

The gradients of the factors of K and V are sums over keys once more, ``dA = s sum_j (dK_j B)^T x_j``. With replicates of
the keys too, products of estimates that share neither rows nor keys remain unbiased. Here a sample of keys does say less than
all of them; rows are cheap beside keys, whose features are what a wide factor's certificate costs, so more of these are taken.

Errors are relative to the approximate tensor, which is known exactly; as ``|exact| >= |approximate| - error``, an absolute
limit ``u`` is the relative limit ``u / (|approximate| - u)``, infinite where the approximate tensor is no larger than its error.
No limit is below the rounding of the tensors' own sums.

**Control variate**: ``approximate + mean D_r`` is unbiased for the exact gradient, with the sampling variance of the mean as
its squared error. It is offered where that is below the estimate of ``|D|^2``. (The choice rests on the same rows, so exactly
unbiased is only the estimator that always adds it.)

Setting: arXiv 2406.03136.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rankloom.attention.contract import Approximation
from rankloom.attention.projection import Projection
from rankloom.attention.rows import Rows
from rankloom.attention.strata import FEWEST, Sample, SumOfRows, stratify, sum_at_keys, sum_of_rows, total
from rankloom.errors import AttentionError

__all__ = ["KEYS", "Certificate", "Estimate", "certify"]

_ROWS, _SHARE = 256, 256  # by default one row in so many, and no more than 256
_FACTOR_ROWS, _FACTOR_SHARE = 384, 64  # the same for gradients of factors, where errors of all rows and keys may add up
KEYS = 2304
"""At which dK and dV are compared."""
ROUNDINGS = 8
"""No limit is below so many units of rounding: about 1e-6 in float32."""


@dataclass(frozen=True)
class Estimate:
    """A relative Frobenius error and its upper limit; for gradients that are sums over rows, also what would correct them.

    ``correction`` is to be added to the approximate gradient, and ``residual`` is the relative error expected after that. Both
    are None where it would not help, for dK and dV at some keys, and for dQ, each row of which is one row's alone.
    """

    error: float
    upper: float
    correction: Tensor | None = None
    residual: float | None = None


@dataclass(frozen=True)
class Certificate:
    """Estimates of the relative error of a head's output and of its gradients, and the number of exact rows behind them.

    ``gradients`` has the keys ``dQ, dK, dV``, or ``dA_q, dB_q, ...`` of the projections given. A failed certificate says why in
    ``reason``; its error is infinite and it has no gradients.
    """

    error: float
    upper: float
    gradients: dict[str, Estimate] = field(default_factory=dict)
    rows: int = 0
    reason: str | None = None

    def passes(self, eps: float, gradient_eps: float | None = None) -> bool:
        """Whether the output's limit is at most ``eps``, and every gradient's at most ``gradient_eps`` (or else ``eps``)."""
        bound = eps if gradient_eps is None else gradient_eps
        return self.upper <= eps and all(estimate.upper <= bound for estimate in self.gradients.values())


def certify(
    approximation: Approximation,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor | None = None,
    denominators: Tensor | None = None,
    grad: Tensor | None = None,
    gradients: tuple[Tensor, Tensor, Tensor] | None = None,
    projections: Mapping[str, Projection] | None = None,
    rows: int | None = None,
    keys: int | None = None,
    generator: torch.Generator | None = None,
) -> Certificate:
    """The error of ``approximation`` on ``q`` (g, L, d), ``k`` (L, d), ``v`` (L, d_v), against exact attention.

    ``out`` and ``denominators`` are what ``approximation(q, k, v)`` returned, ``gradients`` (dQ, dK, dV) what it gave back for
    ``grad`` (g, L, d_v); what is not given is computed. With ``grad`` the gradients are estimated as well: dQ, dK, dV, or with
    ``projections`` for any of ``q, k, v`` the ``dA_n`` and ``dB_n`` of those.

    ``rows`` are by default ``g L / 256``, at least 64 and at most 256, with ``projections`` ``g L / 64`` and at most 384; a head
    that has no more than ``rows`` is computed exactly. dK and dV are compared at ``keys`` of the keys, by default 2304;
    ``keys=L`` for a ``correction`` of them.
    Half precision is certified in float32. Time ``O(rows L d)`` plus the approximation's own dense rows, for which a factor whose
    kernel is no function of the logits forms its features of the compared keys, and pulls nine gradients back through them:
    ``O((rows + 9) keys width)``. Memory ``O(2^21 + 4096 width + (18 keys + L) (d + d_v))``, and the projections' inputs.

    The certificate fails, with a reason, where a denominator is not positive or anything is not finite. Raises
    :class:`AttentionError` for shapes that do not fit, ``q, k, v, grad`` that are not finite, ``out`` without ``denominators``,
    or fewer than 64 ``rows`` or ``keys``.
    """
    _check(q, k, v, grad, projections, rows, keys)
    q, k, v = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
    if out is None or (grad is not None and gradients is None):
        out, denominators, gradients = _run(approximation, q, k, v, grad)
    if denominators is None:
        raise AttentionError(
            "a certificate of an output needs its denominators too: pass both as the approximation returned them"
        )
    known = {"output": out.detach()}
    if grad is not None and gradients is not None:
        grad = grad.detach().to(q.dtype)
        known |= {name: t.detach().to(q.dtype) for name, t in zip(("dQ", "dK", "dV"), gradients, strict=True)}
    if reason := _invalid(known, denominators):
        return Certificate(math.inf, math.inf, reason=reason)

    count = q.shape[0] * q.shape[1]
    most, share = (_FACTOR_ROWS, _FACTOR_SHARE) if projections else (_ROWS, _SHARE)
    sample = stratify(_difficulties(approximation, q, grad), rows or max(FEWEST, min(most, count // share)), generator)
    compared = _compared(k, known, keys or KEYS, generator)
    positions, place = compared.index.unique(return_inverse=True)
    made = known | {"denominators": denominators.detach().to(q.dtype)}
    linears = {n: p.to(q.dtype) for n, p in (projections or {}).items()}
    head = Rows(approximation, q, k, v, made, grad, linears.get("q"), positions)
    estimates = _estimates(head, sample, compared, place, known, linears)
    if bad := [name for name, estimate in estimates.items() if math.isnan(estimate.error)]:
        return Certificate(math.inf, math.inf, reason=f"exact or approximate rows are not finite in {', '.join(bad)}")
    output = estimates.pop("output")
    return Certificate(output.error, output.upper, estimates, len(sample.index))


def _run(
    approximation: Approximation, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """The output, the denominators and, with ``grad``, the gradients."""
    inputs = [t.clone().requires_grad_(grad is not None) for t in (q, k, v)]
    with torch.set_grad_enabled(grad is not None):
        out, denominators = approximation(*inputs)
    if grad is None:
        return out, denominators, None
    dq, dk, dv = torch.autograd.grad(out, inputs, grad.to(out.dtype))
    return out, denominators, (dq, dk, dv)


def _estimates(
    head: Rows,
    sample: Sample,
    compared: Sample,
    place: Tensor,
    known: dict[str, Tensor],
    projections: Mapping[str, Projection],
) -> dict[str, Estimate]:
    """Of everything, from the rows of the sample; ``place`` is where the head has the compared keys."""
    weights = [torch.ones_like(sample.top, dtype=head.k.dtype)]
    weights += [sample.weights.flatten().to(head.k.dtype)] * len(sample.drawn)
    (top, sums), *rest = head.differences([sample.top, *sample.drawn.flatten(1)], weights)
    drawn = {n: torch.cat([t, *(squares[n] for squares, _ in rest)]) for n, t in top.items()}
    replicates = {n: t + torch.stack([s[n] for _, s in rest]) if rest else t[None] for n, t in sums.items()}
    found = {n: _relative(known[n], *total(sample, *sample.parts(t))) for n, t in drawn.items()}
    for n in ("dK", "dV") if replicates else ():
        replicates[n] = replicates[n][:, place]
    if replicates and projections:
        del found["dQ"]
        return found | _of_factors(projections, known, replicates, compared)
    return found | {n: _of_keys(known[n], t, compared) for n, t in replicates.items()}


def _of_keys(approximate: Tensor, replicates: Tensor, keys: Sample) -> Estimate:
    """Of what has a row for every key, from the replicates' rows (R, M, d) at some keys."""
    if not len(keys.sizes):
        return _corrected(approximate, sum_of_rows(replicates[:, None]))
    found = sum_at_keys(replicates, keys)
    return _relative(approximate, found.squared_norm, found.upper)


def _of_factors(
    projections: Mapping[str, Projection], known: Mapping[str, Tensor], replicates: Mapping[str, Tensor], keys: Sample
) -> dict[str, Estimate]:
    """Of ``dA_n`` and ``dB_n``."""
    found: dict[str, Estimate] = {}
    for n, projection in projections.items():
        names, whole = (f"dA_{n}", f"dB_{n}"), f"d{n.upper()}"
        if n == "q":
            approximate, cells = projection.gradients(known[whole]), [replicates[name][:, None] for name in names]
        else:
            approximate, cells = projection.gradients(known[whole][None]), _cells(projection, replicates[whole], keys)
        each = zip(names, approximate, cells, strict=True)
        found |= {name: _corrected(tensor, sum_of_rows(drawn)) for name, tensor, drawn in each}
    return found


def _cells(projection: Projection, replicates: Tensor, keys: Sample) -> list[Tensor]:
    """Both factors' gradients (R, G, ...) from every replicate (R, M, d) at the keys, by every sample ``g`` of these."""
    top, *drawn = replicates[:, None].split([len(keys.top)] + [keys.weights.numel()] * len(keys.drawn), 2)
    found = [projection.gradients(top, keys.top)]
    weights = keys.weights.flatten().to(top)[:, None]
    found += [projection.gradients(t * weights, at.flatten()) for t, at in zip(drawn, keys.drawn, strict=True)]
    stacked = (torch.stack(each, 1) for each in zip(*found, strict=True))
    return [t[:, :1] + t[:, 1:] if drawn else t for t in stacked]


def _difficulties(approximation: Approximation, q: Tensor, grad: Tensor | None) -> list[Tensor]:
    """What grows with the rows' expected errors, in several ways.

    Early causal rows average few keys, so that errors fall as ``(i + 1)^-1/2`` unless a row attends to few keys anyway. With
    ``grad`` a row counts in the gradients by its norm.
    """
    scores = [approximation.difficulty(q)]
    if approximation.causal:
        scores.append(scores[0] * torch.arange(1, q.shape[1] + 1, device=q.device).rsqrt())
    if grad is not None:
        scores.append(scores[-1] * grad.norm(dim=-1))
    return [score.flatten() for score in scores]


def _compared(k: Tensor, known: Mapping[str, Tensor], keys: int, generator: torch.Generator | None) -> Sample:
    """Some keys: above all those with large gradients, or far from the mean, where kernels are hard to approximate."""
    if len(k) <= keys or "dK" not in known:
        every = torch.arange(len(k), device=k.device)
        return Sample(every, every.new_empty(0, 0, 0), k.new_empty(0))
    return stratify([t.norm(dim=-1) for t in (k - k.mean(0), known["dK"], known["dV"])], keys, generator)


def _relative(approximate: Tensor, squared: float, squared_upper: float) -> Estimate:
    norm = float(torch.linalg.vector_norm(approximate, dtype=torch.float64))
    upper = math.sqrt(squared_upper)
    if norm == 0.0:
        return Estimate(0.0, 0.0) if upper == 0.0 else Estimate(math.inf, math.inf)
    limit = upper / (norm - upper) if upper < norm else math.inf
    # Both tensors carry the rounding of their own sums, which rows formed apart do not show.
    return Estimate(math.sqrt(max(squared, 0.0)) / norm, max(limit, ROUNDINGS * torch.finfo(approximate.dtype).eps))


def _corrected(approximate: Tensor, found: SumOfRows) -> Estimate:
    plain = _relative(approximate, found.squared_norm, found.upper)
    if not found.squared_norm > found.variance:
        return plain
    norm = float(torch.linalg.vector_norm(approximate, dtype=torch.float64))
    return replace(plain, correction=found.mean, residual=math.sqrt(max(found.variance, 0.0)) / norm)


def _invalid(known: Mapping[str, Tensor], denominators: Tensor) -> str | None:
    if bad := int((~((denominators > 0) & denominators.isfinite())).sum()):
        return f"{bad} of {denominators.numel()} denominators are not positive and finite: the logits are out of range"
    return next((f"the approximate {name} is not finite" for name, t in known.items() if not _finite(t)), None)


def _finite(t: Tensor) -> bool:
    """In one pass over ``t``; a NaN is the smallest and the largest entry at once."""
    return all(bool(end.isfinite()) for end in torch.aminmax(t))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor | None,
    projections: Mapping[str, Projection] | None,
    rows: int | None,
    keys: int | None,
) -> None:
    if q.ndim != 3 or k.shape != q.shape[1:] or v.ndim != 2 or len(v) != len(k):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise AttentionError(f"a certificate takes q (g, L, d), k (L, d) and v (L, d_v) of one length, not {shapes}")
    if grad is not None and grad.shape != (*q.shape[:2], v.shape[1]):
        raise AttentionError(f"the output's gradient is {(*q.shape[:2], v.shape[1])}, not {tuple(grad.shape)}")
    if unknown := set(projections or ()) - {"q", "k", "v"}:
        raise AttentionError(f"projections are named q, k and v, not {', '.join(sorted(unknown))}")
    for name, count in {"rows": rows, "keys": keys}.items():
        if count is not None and count < FEWEST:
            raise AttentionError(f"a certificate needs at least {FEWEST} {name}, not {count}")
    for name, t in {"q": q, "k": k, "v": v, "grad": grad}.items():
        if t is not None and not _finite(t):
            raise AttentionError(f"{name} is not finite: look for what made it so before asking for its attention")
