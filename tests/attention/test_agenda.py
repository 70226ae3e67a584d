"""Whose turn it is: back-off, turns by layer, and an account that is never overdrawn."""

from __future__ import annotations

from math import inf

import pytest

from rankloom.attention.agenda import Turn, plan
from rankloom.attention.budget import Budget, Place
from rankloom.attention.cost import KINDS, CostModel
from rankloom.attention.fitting import Fit
from rankloom.attention.heads import Layer
from rankloom.attention.search import search_seconds
from tests.attention.test_budget import COST

PLACE: Place = (16, 16, 1, True, "cpu", "torch.float32")
LENGTH = 1000
PRICE = search_seconds(COST, PLACE[0], (LENGTH,))
PASSED = Fit("isotropic 17", object(), error=1e-3, length=10.0, seconds=1.0)  # type: ignore[arg-type]


def layers(count: int = 2, heads: int = 2) -> list[Layer]:
    return [
        Layer(f"layer {i}", i, place=PLACE, lengths=(LENGTH,), turns={h: Turn() for h in range(heads)})
        for i in range(count)
    ]


def with_balance(seconds: float, cost: CostModel | None = COST) -> Budget:
    budget = Budget(0.04, 50, cost)
    budget.spent = -seconds
    return budget


def wanted(model: list[Layer]) -> list[tuple[int, int]]:
    return [(layer.index, head) for layer in model for head in layer.wanted]


@pytest.mark.parametrize(
    ("error", "waits"), [(2e-2, [2, 4, 8, 16, 32, 64, 64]), (0.5, [4, 16, 64, 64]), (inf, [4, 16])]
)
def test_failures_back_off_and_hopeless_ones_further(error: float, waits: list[int]) -> None:
    turn, step, got = Turn(), 7, []
    for _ in waits:
        turn.measured(Fit("certificate", error=error), step=step, refresh=50, eps=1e-2, length=LENGTH)
        got.append((turn.due - step) / 50)
        step = turn.due
    assert got == waits
    turn.measured(PASSED, step=step, refresh=50, eps=1e-2, length=LENGTH)
    assert turn.due == step + 50 and turn.proven and turn.rate == 1.0 / LENGTH
    turn.measured(Fit("certificate", error=2e-2), step=step, refresh=50, eps=1e-2, length=LENGTH)
    assert turn.due == step + 100 and not turn.proven


def test_only_due_heads_that_the_balance_covers_are_wanted() -> None:
    model = layers()
    model[0].turns[0].due = 6
    plan(model, with_balance(2.5 * PRICE), 5)
    assert wanted(model) == [(0, 1), (1, 0)]
    assert [t.waits for layer in model for t in layer.turns.values()] == ["", "", "", "budget"]
    plan(model, with_balance(1e9), 6)
    assert len(wanted(model)) == 4


def test_layers_take_turns_and_those_never_measured_come_first() -> None:
    model = layers(3)
    order = []
    for step in range(12):
        plan(model, with_balance(PRICE), step)
        ((index, head),) = wanted(model)
        order.append((index, head))
        model[index].turns[head].measurements += 1
        model[index].turns[head].failures = 1
    rounds = [order[i : i + 3] for i in range(0, 12, 3)]
    assert all({index for index, _ in each} == {0, 1, 2} for each in rounds)
    assert len(set(order[:6])) == 6


def test_promising_and_cheap_heads_come_first() -> None:
    model = layers(3, heads=1)
    model[2].turns[0].promised = 17
    model[1].lengths = (900,)
    for spare, expected in ((1.0, [2]), (1.9, [1, 2]), (2.5, [1, 2]), (3.0, [0, 1, 2])):
        plan(model, with_balance(spare * PRICE), 0)
        assert [index for index, _ in wanted(model)] == expected


def test_nobody_spends_what_an_earlier_head_saves_for() -> None:
    model = layers(2, heads=1)
    model[0].lengths, model[1].turns[0] = (3000,), Turn(measurements=1, failures=1)
    plan(model, with_balance(1.5 * PRICE), 0)
    assert not wanted(model)
    assert {layer.turns[0].waits for layer in model} == {"budget"}


def test_a_certificate_that_nothing_pays_for_lapses() -> None:
    for saved, renewed in ((2 * PRICE, True), (1.9 * PRICE, False)):
        model = layers(1)
        model[0].fits = {0: PASSED, 1: Fit("certificate")}
        model[0].turns[0] = Turn(measurements=1, saved=saved)
        model[0].turns[1] = Turn(measurements=1, failures=1, due=100)
        plan(model, with_balance(0.0), 50)
        assert wanted(model) == ([(0, 0)] if renewed else [])
        assert (0 in model[0].fits) == renewed
        assert model[0].waiting(0) == ("not measured yet" if renewed else "put off: budget")
        assert 1 in model[0].fits and model[0].turns[1].waits == ""


def test_reasons_are_calibration_and_length() -> None:
    model = layers(2, heads=1)
    budget = with_balance(1e9, cost=None)
    plan(model, budget, 0)
    assert not wanted(model) and {layer.turns[0].waits for layer in model} == {"calibration"}
    budget.ran(PLACE, (10**7,), 1)
    plan(model, budget, 1)  # one head brings the calibration about, for all
    assert wanted(model) == [(0, 0)] and model[0].wanted[0] == inf
    slow = CostModel((0.0, 1e-9), dict.fromkeys(KINDS, ((64, 0.0, 1.0),)))
    plan(model, with_balance(1e9, cost=slow), 2)
    assert not wanted(model) and {layer.turns[0].waits for layer in model} == {"length"}


@pytest.mark.parametrize("error", [3e-2, 0.9])
def test_a_model_whose_heads_all_fail_stays_within_the_share(error: float) -> None:
    """Thousands of steps: the account never exceeds it, and is used up to where back-off needs less."""
    budget, model = Budget(0.04, 10, COST), layers(4)
    counts = []
    for step in range(4000):
        plan(model, budget, step)
        for layer in model:
            budget.ran(layer.place, layer.lengths, 2)
            for head in layer.wanted:
                found = Fit("certificate", error=error, spent=PRICE)
                budget.spent += found.spent
                layer.turns[head].measured(found, step=step, refresh=10, eps=1e-2, length=LENGTH)
        assert budget.spent <= 0.04 * budget.exact
        counts.append([turn.measurements for layer in model for turn in layer.turns.values()])
    assert min(counts[-1]) >= 2 and max(counts[-1]) - min(counts[-1]) <= 1
    assert budget.spent > 0.003 * budget.exact
