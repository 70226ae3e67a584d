"""The bench's bookkeeping on short heads, with cost models that say what they are told to."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from rankloom.attention.cost import KINDS, CostModel

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("limits_verdicts")


def model(exact: float) -> CostModel:
    """Exact attention takes ``exact`` seconds a pair of tokens, a factor 1e-9 a token and feature."""
    return CostModel((0.0, exact), dict.fromkeys(KINDS, ((4096, 0.0, 4.096e-06),)))


@pytest.mark.parametrize("causal", [False, True])
def test_a_factor_is_confirmed_by_error_and_time(bench: ModuleType, causal: bool) -> None:
    row = bench.judge(bench.Planted(4, "flat", 0.1, causal, 256), model(1.0), 1e-2, repeats=1)
    assert row["verdict"] == "polynomial" and row["predicted"] > 1
    assert list(row["candidates"]) == [row["factor"]] and row["best"]["error"] <= 1e-2
    assert row["agrees"] == (row["best"]["speed_up"] > 1) == ("why" not in row)


def test_exact_is_held_against_the_narrowest_of_every_kind(bench: ModuleType) -> None:
    row = bench.judge(bench.Planted(4, "decaying", 0.1, False, 256), model(1e-15), 1e-2, repeats=1)
    assert row["verdict"] == "exact"
    kinds = [candidate["kind"] for candidate in row["candidates"].values()]
    assert "isotropic" in kinds and "mehler" in kinds and len(set(kinds)) == len(kinds)
    assert row["agrees"] == (row["best"]["speed_up"] <= 1)
    assert row["best"]["speed_up"] == max(c["speed_up"] for c in row["candidates"].values())


def test_a_head_beyond_every_factor_is_exact(bench: ModuleType) -> None:
    row = bench.judge(bench.Planted(16, "flat", 4.0, False, 128), model(1.0), 1e-3, repeats=1)
    assert row["verdict"] == "exact" and row["candidates"] == {} and row["agrees"]


def test_planted_heads_have_the_logits_they_are_asked_for(bench: ModuleType) -> None:
    for spectrum in ("flat", "decaying"):
        first, second = bench.Planted(16, spectrum, 0.5, False, 2048).texts(2)
        q, k = first.q[0] - first.q[0].mean(0), first.k - first.k.mean(0)
        assert float((first.scale * q @ k.mT).std()) == pytest.approx(0.5, rel=0.1)
        assert not first.q.equal(second.q)


def test_shares_count_by_verdict(bench: ModuleType) -> None:
    rows = [{"verdict": "exact", "agrees": a} for a in (True, True, False)] + [
        {"verdict": "polynomial", "agrees": True}
    ]
    found = bench.shares(rows)
    assert found["share"] == 0.75
    assert found["by_verdict"] == {"exact": {"heads": 3, "agree": 2}, "polynomial": {"heads": 1, "agree": 1}}
