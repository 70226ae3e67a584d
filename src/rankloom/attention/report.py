"""What a probe found: a report for every head and for the model, as JSON, and what changed between two of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import log, sqrt
from typing import Any

from rankloom.attention.candidates import Verdict
from rankloom.attention.trial import Errors, Need, Trial
from rankloom.errors import RecipeError

__all__ = ["VERDICTS", "Change", "Comparison", "HeadReport", "Report", "Verdict", "compare", "threshold"]

VERDICTS: tuple[Verdict, ...] = ("polynomial", "low-rank", "exact")


def threshold(length: int) -> float:
    """``sqrt(log L)``: entries of growth below it allow almost linear time, above it nothing sub-quadratic does in the worst
    case under SETH (arXiv 2406.03136). A rate, not a number to compare to within a constant."""
    return sqrt(log(length))


@dataclass(frozen=True)
class HeadReport:
    """One head. Mappings by need hold a value for ``output`` and for ``gradients``, ``None`` where nothing tried suffices.

    Attributes:
        bounds: ``max |entry|`` of ``query``, ``key`` and ``value``, as the softmax sees them.
        logit_range: ``R = max |S|`` of the centred logits over all visible pairs, and their standard deviation
            ``logit_std = sqrt(sum Sig_i^2)`` over all pairs.
        spectrum: ``Sig``, descending; ``effective_dimension`` of them hold 99 % of ``sum Sig_i^2``.
        degree: least degree of the isotropic Taylor polynomial that reaches ``eps``; ``features`` is its ``C(d + g, g)``.
        cheapest: the factor that reaches ``eps`` in the least time at the longest asked length.
        break_even: from how many tokens on it is faster than exact attention, by the cost model.
        drift: the cheapest factor's gradient error on the whole text over that on its first half; above 1, it grows with
            the length and longer texts than the probed one will err more.
        verdicts, output_verdicts: by length, where gradients have to reach ``eps``, and where only the output has to.
        reason: why a verdict is ``exact``.
    """

    bounds: dict[str, float]
    logit_range: float
    logit_std: float
    spectrum: tuple[float, ...]
    effective_dimension: int
    degree: dict[Need, int | None]
    features: dict[Need, int | None]
    cheapest: dict[Need, Trial | None]
    break_even: dict[Need, float | None]
    drift: float | None
    verdicts: dict[int, Verdict]
    output_verdicts: dict[int, Verdict]
    reason: str
    layer: int = 0
    name: str = ""
    head: int = 0
    group: int = 0

    @property
    def bound(self) -> float:
        """The largest entry of queries, keys and values, ``B``."""
        return max(self.bounds.values())

    def below(self, length: int) -> bool:
        """Whether ``B < sqrt(log L)``."""
        return self.bound < threshold(length)


@dataclass(frozen=True)
class Report:
    """Every head of a model, and what the figures rest on: ``tokens`` of each of ``samples`` texts.

    ``held_out`` says that factors were judged on other texts than they were fitted to, ``loss`` that the output's gradient is
    the model's own loss's, not random. ``trained_length`` is the longest text the model's configuration allows for.
    """

    heads: tuple[HeadReport, ...]
    lengths: tuple[int, ...]
    eps: float
    model: str
    tokens: int
    samples: int
    held_out: bool
    loss: bool
    trained_length: int | None
    machine: str

    def count(self, length: int, *, output: bool = False) -> dict[Verdict, int]:
        """How many heads have each verdict at ``length``."""
        found = Counter((head.output_verdicts if output else head.verdicts)[length] for head in self.heads)
        return {verdict: found[verdict] for verdict in VERDICTS}

    def notes(self) -> list[str]:
        """What a reader has to know about the figures, a sentence each."""
        gradient = "the model's own loss" if self.loss else "random numbers: the data has no labels for a loss"
        judged = "another text than they were fitted to" if self.held_out else "the text they were fitted to"
        said = [
            f"{self.samples} text(s) of {self.tokens} tokens; factors judged on {judged}; output gradients from {gradient}"
        ]
        if beyond := [length for length in self.lengths if length > self.tokens]:
            said.append(
                f"lengths {_listed(beyond)} are longer than the probed text: their times are predicted, their errors are those "
                f"measured at {self.tokens} tokens, which supposes that longer texts have the same queries and keys"
            )
        if drifting := [head for head in self.heads if (head.drift or 0) > 1.2]:
            said.append(
                f"{len(drifting)} of the approximated heads err more than 1.2 times as much on the whole text as on its first "
                "half: expect larger errors still beyond it"
            )
        if self.trained_length and max(self.lengths) > self.trained_length:
            said.append(f"the model is made for {self.trained_length} tokens at most")
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; :meth:`from_dict` reads it back."""
        return asdict(self) | {"notes": self.notes(), "counts": {length: self.count(length) for length in self.lengths}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """A report from :meth:`to_dict`. Raises ``RecipeError`` for anything else."""
        try:
            given = {field.name: data[field.name] for field in fields(cls)}
            heads = tuple(_head(head) for head in given.pop("heads"))
            return cls(heads=heads, **given | {"lengths": tuple(given["lengths"])})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecipeError(
                "not the report of a probe; write one with: rankloom limits probe --json > FILE"
            ) from error


@dataclass(frozen=True)
class Change:
    """One head before and after: the verdicts by length, its largest entry, logit range and standard deviation."""

    layer: int
    head: int
    verdicts: dict[int, tuple[Verdict, Verdict]]
    bound: tuple[float, float]
    logit_range: tuple[float, float]
    logit_std: tuple[float, float]

    def crossed(self, length: int) -> int:
        """+1 where the head's largest entry rose over ``sqrt(log L)``, -1 where it fell below, else 0."""
        before, after = (bound >= threshold(length) for bound in self.bound)
        return after - before


@dataclass(frozen=True)
class Comparison:
    """How far the heads moved between two probes."""

    changes: tuple[Change, ...]
    lengths: tuple[int, ...]

    def summary(self) -> dict[int, dict[str, int]]:
        """By length: heads that rose over and fell below ``sqrt(log L)``, and that lost and gained an approximation."""
        return {length: self._at(length) for length in self.lengths}

    def _at(self, length: int) -> dict[str, int]:
        crossed = [change.crossed(length) for change in self.changes]
        exact = [tuple(verdict == "exact" for verdict in change.verdicts[length]) for change in self.changes]
        return {
            "rose": crossed.count(1),
            "fell": crossed.count(-1),
            "lost": exact.count((False, True)),
            "gained": exact.count((True, False)),
        }


def compare(before: Report, after: Report) -> Comparison:
    """How a training run (or anything else) moved every head, from probes of the same model on the same terms.

    Raises ``RecipeError`` where the two differ in heads, lengths, ``eps`` or tokens.
    """
    for what in ("lengths", "eps", "tokens"):
        one, other = getattr(before, what), getattr(after, what)
        if one != other:
            raise RecipeError(f"the probes differ in {what} ({one} and {other}): probe both with the same settings")
    if [(h.layer, h.head) for h in before.heads] != [(h.layer, h.head) for h in after.heads]:
        raise RecipeError(f"the probes are of different models ({len(before.heads)} and {len(after.heads)} heads)")
    changes = [
        Change(
            a.layer,
            a.head,
            {length: (a.verdicts[length], b.verdicts[length]) for length in before.lengths},
            (a.bound, b.bound),
            (a.logit_range, b.logit_range),
            (a.logit_std, b.logit_std),
        )
        for a, b in zip(before.heads, after.heads, strict=True)
    ]
    return Comparison(tuple(changes), before.lengths)


def _head(data: Mapping[str, Any]) -> HeadReport:
    """JSON turned lengths into strings and tuples into lists."""
    cheapest = {
        need: None if trial is None else Trial(**{**trial, "errors": Errors(*trial["errors"])})
        for need, trial in data["cheapest"].items()
    }
    verdicts = {
        name: {int(key): value for key, value in data[name].items()} for name in ("verdicts", "output_verdicts")
    }
    return HeadReport(**{**data, "cheapest": cheapest, "spectrum": tuple(data["spectrum"]), **verdicts})


def _listed(lengths: list[int]) -> str:
    return ", ".join(f"{length:,}" for length in lengths)
