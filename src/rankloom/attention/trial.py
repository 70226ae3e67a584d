"""Trial fits: which approximations reproduce a head's attention on real queries, keys and values, and how wrong they are.

Errors are relative Frobenius norms against exact attention on the same tokens, all rows, in float32: the output, and the worst
of dQ, dK, dV. That costs no more than the layers' own attention did when the tokens were captured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.attention.candidates import CANDIDATES, MOST_DEGREE, Kind, hopeless
from rankloom.attention.contract import Approximation
from rankloom.attention.polynomial import exponential_series
from rankloom.attention.precondition import Preconditioner

__all__ = ["NEEDS", "Errors", "Head", "Need", "Trial", "Trials", "errors", "least_degree"]

Need = Literal["output", "gradients"]
NEEDS: tuple[Need, ...] = ("output", "gradients")
_ROWS = 256


class Errors(NamedTuple):
    """Relative Frobenius errors: of the output, and the worst of dQ, dK, dV; infinite where a denominator is not positive."""

    output: float
    gradients: float

    def of(self, need: Need) -> float:
        """The error that counts: for ``"gradients"`` the worse of both, as training needs the output too."""
        return self.output if need == "output" else max(self)


@dataclass(frozen=True)
class Head:
    """``g`` query heads on one key head, on one text: ``q`` (g, L, d), ``k`` (L, d), ``v`` (L, d_v), ``grad`` (g, L, d_v)."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    scale: float
    causal: bool

    def first(self, length: int) -> Head:
        """The same head on the first ``length`` tokens."""
        q, k, v, grad = (x[..., :length, :] for x in (self.q, self.k, self.v, self.grad))
        return Head(q, k, v, grad, self.scale, self.causal)

    @cached_property
    def exact(self) -> list[Tensor]:
        """Exact attention's output, dQ, dK and dV."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # The keys and values have to be repeated: the grouped kernel of some devices falls back to a dense one.
            k, v = (x.expand(len(q), *x.shape)[None] for x in (k, v))
            return F.scaled_dot_product_attention(q[None], k, v, scale=self.scale, is_causal=self.causal)[0]

        return _with_gradients(attend, self.q, self.k, self.v, self.grad)


def errors(approximation: Approximation, head: Head) -> Errors:
    """How far ``approximation`` is from exact attention on ``head``."""
    positive: list[bool] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, denominators = approximation(q, k, v)
        positive.append(bool((denominators.isfinite() & (denominators > 0)).all()))
        return out

    got = _with_gradients(attend, head.q, head.k, head.v, head.grad)
    return _compare(got, head.exact) if all(positive) else Errors(inf, inf)


def least_degree(
    head: Head, preconditioner: Preconditioner, eps: float, most: int = MOST_DEGREE
) -> dict[Need, int | None]:
    """The least Taylor degree whose isotropic polynomial errs by at most ``eps``; ``None`` where ``most`` is not enough.

    From dense logits on 256 evenly spaced query rows in float64: the number of features, ``C(d + g, g)``, is not paid for.
    Found by bisection: errors fall with the degree, up to the parity of the leading term.
    """
    q, k, v, grad = (x.double() for x in (head.q, head.k, head.v, head.grad))
    length = k.shape[0]
    at = torch.linspace(0, length - 1, min(_ROWS, length), device=q.device).long()
    hidden = (torch.arange(length, device=q.device) > at[:, None]) & head.causal

    def attend(rows: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        return _with_gradients(lambda q, k, v: rows(q, k) @ v, q[:, at], k, v, grad[:, at])

    def exact(q: Tensor, k: Tensor) -> Tensor:
        return (head.scale * q @ k.mT).masked_fill(hidden, -inf).softmax(-1)

    def series(degree: int) -> Callable[[Tensor, Tensor], Tensor]:
        def rows(q: Tensor, k: Tensor) -> Tensor:
            logits = preconditioner.queries(q) @ preconditioner.keys(k).mT
            total = torch.zeros_like(logits)
            for coefficient in reversed(exponential_series(degree)):
                total = total * logits + coefficient
            weights = (total * preconditioner.log_weights(k).exp()).masked_fill(hidden, 0)
            return weights / weights.sum(-1, keepdim=True)

        return rows

    wanted, seen = attend(exact), dict[int, Errors]()

    def passes(degree: int, need: Need) -> bool:
        if degree not in seen:
            seen[degree] = _compare(attend(series(degree)), wanted)
        return seen[degree].of(need) <= eps

    def least(need: Need) -> int | None:
        found = bisect_left(range(1, most), True, key=lambda degree: passes(degree, need)) + 1
        return found if passes(found, need) else None

    return {"output": least("output"), "gradients": least("gradients")}


@dataclass(frozen=True)
class Trial:
    """A fitted approximation: its kind, number of features, degree where it is an isotropic polynomial, and worst errors."""

    kind: Kind
    width: int
    degree: int | None
    errors: Errors


class Trials:
    """Approximations fitted to the first of ``heads`` (one head on several texts) and judged on the others, by their worst error.

    With a single text the fit is judged on what it was fitted to. Each is tried once.
    """

    def __init__(self, heads: Sequence[Head], preconditioner: Preconditioner, eps: float, seed: int = 0) -> None:
        self.fitted, self.judged = heads[0], heads[1:] or heads[:1]
        self.preconditioner, self.eps, self.seed = preconditioner, eps, seed
        self._tried: dict[tuple[Kind, int], Trial] = {}

    def least(self, kind: Kind, need: Need, most: int, degree: int | None) -> Trial | None:
        """The narrowest approximation of ``kind`` with at most ``most`` features whose error is at most ``eps``.

        ``degree`` is what :func:`least_degree` found: the isotropic polynomial is tried from two below it on (causal chunks,
        inside which attention is exact, may save so much). Of the other kinds the widest is tried and every quarter of it,
        from narrow to wide, then half of the first that passes. The search ends early where the error, falling on as it did
        over the last two widths, would still be four times ``eps`` at the widest.
        """
        sizes = CANDIDATES[kind].sizes(self._dim, most, len(self.fitted.k))
        if kind == "isotropic":
            sizes = [] if degree is None else [size for size in sizes if size >= degree - 2]
            return next((trial for size in sizes if self._passes(trial := self._try(kind, size), need)), None)
        errors, last = list[float](), len(sizes) - 1
        for at in range(last % 2, len(sizes), 2):
            trial = self._try(kind, sizes[at])
            if self._passes(trial, need):
                half = self._try(kind, sizes[at - 1]) if at else trial
                return half if self._passes(half, need) else trial
            errors.append(trial.errors.of(need))
            if len(errors) > 1 and hopeless(errors[-2], errors[-1], (last - at) / 2, self.eps):
                break
        return None

    def _passes(self, trial: Trial, need: Need) -> bool:
        return trial.errors.of(need) <= self.eps

    def _try(self, kind: Kind, size: int) -> Trial:
        if (kind, size) not in self._tried:
            approximation = self.approximation(kind, size)
            found = [errors(approximation, head) for head in self.judged]
            worst = Errors(*(max(column) for column in zip(*found, strict=True)))
            degree = size if kind == "isotropic" else None
            self._tried[kind, size] = Trial(kind, CANDIDATES[kind].width(self._dim, size), degree, worst)
        return self._tried[kind, size]

    def approximation(self, kind: Kind, size: int) -> Approximation:
        """One of a kind: ``size`` is the degree of an isotropic polynomial, the number of features of the others."""
        candidates, generator = CANDIDATES[kind], torch.Generator().manual_seed(self.seed)
        choice = candidates.choose(size, self.preconditioner, self.fitted.k, generator)
        return candidates.build(choice, self.preconditioner, causal=self.fitted.causal)

    @property
    def _dim(self) -> int:
        return self.fitted.k.shape[1]


def _with_gradients(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out))]


def _compare(got: list[Tensor], wanted: list[Tensor]) -> Errors:
    output, *gradients = (_relative(x, y) for x, y in zip(got, wanted, strict=True))
    return Errors(output, max(gradients))


def _relative(got: Tensor, wanted: Tensor) -> float:
    """``|got - wanted| / |wanted|``; infinite where that is no number, 0 where both are 0."""
    difference, norm = float((got - wanted).norm()), float(wanted.norm())
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 and isfinite(difference) else inf
