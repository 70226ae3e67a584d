"""From one training step's queries, keys, values and output gradient of a head to the cheapest approximation that may be used
for the steps after it, or the reason why there is none."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from rankloom.attention.candidates import CANDIDATES, Kind, hopeless
from rankloom.attention.certificate import certify
from rankloom.attention.contract import Approximation
from rankloom.attention.cost import CostModel
from rankloom.attention.precondition import Preconditioner
from rankloom.attention.search import ROWS, SCREEN_ROWS, candidates, certificate_seconds, screen_seconds, screen_step

__all__ = ["Fit", "Sample", "fit"]

_HOPELESS, _LOOSE = 1.5, 4.0  # times the threshold, in a screen: the estimate, and its upper limit


@dataclass(frozen=True)
class Sample:
    """One sequence of a head: ``q`` (g, L, d), ``k`` (L, d), ``v`` (L, d_v), and ``grad`` (g, L, d_v) where there is one."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor | None

    def thin(self, step: int) -> Sample:
        """Every ``step``-th token; causality among them is that among all."""
        grad = None if self.grad is None else self.grad[:, ::step]
        return Sample(self.q[:, ::step], self.k[::step], self.v[::step], grad)


@dataclass(frozen=True)
class Fit:
    """What a head does until its next refresh: use ``approximation`` from ``length`` tokens on, or attend exactly.

    ``error`` is the certified upper limit (of the rejected candidate that came closest, where all were rejected), ``seconds``
    the predicted time at the length fitted to, ``choice`` the kind and what it is built from again. ``spent`` are the predicted
    seconds of everything that was tried to find it.
    """

    reason: str
    approximation: Approximation | None = None
    error: float = inf
    length: float = inf
    seconds: float = 0.0
    choice: tuple[Kind, Any] | None = None
    spent: float = 0.0

    def state(self) -> dict[str, Any]:
        """What the fit can be made from again, as tensors and plain values."""
        plain = {name: getattr(self, name) for name in ("reason", "error", "length", "seconds")}
        if self.approximation is not None:
            made = self.approximation
            constants = {f.name: getattr(made.preconditioner, f.name) for f in fields(Preconditioner)}
            plain |= {"preconditioner": constants, "factor": self.choice, "causal": made.causal}
        return plain

    @classmethod
    def restore(cls, state: dict[str, Any], device: torch.device) -> Fit:
        """The inverse of :meth:`state`."""
        state = dict(state)
        if "factor" not in state:
            return cls(**state)
        constants: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in state.pop("preconditioner").items()
        }
        kind, choice = state.pop("factor")
        made = CANDIDATES[kind].build(choice, Preconditioner(**constants), causal=state.pop("causal"))
        return cls(approximation=made, choice=(kind, choice), **state)


def fit(
    samples: Sequence[Sample],
    *,
    scale: float,
    causal: bool,
    eps: float,
    cost: CostModel,
    before: Fit | None = None,
    hysteresis: float = 2.0,
    generator: torch.Generator | None = None,
) -> Fit:
    """The first candidate, by predicted time, that is faster than exact attention and whose certificate passes.

    The upper limits of the output's and of every gradient's relative error must be at most ``eps``. To keep a head from
    flickering between two choices, a head whose last fit failed, and a candidate cheaper than the one in use, must pass
    ``eps / hysteresis``; what is in use stays up to ``eps``. A kind is given up where its error does not fall fast enough.

    Raises :class:`~rankloom.errors.AttentionError` for samples that are not finite.
    """
    q, k = (
        torch.cat([rows.flatten(0, -2) for rows in both]) for both in zip(*((s.q, s.k) for s in samples), strict=True)
    )
    preconditioner = Preconditioner.fit(q, k, scale, generator=generator)
    step, dim = screen_step(len(samples[0].k)), k.shape[1]
    screen, seen = samples[0].thin(step), defaultdict[Kind, list[float]](list)
    closest = Fit("no factor is faster at this length")
    lengths, spent = [len(sample.k) for sample in samples], 0.0
    worthwhile = candidates(cost, dim, lengths)
    ahead, dropped = Counter(candidate.kind for candidate in worthwhile), set[Kind]()
    for seconds, kind, size, width in worthwhile:
        ahead[kind] -= 1
        if kind in dropped:
            continue
        unchanged = before is None or (before.approximation is not None and seconds >= before.seconds)
        threshold = eps if unchanged else eps / hysteresis
        choice = CANDIDATES[kind].choose(size, preconditioner, k, generator)
        build = partial(CANDIDATES[kind].build, choice, preconditioner, causal=causal)
        error, upper = _errors(build(step=step), [screen], SCREEN_ROWS, generator)
        spent += screen_seconds(cost, lengths[0], width, kind)
        seen[kind].append(error)
        if len(seen[kind]) > 2 and hopeless(seen[kind][-3], error, ahead[kind] / 2, threshold):
            dropped.add(kind)
        if error <= _HOPELESS * threshold and upper <= _LOOSE * threshold:
            approximation = build()
            _, error = _errors(approximation, samples, ROWS, generator)
            spent += sum(certificate_seconds(cost, n, width, kind) for n in lengths)
            if error <= threshold:
                length = cost.break_even(width, kind)
                return Fit(f"{kind} {width}", approximation, error, length, seconds, (kind, choice), spent)
        if error < closest.error or closest.error == inf:
            closest = Fit("certificate", error=error)
    return replace(closest, spent=spent)


def _errors(
    approximation: Approximation, samples: Sequence[Sample], rows: int, generator: torch.Generator | None
) -> tuple[float, float]:
    """The largest estimate and the largest upper limit over samples, output and gradients."""
    found = [(0.0, 0.0)]
    for s in samples:
        certificate = certify(approximation, s.q, s.k, s.v, grad=s.grad, rows=rows, generator=generator)
        found.append((certificate.error, certificate.upper))
        found += [(estimate.error, estimate.upper) for estimate in certificate.gradients.values()]
    # A NaN would compare as anything.
    estimate, upper = (max(e if isfinite(e) else inf for e in column) for column in zip(*found, strict=True))
    return estimate, upper
