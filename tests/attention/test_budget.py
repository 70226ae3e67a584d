"""What measuring may cost: the account against sums by hand, the look against the Poisson tail of scipy."""

from __future__ import annotations

from math import ceil, comb

import pytest
import torch
from scipy.stats import poisson

from rankloom.attention.budget import Budget, Place, calibration_pairs, promise, too_short
from rankloom.attention.cost import KINDS, CostModel
from rankloom.attention.precondition import Preconditioner
from rankloom.attention.search import search_seconds

PLACE: Place = (16, 16, 1, True, "cpu", "torch.float32")
# Exact attention takes L + L^2 / 1000 seconds, a factor of width w takes w L / 100.
COST = CostModel((1.0, 1e-3), dict.fromkeys(KINDS, ((64, 0.0, 0.64), (6400, 0.0, 64.0))))


def unused() -> CostModel:
    raise AssertionError("nothing to calibrate")


def account(share: float = 0.1, cost: CostModel | None = COST, refresh: int = 50, total: int | None = None) -> Budget:
    return Budget(share, refresh, cost, total)


def test_the_balance_is_a_share_of_exact_attention_and_half_of_what_was_saved() -> None:
    budget = account()
    budget.ran(PLACE, (1000, 3000), heads=2)
    budget.ran(PLACE, (2000,), heads=1)
    exact = 2 * (1000 + 1000 + 3000 + 9000) + 2000 + 4000
    assert budget.exact == pytest.approx(exact)
    budget.saved, budget.spent = 500.0, 70.0
    assert budget.balance == pytest.approx(0.1 * exact + 250 - 70)


def test_heads_below_every_break_even_length_are_not_measured() -> None:
    slow = CostModel((0.0, 1e-3), dict.fromkeys(KINDS, ((64, 0.0, 1.0),)))  # L against L^2 / 1100
    assert too_short(slow, (1099,)) and not too_short(slow, (1101,)) and not too_short(slow, (300, 1101))
    budget = account(share=1e9, cost=slow)
    budget.ran(PLACE, (1099,), 1)
    assert budget.admit(PLACE, (1099,), budget.balance, unused) == "length"
    assert budget.admit(PLACE, (1101,), budget.balance, unused) is slow
    assert budget.spent == 0


def test_an_allowance_admits_what_it_covers() -> None:
    budget, price = account(), search_seconds(COST, PLACE[0], (1000,))
    assert budget.admit(PLACE, (1000,), 0.999 * price, unused) == "budget"
    assert budget.admit(PLACE, (1000,), price, unused) is COST


def test_calibration_waits_until_its_share_has_run_and_is_paid_for() -> None:
    budget, asked = account(cost=None, share=0.25), []
    length = 10_000
    passes = ceil(calibration_pairs(PLACE) / 0.25 / length**2)

    def calibrate() -> CostModel:
        asked.append(1)
        return COST

    for _ in range(passes - 1):
        budget.ran(PLACE, (length,), 1)
    assert budget.exact == 0.0  # nobody knows yet
    assert budget.admit(PLACE, (length,), 1e12, calibrate) == "calibration" and not asked
    budget.ran(PLACE, (length,), 1)
    assert budget.calibrates(PLACE)
    # What is left does not pay for the search as well.
    assert budget.admit(PLACE, (length,), 1e12, calibrate) in ("budget", COST) and asked == [1]
    assert budget.spent == pytest.approx(1e-3 * calibration_pairs(PLACE))
    assert budget.spent <= 0.25 * budget.exact
    assert budget.admit(PLACE, (length,), 1e12, calibrate) is COST and asked == [1]
    other: Place = (*PLACE[:4], "cuda:0", PLACE[5])
    assert calibration_pairs(other) > 100 * calibration_pairs(PLACE)


def test_an_advance_for_a_calibration_is_lent_against_half_a_refresh_period() -> None:
    length = 20_000
    enough = ceil(2 * (calibration_pairs(PLACE) / length**2 + 6))  # one pass a step, and six are kept for the search
    for refresh in (enough, enough - 1):
        budget = account(cost=None, share=0.0, refresh=refresh)
        budget.ran(PLACE, (length,), 1)
        assert budget.admit(PLACE, (length,), 0.0, unused) == "calibration"
        budget.trusted = False
        assert budget.admit(PLACE, (length,), 0.0, unused, features=17) == "calibration"
        budget.trusted = True
        lent = budget.admit(PLACE, (length,), 0.0, lambda: COST, features=17)
        assert (lent == "calibration") == (refresh < enough)
        assert budget.spent == (0.0 if refresh < enough else pytest.approx(1e-3 * calibration_pairs(PLACE)))


def test_an_advance_for_a_search_is_lent_as_long_as_there_is_trust() -> None:
    # Against 2000 s of exact attention a step.
    refresh = ceil(2 * search_seconds(COST, PLACE[0], (1000,), features=64) / 2000)
    assert account(refresh=refresh).admit(PLACE, (1000,), 0.0, unused, features=64) is COST
    assert account(refresh=refresh - 1).admit(PLACE, (1000,), 0.0, unused, features=64) == "budget"
    assert account(refresh=refresh).admit(PLACE, (1000,), 0.0, unused) == "budget"
    doubted = account(refresh=refresh)
    doubted.trusted = False
    assert doubted.admit(PLACE, (1000,), 0.0, unused, features=64) == "budget"


def test_nothing_is_lent_that_the_rest_of_a_run_will_not_win_back() -> None:
    needed = ceil(2 * search_seconds(COST, PLACE[0], (1000,), features=64) / 2000)
    budget = account(refresh=10 * needed, total=needed + 7)
    assert budget.admit(PLACE, (1000,), 0.0, unused, steps=7, features=64) is COST
    assert budget.admit(PLACE, (1000,), 0.0, unused, steps=8, features=64) == "budget"
    assert budget.admit(PLACE, (1000,), 1e9, unused, steps=8) is COST  # what is paid for is measured anyway
    length, uncalibrated = 20_000, account(cost=None, share=0.0, refresh=10**6, total=3)
    uncalibrated.ran(PLACE, (length,), 1)
    assert uncalibrated.admit(PLACE, (length,), 0.0, unused, features=17) == "calibration"


def test_the_account_survives_its_state() -> None:
    budget = account(cost=None)
    budget.ran(PLACE, (30_000,), 2)
    budget.costs[PLACE] = COST
    budget.saved, budget.spent, budget.trusted = 3.0, 4.0, False
    again = account(cost=None)
    again.restore(budget.state())
    assert (again.balance, again.trusted, again.passes) == (budget.balance, False, budget.passes)


@pytest.mark.parametrize("size", [0.05, 0.2, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("length", [64, 600, 4096])
def test_the_look_is_the_tail_of_a_poisson_law(size: float, length: int) -> None:
    q, k = (size**0.5 * torch.randn(length, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    spectrum = Preconditioner.fit(q, k, 0.5, rows=256, generator=torch.Generator().manual_seed(2)).spectrum
    variance = float(spectrum.square().sum())
    degree = next((g for g in range(1, 9) if poisson.sf(g, variance) <= 1e-6), None)
    features = comb(4 + degree, degree) if degree is not None else length
    assert promise(q, k, 0.5, 1e-2, torch.Generator().manual_seed(2)) == (features if 4 * features <= length else 0)
