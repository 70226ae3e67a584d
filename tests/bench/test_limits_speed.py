"""The bench's bookkeeping on short heads, so that a run of an hour does not end in an error."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import limits_speed

    return limits_speed


def test_every_row_measures_times_and_errors(bench: ModuleType) -> None:
    for name, row in bench.ROWS.items():
        measured = bench.measure(row, [160], repeats=1)[160]
        assert set(measured) == {"sdpa", *row.factors}
        for variant in row.factors:
            errors = measured[variant]["errors"]
            assert set(errors) == {"out", "dQ", "dK", "dV", *(f"d{f}_{n}" for f in "AB" for n in "qkv")}, name
            assert all(0 < e < 0.3 for e in errors.values()), (name, variant, errors)
            assert measured[variant]["wall"] > 0 and measured[variant]["speed_up"] > 0
        json.dumps(measured)


def test_growth_is_the_slope_of_the_logarithms(bench: ModuleType) -> None:
    def at(length: int) -> dict[str, dict[str, dict[str, float]]]:
        return {"variants": {"sdpa": {"seconds": 3e-9 * length**2}, "fast": {"seconds": 1e-6 * length**1.05}}}

    growth = bench.growth({"rows": {"a": {str(n): at(n) for n in (512, 2048, 4096)}, "b": {"512": at(512)}}})
    assert set(growth) == {"a"}
    for variant, exponent in {"sdpa": 2.0, "fast": 1.05}.items():
        assert growth["a"][variant]["exponent"] == pytest.approx(exponent) and growth["a"][variant]["lengths"] == 3
        assert growth["a"][variant]["standard_error"] < 1e-9
