"""The cost model: its arithmetic on known machines, and a calibration of this one."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
import torch

from rankloom.attention import cost
from rankloom.attention.candidates import CANDIDATES, KINDS
from rankloom.attention.cost import CostModel, calibrate

LINES = ((100, 1e-4, 2e-6), (300, 3e-4, 4e-6))
MODEL = CostModel(
    (1e-6, 1e-8),
    {"isotropic": LINES, "mehler": LINES, "anisotropic": LINES, "nystrom": ((64, 0.0, 1e-5),), "windowed": LINES},
    group=2,
    pair=5e-8,
)


def test_widths_are_interpolated_and_wider_ones_proportional() -> None:
    assert MODEL.exact(1000) == pytest.approx(1e-3 + 1e-2)
    assert MODEL.approximate(1000, 100, "isotropic") == pytest.approx(1e-4 + 2e-3)
    assert MODEL.approximate(1000, 200, "isotropic") == pytest.approx(2e-4 + 3e-3)
    assert MODEL.approximate(1000, 10, "isotropic") == MODEL.approximate(1000, 100, "isotropic")
    assert MODEL.approximate(1000, 900, "isotropic") == pytest.approx(3e-4 + 12e-3)


def test_keys_that_all_queries_meet_cost_in_proportion_to_the_length_squared() -> None:
    share = CANDIDATES["windowed"].share
    assert 0 < share < 0.1
    for length in (1000, 100_000):
        more = MODEL.approximate(length, 100, "windowed") - MODEL.approximate(length, 100, "mehler")
        assert more == pytest.approx(share * 5e-8 * length**2)
    slow = replace(MODEL, pair=1e-8 / share)  # all pairs cost as much as exact attention's, and the rest comes on top
    assert slow.break_even(100, "windowed") == inf
    assert slow.break_even(100, "mehler") == MODEL.break_even(100, "mehler")


def test_what_was_not_timed_is_never_faster() -> None:
    partial = replace(MODEL, linear={"isotropic": LINES})
    assert partial.approximate(10**6, 64, "mehler") == partial.break_even(64, "mehler") == inf
    assert partial.widest(10**6, "mehler", most=4096) == 0 < partial.widest(10**6, "isotropic", most=4096)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [50, 150, 5000])
def test_break_even_is_where_an_approximation_is_worth_using(kind: cost.Kind, width: int) -> None:
    at = MODEL.break_even(width, kind)
    for length in (0.9 * at, 1.1 * at):
        faster = MODEL.approximate(int(length), width, kind) < MODEL.worth(int(length))
        assert faster == (length > at)


def test_there_may_be_no_break_even() -> None:
    linear = CostModel((1e-6, 0.0), MODEL.linear)
    assert linear.break_even(100, "isotropic") == inf
    assert linear.widest(10**6, "isotropic", most=4096) == 0


@pytest.mark.parametrize("within", [inf, 2e-3])
def test_the_widest_is_the_last_that_is_faster(within: float) -> None:
    length = 1500
    fast = [
        width
        for width in range(1, 1001)
        if MODEL.approximate(length, width, "isotropic") < min(within, MODEL.worth(length))
    ]
    assert MODEL.widest(length, "isotropic", most=1000, within=within) == len(fast)
    assert MODEL.widest(length, "isotropic", most=150) == 150
    assert MODEL.widest(2, "isotropic", most=150) == 0


def test_a_known_clock_is_recovered() -> None:
    """``a + r L`` and ``b L + c L^2`` from two lengths; noise makes no term negative."""
    assert cost._line(1000, 3e-5 + 2e-4, 3e-5 + 4e-4) == pytest.approx((3e-5, 2e-7))
    assert cost._parabola(1000, 3e-5 + 2e-4, 6e-5 + 8e-4) == pytest.approx((3e-8, 2e-10))
    for fit in (cost._line, cost._parabola):
        for once, twice in ((1.0, 0.5), (1.0, 1.0), (1.0, 100.0)):
            assert min(fit(1000, once, twice)) >= 0 and sum(fit(1000, once, twice)) > 0


def test_the_fastest_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now, takes = [0.0], {"a": iter([9.0, 3.0, 1.0]), "b": iter([0.0, 5.0, 4.0])}
    monkeypatch.setattr(cost.time, "process_time", lambda: now[0])

    def run(name: str) -> None:
        now[0] += next(takes[name])

    assert cost._fastest([lambda: run("a"), lambda: run("b")], "cpu") == [1.0, 4.0]


def test_noise_never_makes_more_features_faster() -> None:
    assert cost._ascending([(300, 1.0, 2.0), (100, 2.0, 3.0)]) == ((100, 2.0, 3.0), (300, 2.0, 3.0))


@pytest.mark.parametrize("causal", [True, False])
def test_this_machine(causal: bool) -> None:
    model = calibrate(8, group=2, causal=causal)
    assert calibrate(8, 8, group=2, causal=causal) is model
    assert model.group == 2 and model.pair > 0 and model.exact(65536) > 100 * model.exact(2048) > 0
    for kind in KINDS:
        assert model.approximate(4096, 64, kind) > 0
        assert model.break_even(1024, kind) >= model.break_even(64, kind) > 0


def test_another_number_of_threads_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(cost, "_calibrate", lambda *key: asked.append(key))
    calibrate(16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    calibrate(16, 32, group=3, causal=False, dtype=torch.bfloat16)
    assert asked[0][:2] == (16, 16) and asked[0][-1] != 7
    assert asked[1] == (16, 32, 3, False, "cpu", torch.bfloat16, 7)
