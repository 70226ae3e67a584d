"""Sizes of forms at a budget: the nearest there is, counted as what the adapted model trains."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

import rankloom
from rankloom.errors import RankloomError
from rankloom.targets import find_targets

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import form_quality

    return form_quality


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24), nn.Linear(24, 16))


def trained(quality: ModuleType, row: str, size: int) -> int:
    """By adapting the model; -1 where the form cannot be that large."""
    try:
        recipe = (
            rankloom.methods.get(row).with_(quality.SIZES[row](row, size)).with_({"targets.modules": ("0", "1", "2")})
        )
        needed = rankloom.Calibration([]) if recipe.init.evidence != "none" else None
        return sum(p.numel() for p in rankloom.adapt(layers(), recipe, needed).parameters())
    except RankloomError:
        return -1


@pytest.mark.parametrize("row", ["lora", "dora", "lora-xs", "miss", "hydra", "fourierft", "loca", "lokr", "loha"])
@pytest.mark.parametrize("budget", [480, 120])
def test_the_size_is_the_nearest_to_the_budget(quality: ModuleType, row: str, budget: int) -> None:
    targets = tuple(find_targets(layers(), rankloom.Targets(("0", "1", "2"))))
    counts = {size: trained(quality, row, size) for size in range(1, 200)}
    possible = {size: count for size, count in counts.items() if count > 0}
    assert possible and all(quality.count(row, size, targets) == counts[size] for size in counts)
    near = min(abs(count - budget) for count in possible.values())
    found = quality.nearest(row, budget, targets)
    assert (found is None) is (near > quality.NEAR * budget)
    assert found is None or abs(possible[found] - budget) == near


def test_proportions_stay(quality: ModuleType) -> None:
    changes = quality.SIZES["lora"]("lora", 4)
    lora = rankloom.methods.get("lora").adapter
    assert changes["adapter.rank"] == 4 and changes["adapter.alpha"] == 4 * lora.alpha / lora.rank
    assert quality.SIZES["flylora"]("flylora", 16)["adapter.active"] >= 1
