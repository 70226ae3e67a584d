"""Which heads of a model may be approximated, at which length, and how far the others are from it (arXiv 2406.03136).

The paper's threshold speaks of growth rates in the worst case; a verdict here rests on measurements of this head on this text:
the cheapest factor that reaches ``eps`` in a trial fit, and the time it would take on this machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import comb
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.attention.candidates import CANDIDATES, KINDS, MOST_FEATURES, Verdict
from rankloom.attention.capture import Captured, capture
from rankloom.attention.cost import CostModel, calibrate
from rankloom.attention.precondition import Preconditioner
from rankloom.attention.report import HeadReport, Report
from rankloom.attention.trial import NEEDS, Head, Need, Trial, Trials, errors, least_degree
from rankloom.errors import AttentionError, DataError, RecipeError

__all__ = ["probe", "probe_head"]

_FEWEST_TOKENS = 64
_ENERGY = 0.99
_LOGITS_AT_ONCE = 2**22


def probe(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    lengths: Sequence[int],
    eps: float,
    name: str = "",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Probe every head of a transformers model as it runs, adapters included.

    Args:
        model: takes its attention from transformers' registry of attention functions; left as it was.
        batches: one sequence each, of one length, with ``labels`` where gradients should be those of the model's loss. The
            first is what factors are fitted to, the others what they are judged on; all are held in memory with every
            layer's queries, keys and values.
        lengths: the numbers of tokens verdicts are asked for.
        eps: relative Frobenius error allowed in the output and in each of dQ, dK, dV.
        name: of the model, for the report.
        progress: told about each layer.

    Query heads that share a key head are judged one by one; the cost is that of their group, were they all alike.

    Raises:
        TargetError: a model without that registry. DataError: no text, texts of several lengths or under 64 tokens, a loss
            that is not finite. AttentionError: queries, keys or values that are not. RecipeError: no length, a length below
            2, or ``eps`` not in (0, 1).
    """
    _check(lengths, eps)
    texts = [capture(model, batch) for batch in batches]
    if not texts:
        raise DataError("nothing to probe on: give at least one batch of one sequence")
    _check_tokens(texts[0][0].q.shape[1])
    if len({(len(calls), calls[0].q.shape[1]) for calls in texts}) > 1:
        raise DataError("the probed texts differ in length: cut them to one number of tokens")
    dtype = next(model.parameters()).dtype
    heads: list[HeadReport] = []
    for layer, calls in enumerate(zip(*texts, strict=True)):
        found = _layer(layer, calls, lengths, eps, dtype)
        heads += found
        if progress is not None:
            exact = sum(set(head.verdicts.values()) == {"exact"} for head in found)
            progress(f"layer {layer + 1}/{len(texts[0])}: {len(found)} heads, {exact} of them exact at every length")
    first = texts[0][0]
    config: Any = model.config
    return Report(
        heads=tuple(heads),
        lengths=tuple(lengths),
        eps=eps,
        model=name or type(model).__name__,
        tokens=first.q.shape[1],
        samples=len(texts),
        held_out=len(texts) > 1,
        loss=first.grad is not None,
        trained_length=getattr(config, "max_position_embeddings", None),
        machine=f"{first.q.device.type}, {torch.get_num_threads()} thread(s), {str(dtype).removeprefix('torch.')}",
    )


def probe_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    eps: float,
    lengths: Sequence[int],
    cost: CostModel,
    grad: Tensor | None = None,
    held_out: Sequence[Head] = (),
) -> HeadReport:
    """Probe one head: ``q`` (g, L, d) or (L, d), ``k`` (L, d), ``v`` (L, d_v), all query heads on the one key head together.

    ``grad`` like the output is its gradient (default: random), ``held_out`` the same head on other texts, to judge factors
    on. ``cost`` predicts seconds, for as many query heads a key head as it was calibrated for.

    Raises ``RecipeError`` for lengths or ``eps``, ``DataError`` for fewer than 64 tokens, ``AttentionError`` for shapes
    that do not match or queries and keys that are not finite.
    """
    _check(lengths, eps)
    q = q if q.dim() == 3 else q[None]
    _check_tokens(q.shape[1])
    if not q.shape[1] == len(k) == len(v):
        raise AttentionError(f"a head has as many queries as keys and values; got {q.shape[1]}, {len(k)} and {len(v)}")
    shape = (*q.shape[:2], v.shape[1])
    if grad is None:
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(q)
    head = Head(q.float(), k.float(), v.float(), grad.reshape(shape).float(), scale, causal)
    return _judge([head, *held_out], lengths, eps, cost)


