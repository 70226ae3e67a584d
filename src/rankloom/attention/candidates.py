"""The approximations that the probe and training choose from, kind by kind: verdict, sizes, how one is made and made again.

A new kind is a class here and an entry in ``CANDIDATES``; the cost model times it, the probe tries it and training uses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import comb, inf
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankloom.attention.blocks import Windowed
from rankloom.attention.contract import Approximation, Factor
from rankloom.attention.factored import Factored
from rankloom.attention.heavy import heavy_threshold
from rankloom.attention.mehler import Mehler
from rankloom.attention.nystrom import Nystrom
from rankloom.attention.polynomial import Anisotropic, Isotropic
from rankloom.attention.precondition import Preconditioner

__all__ = ["CANDIDATES", "KINDS", "MOST_DEGREE", "MOST_FEATURES", "Candidates", "Kind", "Verdict", "hopeless"]

Kind = Literal["isotropic", "mehler", "anisotropic", "nystrom", "windowed"]
Verdict = Literal["polynomial", "low-rank", "exact"]

MOST_FEATURES = 4096
MOST_DEGREE = 32
_FEWEST = 64
_CUT_DEGREE = 10
_MOST_LANDMARKS = 1024  # choosing them costs the cube of their number
_WINDOW, _SINKS, _HEAVY = 256, 4, 0.02
_MOST_NEAR = 1024
_WINDOWS = 8  # that a text has to be long for a window to be tried on it
_NARROWEST = 16  # narrower windows would cost more calls than they are worth
_HOPELESS = 4.0


@dataclass(frozen=True)
class Candidates(ABC):
    """One kind of approximation in all its sizes, with the ``verdict`` on a head that it serves.

    A *size* is what the search goes through, a *choice* (plain values and tensors) what :meth:`build` needs beside the
    preconditioner to make the very same approximation again. ``share`` of the keys meet every query exactly, which is a
    term quadratic in the length.
    """

    verdict: ClassVar[Verdict]
    share: float = 0.0

    @abstractmethod
    def sizes(self, dim: int, most: int, tokens: int) -> list[int]:
        """For heads of ``dim`` fitted to ``tokens`` keys: ascending, of at most ``most`` features."""

    def width(self, dim: int, size: int) -> int:
        """The number of features."""
        return size

    def choose(
        self, size: int, preconditioner: Preconditioner, k: Tensor, generator: torch.Generator | None = None
    ) -> Any:
        """The choice of a size, fitted to the keys ``k`` (L, d)."""
        return size

    @abstractmethod
    def build(self, choice: Any, preconditioner: Preconditioner, *, causal: bool, step: int = 1) -> Approximation:
        """The approximation of a choice, on the preconditioner's device; for a sequence thinned to every ``step``-th token, what
        it would be on all of them."""


class _Plain(Candidates):
    """One factor for all pairs of query and key."""

    @abstractmethod
    def factor(self, choice: Any, spectrum: Tensor) -> Factor: ...

    def build(self, choice: Any, preconditioner: Preconditioner, *, causal: bool, step: int = 1) -> Approximation:
        factor = self.factor(choice, preconditioner.spectrum)
        return Factored(preconditioner, factor, scale=preconditioner.scale, causal=causal)


class _Degrees(_Plain):
    """A size is a degree."""

    verdict = "polynomial"

    def sizes(self, dim: int, most: int, tokens: int) -> list[int]:
        return [degree for degree in range(1, MOST_DEGREE + 1) if self.width(dim, degree) <= most]

    def width(self, dim: int, size: int) -> int:
        return comb(dim + size, size)

    def factor(self, choice: Any, spectrum: Tensor) -> Factor:
        return Isotropic(len(spectrum), choice)


@dataclass(frozen=True)
class _Cut(_Plain):
    """The leading terms of an expansion."""

    verdict = "polynomial"
    expansion: type[Mehler] | type[Anisotropic] = Mehler

    def sizes(self, dim: int, most: int, tokens: int) -> list[int]:
        return _halves(most, comb(dim + _CUT_DEGREE, dim))  # few variables make few terms

    def factor(self, choice: Any, spectrum: Tensor) -> Factor:
        return self.expansion(spectrum, choice, _CUT_DEGREE)


class _Landmarks(_Plain):
    """A choice is the landmarks."""

    verdict = "low-rank"

    def sizes(self, dim: int, most: int, tokens: int) -> list[int]:
        # More landmarks than half the tokens would reproduce these tokens and say nothing about others.
        return _halves(most, min(_MOST_LANDMARKS, tokens // 2))

    def choose(
        self, size: int, preconditioner: Preconditioner, k: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        return Nystrom.fit(preconditioner.keys(k), size, generator=generator).landmarks

    def factor(self, choice: Any, spectrum: Tensor) -> Factor:
        return Nystrom(choice.to(spectrum.device))


class _Near(Candidates):
    """A local window, the first tokens and the heaviest keys exact, Mehler's expansion for the rest."""

    verdict = "low-rank"

    def sizes(self, dim: int, most: int, tokens: int) -> list[int]:
        # A window over much of the tokens would reproduce these tokens and say nothing about longer texts.
        if tokens < _WINDOWS * _WINDOW:
            return []
        # Quarters, as near its limit each of them takes a full certificate to refuse.
        return CANDIDATES["mehler"].sizes(dim, min(most, _MOST_NEAR), tokens)[::-2][::-1]

    def choose(
        self, size: int, preconditioner: Preconditioner, k: Tensor, generator: torch.Generator | None = None
    ) -> tuple[int, float]:
        return size, heavy_threshold(preconditioner, k, self.share)

    def build(self, choice: Any, preconditioner: Preconditioner, *, causal: bool, step: int = 1) -> Approximation:
        width, heavy = choice
        factor = Mehler(preconditioner.spectrum, width, _CUT_DEGREE)
        scale, window = preconditioner.scale, max(_WINDOW // step, _NARROWEST) if causal else 0
        return Windowed(preconditioner, factor, scale=scale, causal=causal, window=window, sinks=_SINKS, heavy=heavy)


CANDIDATES: dict[Kind, Candidates] = {
    "isotropic": _Degrees(),
    "mehler": _Cut(expansion=Mehler),
    "anisotropic": _Cut(expansion=Anisotropic),
    "nystrom": _Landmarks(),
    "windowed": _Near(share=_HEAVY),
}
KINDS: tuple[Kind, ...] = tuple(CANDIDATES)


def hopeless(before: float, last: float, ahead: float, eps: float) -> bool:
    """Whether an error that went from ``before`` to ``last`` in one stride of sizes, falling on by that power law, would be
    four times ``eps`` still ``ahead`` strides further, where sizes end. One that did not fall is not expected to."""
    falls = min(1.0, last / before) if 0 < before < inf else 1.0
    return last * falls**ahead > _HOPELESS * eps


def _halves(most: int, available: int) -> list[int]:
    """The smaller of both, its half, its quarter and so on down to 64, ascending. All that is available where that is less
    than 64, but nothing for ``most`` below 64: so few features cost no less."""
    widest = min(most, available)
    steps = range(widest.bit_length() if most >= _FEWEST else 0)
    return [widest >> step for step in steps if step == 0 or widest >> step >= _FEWEST][::-1]
