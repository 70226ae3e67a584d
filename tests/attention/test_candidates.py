"""Every kind of candidate: its sizes are what it says, and a choice makes the same approximation again."""

from __future__ import annotations

import io
from itertools import pairwise
from math import comb, inf

import pytest
import torch
from torch import Tensor

from rankloom.attention.candidates import CANDIDATES, KINDS, Kind, hopeless
from rankloom.attention.precondition import Preconditioner

DIM, TOKENS, SCALE = 3, 600, 0.5
TEXTS = {"windowed": 2048}  # how long a text a kind's sizes are asked for, where these few tokens are too few
EACH = pytest.mark.parametrize("kind", KINDS)
MASKS = pytest.mark.parametrize("causal", [True, False])


def head() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(TOKENS, DIM, dtype=torch.float64, generator=generator) for _ in range(3))
    return 0.7 * q[None], k, v


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    logits = SCALE * q @ k.mT
    return (logits.masked_fill(torch.ones_like(logits[0]).triu(1).bool() & causal, -torch.inf)).softmax(-1) @ v


@EACH
@pytest.mark.parametrize("dim", [1, 3, 64])
@pytest.mark.parametrize("most", [0, 1, 50, 100, 1000, 4096])
def test_sizes_ascend_within_what_was_asked(kind: Kind, dim: int, most: int) -> None:
    candidates = CANDIDATES[kind]
    sizes = candidates.sizes(dim, most, TEXTS.get(kind, TOKENS))
    widths = [candidates.width(dim, size) for size in sizes]
    assert widths == sorted(set(widths)) and all(1 <= width <= most for width in widths)
    if kind == "isotropic":
        assert widths == [w for g in range(1, 33) if (w := comb(dim + g, g)) <= most]
    else:
        limit, part = {"nystrom": (TOKENS // 2, 2), "windowed": (1024, 4)}.get(kind, (4096, 2))
        widest = min(most, limit, comb(dim + 10, 10) if kind != "nystrom" else most)
        assert widths[-1:] == ([widest] if most >= 64 else [])
        assert all(wide // part == narrow >= 64 for narrow, wide in pairwise(widths))


def test_no_window_is_tried_on_a_text_that_it_would_cover() -> None:
    assert CANDIDATES["windowed"].sizes(64, 4096, 2047) == [] != CANDIDATES["windowed"].sizes(64, 4096, 2048)


@EACH
@MASKS
def test_the_error_falls_with_the_size(kind: Kind, causal: bool) -> None:
    q, k, v = head()
    preconditioner = Preconditioner.fit(q[0], k, SCALE)
    wanted, found = exact(q, k, v, causal), []
    for size in CANDIDATES[kind].sizes(DIM, 300, TEXTS.get(kind, TOKENS))[-3:]:
        choice = CANDIDATES[kind].choose(size, preconditioner, k, torch.Generator().manual_seed(0))
        out, denominators = CANDIDATES[kind].build(choice, preconditioner, causal=causal)(q, k, v)
        assert bool((denominators > 0).all())
        found.append(float((out - wanted).norm() / wanted.norm()))
    assert found == sorted(found, reverse=True) and found[-1] < 1e-2


@EACH
@MASKS
def test_a_stored_choice_makes_the_same_again(kind: Kind, causal: bool) -> None:
    q, k, v = head()
    preconditioner, candidates = Preconditioner.fit(q[0], k, SCALE), CANDIDATES[kind]
    choice = candidates.choose(candidates.sizes(DIM, 100, TEXTS.get(kind, TOKENS))[-1], preconditioner, k)
    buffer = io.BytesIO()
    torch.save(choice, buffer)
    buffer.seek(0)
    one, other = (
        candidates.build(each, preconditioner, causal=causal)
        for each in (choice, torch.load(buffer, weights_only=True))
    )
    assert one.causal == causal and one.scale == SCALE and one.preconditioner is preconditioner
    for a, b in zip(one(q, k, v), other(q, k, v), strict=True):
        assert torch.equal(a, b)


@EACH
def test_the_share_is_that_of_the_keys_that_all_queries_meet(kind: Kind) -> None:
    _, k, _ = head()
    preconditioner = Preconditioner.fit(k, k, SCALE)
    choice = CANDIDATES[kind].choose(64, preconditioner, k, torch.Generator().manual_seed(0))
    if kind == "isotropic":
        choice = 1
    shared = getattr(CANDIDATES[kind].build(choice, preconditioner, causal=False), "_shared", None)
    met = 0 if shared is None else int(shared(k)[4:].sum())  # beside the sinks
    assert abs(met - CANDIDATES[kind].share * TOKENS) <= 4


def test_an_error_that_falls_too_slowly_is_hopeless() -> None:
    """Halved with every stride, three ahead: 0.4 comes down to 0.05."""
    assert not hopeless(0.8, 0.4, 3, eps=0.0125) and hopeless(0.8, 0.4, 3, eps=0.0124)
    assert not hopeless(0.8, 0.4, 3.5, eps=0.0124)
    for before in (inf, 0.4, 0.1):  # did not fall to a number, or not at all
        assert hopeless(before, 0.4, 30, eps=0.09) and not hopeless(before, 0.4, 30, eps=0.1)
    assert hopeless(inf, inf, 9, eps=0.5)


@pytest.mark.parametrize(("step", "exact_rows"), [(1, 512), (8, 64), (100, 32)])
def test_a_thinned_window_is_as_wide_in_the_whole_sequence(step: int, exact_rows: int) -> None:
    q, k, _ = head()
    made = CANDIDATES["windowed"].build((64, inf), Preconditioner.fit(q[0], k, SCALE), causal=True, step=step)
    assert int((made.difficulty(q) == 0).sum()) == exact_rows