def _layer(
    layer: int, calls: Sequence[Captured], lengths: Sequence[int], eps: float, dtype: torch.dtype
) -> list[HeadReport]:
    """Every query head of one layer, on every text."""
    first = calls[0]
    group = len(first.q) // len(first.k)
    cost = calibrate(
        first.q.shape[-1], first.v.shape[-1], group=group, causal=first.causal, device=first.q.device, dtype=dtype
    )
    generator = torch.Generator().manual_seed(layer)
    found = []
    for index in range(len(first.q)):
        heads = []
        for call in calls:
            q, k, v = call.q[index : index + 1], call.k[index // group], call.v[index // group]
            shape = (*q.shape[:2], v.shape[1])
            drawn = torch.randn(shape, generator=generator).to(q) if call.grad is None else call.grad[index : index + 1]
            heads.append(Head(q, k, v, drawn, call.scale, call.causal))
        report = _judge(heads, lengths, eps, cost, unsupported=first.unsupported)
        found.append(replace(report, layer=layer, name=first.name, head=index, group=index // group))
    return found


def _judge(
    heads: Sequence[Head], lengths: Sequence[int], eps: float, cost: CostModel, unsupported: str = ""
) -> HeadReport:
    """The report of one head on several texts: fitted to the first, judged on the others."""
    fitted, dim = heads[0], heads[0].k.shape[1]
    preconditioner = Preconditioner.fit(
        fitted.q.flatten(0, 1), fitted.k, fitted.scale, generator=torch.Generator().manual_seed(0)
    )
    energy = preconditioner.spectrum.double().square()
    degree: dict[Need, int | None] = dict.fromkeys(NEEDS)
    passing: dict[Need, list[Trial]] = {need: [] for need in NEEDS}
    drift = None
    if not unsupported:
        degree = least_degree(fitted, preconditioner, eps)
        trials = Trials(heads, preconditioner, eps)
        passing = {need: _passing(trials, need, max(lengths), cost, degree[need]) for need in NEEDS}
        drift = _drift(trials, passing["gradients"])
    break_even = {need: _least(cost.break_even(t.width, t.kind) for t in passing[need]) for need in NEEDS}
    verdicts = {need: {n: _verdict(passing[need], n, cost) for n in lengths} for need in NEEDS}
    return HeadReport(
        bounds={
            name: max(float(getattr(head, name[0]).abs().max()) for head in heads) for name in ("query", "key", "value")
        },
        logit_range=max(_logit_range(head, preconditioner) for head in heads),
        logit_std=float(energy.sum().sqrt()),
        spectrum=tuple(preconditioner.spectrum.tolist()),
        effective_dimension=int((energy.cumsum(0) < _ENERGY * energy.sum()).sum()) + 1,
        degree=degree,
        features={need: None if g is None else comb(dim + g, g) for need, g in degree.items()},
        cheapest={need: passing[need][-1] if passing[need] else None for need in NEEDS},
        break_even=break_even,
        drift=drift,
        verdicts=verdicts["gradients"],
        output_verdicts=verdicts["output"],
        reason=unsupported or _reason(verdicts["gradients"], break_even["gradients"], eps),
    )


def _passing(trials: Trials, need: Need, length: int, cost: CostModel, degree: int | None) -> list[Trial]:
    """The narrowest factor of each kind that reaches ``eps``, each cheaper at ``length`` than the ones before it.

    Only widths that could beat exact attention and what was found before are tried.
    """
    found: list[Trial] = []
    for kind in KINDS:
        within = cost.approximate(length, found[-1].width, found[-1].kind) if found else math.inf
        most = cost.widest(length, kind, most=MOST_FEATURES, within=within)
        trial = trials.least(kind, need, most, degree)
        if trial is not None:
            found.append(trial)
    return found


def _verdict(passing: Sequence[Trial], length: int, cost: CostModel) -> Verdict:
    best = min(passing, key=lambda t: cost.approximate(length, t.width, t.kind), default=None)
    if best is None or cost.approximate(length, best.width, best.kind) >= cost.worth(length):
        return "exact"
    return CANDIDATES[best.kind].verdict


def _reason(verdicts: Mapping[int, Verdict], break_even: float | None, eps: float) -> str:
    """Why a verdict is ``exact``, or nothing where none is."""
    if "exact" not in verdicts.values():
        return ""
    if break_even is None:
        return f"no factor that would be faster at {max(verdicts):,} tokens reaches {eps:g}"
    return f"exact attention is faster up to {break_even:,.0f} tokens"


def _drift(trials: Trials, passing: Sequence[Trial]) -> float | None:
    """The cheapest factor's gradient error on a whole text over the error on its first half."""
    if not passing or passing[-1].errors.gradients == 0:
        return None
    best, head = passing[-1], trials.judged[0]
    approximation = trials.approximation(best.kind, best.degree or best.width)
    half = errors(approximation, head.first(head.k.shape[0] // 2)).gradients
    return errors(approximation, head).gradients / half if 0 < half < math.inf else None


def _logit_range(head: Head, preconditioner: Preconditioner) -> float:
    """``max |q~ . k~|`` over the pairs the mask lets through, a few rows at a time."""
    queries, keys = preconditioner.queries(head.q).flatten(0, 1), preconditioner.keys(head.k)
    length, largest = len(keys), 0.0
    step = max(1, _LOGITS_AT_ONCE // length)
    for start in range(0, len(queries), step):
        logits = queries[start : start + step] @ keys.mT
        if head.causal:
            at = torch.arange(start, start + len(logits), device=keys.device) % length
            logits = logits.masked_fill(torch.arange(length, device=keys.device) > at[:, None], 0)
        largest = max(largest, float(logits.abs().max()))
    return largest


def _least(values: Iterable[float]) -> float | None:
    return min((value for value in values if math.isfinite(value)), default=None)


def _check(lengths: Sequence[int], eps: float) -> None:
    if not lengths or min(lengths) < 2:
        raise RecipeError(f"lengths are numbers of tokens from 2 on, got {list(lengths)}: as in 2048,32768")
    if not 0 < eps < 1:
        raise RecipeError(f"eps={eps} is no relative error: give one between 0 and 1, such as 1e-2")


def _check_tokens(count: int) -> None:
    if count < _FEWEST_TOKENS:
        raise DataError(f"a head is probed on at least {_FEWEST_TOKENS} tokens, got {count}: give longer text")
