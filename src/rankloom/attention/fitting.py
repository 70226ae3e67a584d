"""From one training step's queries, keys, values and output gradient of a head to the cheapest approximation that may be used
for the steps after it, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import comb, inf, isfinite
from typing import Any

import torch
from torch import Tensor

from rankloom.attention.certificate import certify
from rankloom.attention.contract import Factor
from rankloom.attention.cost import CostModel, Kind
from rankloom.attention.factored import Factored
from rankloom.attention.mehler import Mehler
from rankloom.attention.nystrom import Nystrom
from rankloom.attention.polynomial import Anisotropic, Isotropic
from rankloom.attention.precondition import Preconditioner

__all__ = ["Fit", "Sample", "fit"]

_CUT: dict[Kind, type[Anisotropic] | type[Mehler]] = {"mehler": Mehler, "anisotropic": Anisotropic}
_WIDTHS = (64, 128, 256, 512, 1024)
_WIDEST = 8192
# Hopeless candidates are told apart on a thinned head and few rows, at a cost that does not grow with the length.
_SCREEN_TOKENS, _SCREEN_ROWS, _ROWS = 1024, 64, 256
_HOPELESS = 1.5  # times the threshold there


@dataclass(frozen=True)
class Sample:
    """One sequence of a head: ``q`` (g, L, d), ``k`` (L, d), ``v`` (L, d_v), and ``grad`` (g, L, d_v) where there is one."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor | None

    def thin(self, tokens: int) -> Sample:
        """About so many tokens at even distances; causality among them is that among all."""
        step = max(1, len(self.k) // tokens)
        grad = None if self.grad is None else self.grad[:, ::step]
        return Sample(self.q[:, ::step], self.k[::step], self.v[::step], grad)


@dataclass(frozen=True)
class Fit:
    """What a head does until its next refresh: use ``approximation`` from ``length`` tokens on, or attend exactly.

    ``error`` is the certified upper limit (of the rejected candidate that came closest, where all were rejected), ``seconds``
    the predicted time at the length fitted to.
    """

    reason: str
    approximation: Factored | None = None
    error: float = inf
    length: float = inf
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        """What the fit can be made from again, as tensors and plain values."""
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "approximation"}
        if self.approximation is not None:
            made = self.approximation
            constants = {f.name: getattr(made.preconditioner, f.name) for f in fields(Preconditioner)}
            plain |= {"preconditioner": constants, "factor": _description(made.factor), "causal": made.causal}
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
        preconditioner = Preconditioner(**constants)
        kind, size = state.pop("factor")
        factor = _build(kind, size.to(device) if isinstance(size, Tensor) else size, preconditioner)
        causal = state.pop("causal")
        return cls(approximation=Factored(preconditioner, factor, scale=preconditioner.scale, causal=causal), **state)


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
    flickering between two choices, a head whose last fit failed, and a factor cheaper than the one in use, must pass
    ``eps / hysteresis``; what is in use stays up to ``eps``.

    Raises :class:`~rankloom.errors.DataError` or :class:`~rankloom.errors.AttentionError` for samples that are not finite.
    """
    q, k = (
        torch.cat([rows.flatten(0, -2) for rows in both]) for both in zip(*((s.q, s.k) for s in samples), strict=True)
    )
    preconditioner = Preconditioner.fit(q, k, scale, generator=generator)
    keys = preconditioner.keys(k)
    length = max(len(sample.k) for sample in samples)
    closest = Fit("no factor is faster at this length")
    for seconds, kind, size, width in _candidates(len(preconditioner.spectrum), len(keys), length, cost):
        unchanged = before is None or (before.approximation is not None and seconds >= before.seconds)
        threshold = eps if unchanged else eps / hysteresis
        if kind == "nystrom":
            factor: Factor = Nystrom.fit(keys, size, generator=generator)
        else:
            factor = _build(kind, size, preconditioner)
        approximation = Factored(preconditioner, factor, scale=scale, causal=causal)
        error, _ = _errors(approximation, [samples[0].thin(_SCREEN_TOKENS)], _SCREEN_ROWS, generator)
        if error <= _HOPELESS * threshold:
            _, error = _errors(approximation, samples, _ROWS, generator)
        if error <= threshold:
            return Fit(f"{kind} {width}", approximation, error, cost.break_even(width, kind), seconds)
        if error < closest.error or closest.error == inf:
            closest = Fit("certificate", error=error)
    return closest


def _candidates(dim: int, keys: int, length: int, cost: CostModel) -> list[tuple[float, Kind, int, int]]:
    """Predicted seconds, kind, size (degree or width) and width of every factor worth its certificate, fastest first."""
    found: list[tuple[Kind, int, int]] = [("isotropic", g, comb(dim + g, g)) for g in range(1, 13)]
    found += [(kind, width, width) for kind in _CUT for width in _WIDTHS]
    found += [("nystrom", width, width) for width in _WIDTHS if 4 * width <= keys]
    timed = [
        (cost.approximate(length, width, kind), kind, size, width) for kind, size, width in found if width <= _WIDEST
    ]
    return sorted(candidate for candidate in timed if candidate[0] < cost.exact(length))


def _build(kind: Kind, size: int | Tensor, preconditioner: Preconditioner) -> Factor:
    """A factor by its degree, width or landmarks."""
    if isinstance(size, Tensor):
        return Nystrom(size)
    if kind in _CUT:
        return _CUT[kind](preconditioner.spectrum, size)
    return Isotropic(len(preconditioner.spectrum), size)


def _description(factor: Factor) -> tuple[Kind, int | Tensor]:
    """What :func:`_build` makes the same factor from."""
    if isinstance(factor, Nystrom):
        return "nystrom", factor.landmarks
    if isinstance(factor, Isotropic):
        return "isotropic", factor.degree
    return next(kind for kind, cut in _CUT.items() if isinstance(factor, cut)), factor.width


def _errors(
    approximation: Factored, samples: Sequence[Sample], rows: int, generator: torch.Generator | None
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
