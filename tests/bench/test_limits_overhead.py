"""The bench's bookkeeping on short sequences, so that a run of minutes does not end in an error."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from rankloom.attention.cost import KINDS, CostModel

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import limits_overhead

    cost = CostModel((0.0, 1e-3), dict.fromkeys(KINDS, ((1, 0.0, 1e-4), (10_000, 0.0, 1.0))))
    monkeypatch.setattr(limits_overhead, "calibrate", lambda *_, **__: cost)
    return limits_overhead


def test_both_variants_take_every_step_and_prices_are_booked(bench: ModuleType) -> None:
    model, texts, loss = bench.small_heads(1, 2, 192, 2)
    found = bench.run(model, texts, loss)
    assert {len(times) for times in found["steps"].values()} == {2}
    assert found["largest_loss_difference"] == 0.0  # too short for an approximation
    assert found["attention"]["ran"] == {"short": 4}
    assert found["whole_run"] == pytest.approx(sum(found["steps"]["accelerated"]) / sum(found["steps"]["exact"]))
    price = bench.prices(model, texts[0], heads=2)
    assert len(price["heads"]) == 2 and all(row["seconds"] > 0 and row["booked"] > 0 for row in price["heads"])
    json.dumps({**found, **price})
