"""What a search is expected to take: against sums by hand over the candidates' own sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rankloom.attention.candidates import CANDIDATES
from rankloom.attention.certificate import KEYS
from rankloom.attention.cost import KINDS
from rankloom.attention.search import candidates, certificate_seconds, screen_seconds, screen_step, search_seconds
from tests.attention.test_budget import COST

DIM = 16


def test_candidates_are_all_sizes_worth_using_fastest_first() -> None:
    found = candidates(COST, DIM, (1000, 3000))
    assert [seconds for seconds, *_ in found] == sorted(seconds for seconds, *_ in found)
    for kind in KINDS:
        every = CANDIDATES[kind].sizes(DIM, 4096, 4000)
        worth = [n for n in every if 30.0 * max(64, CANDIDATES[kind].width(DIM, n)) < (3000 + 9000) / 1.1]
        assert sorted(size for _, k, size, _ in found if k == kind) == worth, kind
        assert all(width == CANDIDATES[kind].width(DIM, size) for _, k, size, width in found if k == kind)
    assert not candidates(replace(COST, quadratic=(0.1, 0.0)), DIM, (1000,))


def test_a_certificate_by_hand() -> None:
    # a(n) = w n / 100, E(n) = n + n^2 / 1000; nine samples of the keys, and rows at twice the price.
    for n, group, rows, w in ((1000, 1, 256, 100), (10_000, 3, 64, 200), (50, 2, 256, 100)):
        exact = 2 * (n + n * n / 1000) * min(rows, group * n) / (group * n)
        pulled = 5 / (1 + group) * w * min(n, KEYS) / 100
        got = certificate_seconds(replace(COST, group=group), n, w, "mehler", rows)
        assert got == pytest.approx(w * n / 100 + pulled + exact)


def test_a_search_screens_all_and_certifies_half() -> None:
    lengths = (4700, 300)
    assert screen_step(4700) == 4 and screen_step(900) == 1
    tried = [(width, kind) for _, kind, _, width in candidates(COST, DIM, lengths)]
    screens = sum(certificate_seconds(COST, 1175, w, kind, 64) for w, kind in tried)
    assert sum(screen_seconds(COST, 4700, w, kind) for w, kind in tried) == pytest.approx(screens)
    whole = sum(certificate_seconds(COST, n, w, kind) for w, kind in tried for n in lengths)
    assert search_seconds(COST, DIM, lengths) == pytest.approx(screens + whole / 2)


def test_a_promising_head_ends_at_what_it_promised() -> None:
    within = COST.approximate(4700, 153, "isotropic")
    narrow = [(width, kind) for s, kind, _, width in candidates(COST, DIM, (4700,)) if s <= within]
    assert 0 < len(narrow) < len(candidates(COST, DIM, (4700,)))
    screens = sum(screen_seconds(COST, 4700, w, kind) for w, kind in narrow)
    wanted = screens + certificate_seconds(COST, 4700, 153, "isotropic")
    assert search_seconds(COST, DIM, (4700,), features=153) == pytest.approx(wanted)
