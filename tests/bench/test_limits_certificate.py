"""The bench's bookkeeping on short heads: taken over all rows, an estimate is the truth it is compared with."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("limits_certificate")


@pytest.mark.parametrize(("causal", "seed"), [(False, 1), (False, 19), (True, 1), (True, 19)])
def test_over_all_rows_the_estimate_is_the_truth(bench: ModuleType, causal: bool, seed: int) -> None:
    drawn = bench.draw(seed, 768, causal)
    head = bench.coverage(drawn, 2 * 768, 768)
    assert set(head["true"]) == set(head["estimates"]) == set(bench.NAMES)
    assert max(head["true"][name] for name in ("output", "dQ", "dK", "dV")) <= drawn.target <= bench.LIMIT
    for name, (error, _) in head["estimates"].items():
        # Of float32 tensors, and relative to the approximate one in place of the exact one.
        true = head["true"][name]
        assert error == pytest.approx(true, rel=0.01 + 1.5 * true, abs=1e-5), name


def test_draws_repeat_and_differ(bench: ModuleType) -> None:
    first, again, other = (bench.draw(seed, 64, False) for seed in (1, 1, 2))
    assert first.described == again.described and first.head.q.equal(again.head.q)
    assert first.described != other.described


def test_summary_counts_what_is_covered(bench: ModuleType) -> None:
    cases = [(1e-2, 2e-2), (2e-2, 1e-2), (1e-2, 1.5e-2), (5e-2, 6e-2), (5e-2, 2e-2)]
    made = [
        {"seed": i, "causal": False, "true": dict.fromkeys(bench.NAMES, t)}
        | {"estimates": dict.fromkeys(bench.NAMES, (t, upper))}
        for i, (t, upper) in enumerate(cases)
    ]
    row = next(r for r in bench.summary(made) if r["quantity"] == "dK" and r["mask"] == "both")
    assert (row["heads"], row["covered"], row["limit/truth"]) == (3, 2, 1.5)
    assert (row["above"], row["above, rejected"]) == (2, 1)
    assert {m["seed"] for m in bench.misses(made)} == {1, 4}
