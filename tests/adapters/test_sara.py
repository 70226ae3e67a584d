"""SaRA: the smallest weights, their two phases and their nuclear norm, against dense masks and decompositions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import SaRA, SaRAAdapter
from rankloom.adapters.sara import smallest
from rankloom.errors import RecipeError, TargetError
from rankloom.init import OwnStart
from rankloom.kernels import materialized
from rankloom.layers import LinearLayer


def made(fraction: float = 0.3, threshold: float | None = None) -> tuple[SaRAAdapter, LinearLayer]:
    layer = LinearLayer(nn.Linear(9, 7, dtype=torch.float64).requires_grad_(False))
    return SaRAAdapter(layer, fraction, threshold, torch.float64), layer


def mask_of(adapter: SaRAAdapter) -> Tensor:
    mask = torch.zeros(7 * 9, dtype=torch.bool)
    mask[adapter.index.long()] = True
    return mask.view(7, 9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_smallest(dtype: torch.dtype) -> None:
    weight = torch.randn(30, 40, dtype=dtype)
    for fraction in (0.001, 0.1, 0.5, 1.0):
        index = smallest(weight, fraction, None)
        chosen = torch.zeros(1200, dtype=torch.bool)
        chosen[index] = True
        size = weight.abs().flatten()
        assert len(index) == max(round(1200 * fraction), 1) and torch.equal(index, index.sort().values)
        assert chosen.all() or size[chosen].max() <= size[~chosen].min()
    assert torch.equal(smallest(weight, 0.1, 0.5), (weight.abs().flatten() < 0.5).nonzero().flatten())
    ties = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    assert smallest(ties, 0.5, None).tolist() == [0, 1, 2]


@pytest.mark.parametrize("block", [1, 2 * 9, 1 << 21])
def test_values_outside_are_the_bases_and_gradients_are_gathered(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materialized, "BLOCK", block)
    adapter, layer = made()
    nn.init.normal_(adapter.values)
    delta, mask = adapter.delta(layer).detach(), mask_of(adapter)
    assert not delta[~mask].any() and torch.equal(delta[mask], adapter.values.detach())
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    y = adapter(x, layer)
    torch.testing.assert_close(y, x @ (layer.weight() + delta).mT + layer.bias(), rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(y)
    y.backward(pull)
    torch.testing.assert_close(adapter.values.grad, (pull.mT @ x)[mask].detach(), rtol=1e-12, atol=1e-12)


def test_the_nuclear_norm_and_its_gradient() -> None:
    adapter, layer = made(fraction=0.6)
    nn.init.normal_(adapter.values, std=0.3)

    def oracle(values: Tensor) -> Tensor:
        matrix = torch.zeros(7, 9, dtype=torch.float64)
        mask = mask_of(adapter)
        matrix = matrix.masked_scatter(mask, layer.weight()[mask] + values)
        return torch.linalg.matrix_norm(matrix, "nuc")

    norm = adapter.nuclear_norm(layer)
    assert norm.item() == pytest.approx(float(oracle(adapter.values.detach())), rel=1e-9)
    norm.backward()
    step = 1e-6
    for i in range(len(adapter.values)):
        e = torch.zeros_like(adapter.values)
        e[i] = step
        slope = (oracle(adapter.values.detach() + e) - oracle(adapter.values.detach() - e)) / (2 * step)
        assert float(adapter.values.grad[i]) == pytest.approx(float(slope), abs=1e-7)


def run(settings: dict[str, Any], steps: int, total: int | None = None, decay: float = 0.1) -> rankloom.Adaptation:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    handle = rankloom.adapt(model, Recipe(Targets(("0", "2")), SaRA(**settings), OwnStart()))
    optimizer = handle.optimizer(0.05, total_steps=total, weight_decay=decay)
    x, y = torch.randn(16, 9, dtype=torch.float64), 3 * torch.randn(16, 4, dtype=torch.float64)
    for _ in range(steps):
        (model(x) - y).square().mean().backward()
        handle.step()
    handle.report["optimizer"] = optimizer
    return handle


def test_what_has_grown_is_frozen_to_the_bit_and_the_rest_goes_on_afresh() -> None:
    settings = {"fraction": 0.4, "first_phase": 4, "nuclear": 0.0}
    now, later = run(settings, 4), run(settings, 9)
    for one, two in zip(now.bindings, later.bindings, strict=True):
        adapter, end, weight = one.adapter, two.adapter, one.layer.weight().flatten()
        before = weight[adapter.index.long()]
        still = (before + adapter.values).abs() <= before.abs().max()
        assert torch.equal(adapter.live, still) and torch.equal(end.live, still) and 0 < int(still.sum()) < len(still)
        assert torch.equal(end.values[~still], adapter.values[~still])
        assert not torch.isclose(end.values[still], adapter.values[still], rtol=1e-6).any()
        moments = now.report["optimizer"].state[adapter.values]
        assert all(not moment.any() for moment in moments.values())
        full = [m for m in later.report["optimizer"].state[end.values].values() if m.numel() > 1]
        assert sum(m.numel() for m in full) == 2 * len(end.values)
        delta = two.adapter.delta(two.layer).flatten()
        delta[end.index.long()] = 0
        assert not delta.any()  # weight decay included


def test_one_phase_and_a_share_of_the_run() -> None:
    assert all(b.adapter.live.all() for b in run({"first_phase": 0}, 6).bindings)
    assert not all(b.adapter.live.all() for b in run({"first_phase": 0.5, "fraction": 0.4}, 3, total=6).bindings)
    with pytest.raises(RecipeError, match="fraction of the run"):
        run({}, 1)


def test_the_penalty_acts_and_its_estimate_has_the_full_sum_as_mean() -> None:
    drawn = [run({"first_phase": 0, "nuclear": weight}, 12, decay=0.0) for weight in (0.0, 0.3)]
    norms = [sum(b.adapter.nuclear_norm(b.layer).item() for b in handle.bindings) for handle in drawn]
    assert norms[1] < 0.9 * norms[0]
    schedule = drawn[1].driver.schedules[0]
    mean = sum(schedule.extra_loss(step).item() for step in range(400)) / 400
    assert mean == pytest.approx(0.3 * norms[1], rel=0.1)


def test_impossible_settings_are_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 6))
    for settings, error, text in (
        ({"fraction": 0.0}, RecipeError, r"fraction must be in \(0, 1\]"),
        ({"threshold": 0.0}, RecipeError, "threshold must be positive"),
        ({"threshold": 1e-12}, TargetError, r"no weight of 0 is below 1e-12.*raise adapter.threshold"),
    ):
        with pytest.raises(error, match=text):
            Recipe(Targets(("0",)), SaRA(**settings), OwnStart()).check(model)
