"""LoRA-One's start (2502.01235): the card's invariants on real models, the dead-direction guard, the automatic gamma."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Calibration, Recipe, Targets, adapt
from rankloom.adapters import DoRA, LoRA
from rankloom.calibration.data import mean_loss
from rankloom.init import OneStepGradient
from tests import zoo

RANK, ALPHA, GAMMA = 3, 16.0, 128.0


def recipe(gamma: float | str = GAMMA, *, rank: int = RANK, modules: Any = "all-linear", **init: Any) -> Recipe:
    return Recipe(
        targets=Targets(modules),
        adapter=LoRA(rank=rank, alpha=ALPHA, scaling="rslora"),
        init=OneStepGradient(gamma=gamma, **init),
    )


def autograd_gradients(kind: str, handle: rankloom.Adaptation) -> dict[str, Tensor]:
    """Full gradients at ``W0`` of a fresh copy, as (out, in), on the calibration data in one batch."""
    model, parts = zoo.build(kind), zoo.batches(kind)
    big = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    model(**big).loss.backward()
    found = {}
    for target in handle.targets:
        module = model.get_submodule(target.module_name)
        found[target.name] = module.weight.grad.T if type(module).__name__ == "Conv1D" else module.weight.grad
    return found


@pytest.mark.parametrize("method", ["exact", "sketch"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_start_is_the_best_rank_r_step_down_the_gradient(kind: str, method: str) -> None:
    """Invariants 1, 2, 4: sign, scale, balance, operator norm, first-order decrease, for every target."""
    model = zoo.build(kind)
    # A sketch as wide as these layers has no error of its own, so both have to agree to the last digits.
    handle = adapt(model, recipe(method=method, oversample=64), Calibration(zoo.batches(kind)))
    gradients = autograd_gradients(kind, handle)
    s = ALPHA / math.sqrt(RANK)
    for b in handle.bindings:
        g = gradients[b.name]
        u, sv, vh = torch.linalg.svd(-g)
        delta = b.adapter.delta(b.layer).detach()
        live = RANK - handle.report["dead_directions"].get(b.name, 0)
        eta = s / (GAMMA * float(sv[0]))
        want = eta * (u[:, :live] * sv[:live]) @ vh[:live]
        assert float((delta - want).norm() / want.norm()) < 1e-9, b.name
        assert float(torch.linalg.matrix_norm(delta, 2)) == pytest.approx(s / GAMMA, rel=1e-10)
        assert float((g * delta).sum()) == pytest.approx(-eta * float(sv[:live].square().sum()), rel=1e-9)
        balance = torch.diag(sv[:live] / sv[0]) / GAMMA
        torch.testing.assert_close(b.adapter.B[:, :live].T @ b.adapter.B[:, :live], balance, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(b.adapter.A[:live] @ b.adapter.A[:live].T, balance, rtol=1e-8, atol=1e-12)


def test_the_base_is_untouched_and_comes_back() -> None:
    """Invariant 3."""
    model, inputs = zoo.build("llama"), zoo.batch("llama", 9)
    before, state = zoo.logits(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    handle = adapt(model, recipe(), Calibration(zoo.batches("llama")))
    assert not torch.equal(before, zoo.logits(model, inputs))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    with handle.detached() as bare:
        assert torch.equal(before, zoo.logits(bare, inputs))


def test_the_loss_is_below_the_base_loss() -> None:
    """Invariant 4, in full: a small enough step goes down."""
    model, data = zoo.build("llama"), Calibration(zoo.batches("llama"))
    base = mean_loss(model, data)
    losses = []
    for gamma in (2048.0, 8192.0, 32768.0):
        handle = adapt(model, recipe(gamma), data)
        losses.append(mean_loss(model, data))
        assert handle.report["loss"] == pytest.approx(base, rel=1e-12)
        handle.detach()
    assert losses[0] < losses[1] < losses[2] < base
    # First order: the decrease is <G, delta>, summed over targets.
    handle = adapt(model, recipe(2.0**20), data)
    slope = sum(
        float((g * b.adapter.delta(b.layer)).detach().sum())
        for b, g in zip(handle.bindings, autograd_gradients("llama", handle).values(), strict=True)
    )
    assert mean_loss(model, data) - base == pytest.approx(slope, rel=1e-2)


def test_scaling_the_loss_changes_nothing() -> None:
    """Invariant 7: ``S / S1`` removes the loss's scale."""
    results = []
    for scale in (1.0, 1e-3, 4096.0):
        data = Calibration(zoo.batches("llama"), lambda m, b, c=scale: (c * m(**b).loss, 1.0))
        handle = adapt(zoo.build("llama"), recipe(), data)
        results.append({n: t.clone() for n, t in handle.state_dict().items()})
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-8, atol=1e-11)


def test_first_sgd_update() -> None:
    """Invariant 8: ``dW = -lr s^2 (B0 B0^T G1 + G1 A0^T A0)`` with ``G1`` taken at ``W0 + s B0 A0``."""
    handle = adapt(zoo.build("llama"), recipe(16.0), Calibration(zoo.batches("llama")))
    batch, lr = zoo.batch("llama"), 1e-6
    merged = zoo.merged_copy(handle, zoo.build("llama"))
    merged(**batch).loss.backward()
    handle.model(**batch).loss.backward()
    for b in handle.bindings:
        before = b.adapter.delta(b.layer).detach()
        a0, b0 = b.adapter.A.detach().clone(), b.adapter.B.detach().clone()
        with torch.no_grad():
            b.adapter.A -= lr * b.adapter.A.grad
            b.adapter.B -= lr * b.adapter.B.grad
        g1, s = merged.get_submodule(b.name).weight.grad, b.adapter.scale
        want = -lr * s**2 * (b0 @ b0.T @ g1 + g1 @ a0.T @ a0)
        moved = b.adapter.delta(b.layer).detach() - before
        assert float((moved - want).norm() / want.norm()) < 1e-4, b.name


class TwoLayers(nn.Module):
    """One live layer, one that nothing depends on, one whose gradient has rank one."""

    def __init__(self) -> None:
        super().__init__()
        self.live = nn.Linear(8, 6, dtype=torch.float64)
        self.deaf = nn.Linear(8, 6, dtype=torch.float64)
        self.thin = nn.Linear(8, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        thin = self.thin(x[:1])
        return self.live(x).square().sum() + 0 * self.deaf(x).sum() + thin.sum()


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_dead_directions_start_as_loras(method: str) -> None:
    """Zero singular values would freeze a component for ever, both factors being zero."""
    model, x = TwoLayers(), torch.randn(5, 8, dtype=torch.float64)
    data = Calibration([x], lambda m, b: (m(b), float(len(b))))
    handle = adapt(model, recipe(modules=("live", "deaf", "thin"), method=method, oversample=0, passes=4), data)
    assert handle.report["dead_directions"] == {"deaf": 3, "thin": 2}
    adapters = {b.name: b.adapter for b in handle.bindings}
    for name, live in (("live", 3), ("deaf", 0), ("thin", 1)):
        a, b = adapters[name].A, adapters[name].B
        assert (b[:, :live].norm(dim=0) > 0).all() and not b[:, live:].any()
        assert (a.norm(dim=1) > 0).all()
        assert a[live:].abs().max() <= 8**-0.5 if live < 3 else True
    handle.optimizer(1e-2)
    handle.model(x).backward()
    assert adapters["thin"].B.grad[:, 1:].norm() > 0  # they learn


def test_gradients_that_vanish_or_overflow() -> None:
    """Tiny gradients give the same start; those that are no numbers are refused."""
    x = torch.randn(5, 8, dtype=torch.float64)
    starts = []
    for scale in (1.0, 1e-30):
        torch.manual_seed(0)
        handle = adapt(TwoLayers(), recipe(modules=("live",)), Calibration([x], lambda m, b, c=scale: (c * m(b), 1.0)))
        starts.append(handle.bindings[0].adapter.delta(handle.bindings[0].layer).detach())
    torch.testing.assert_close(starts[0], starts[1], rtol=1e-8, atol=1e-12)
    with pytest.raises(rankloom.errors.GradientError):
        adapt(TwoLayers(), recipe(modules=("live",)), Calibration([x], lambda m, b: (m(b * 1e200), 1.0)))


def test_automatic_gamma_is_the_best_of_the_grid() -> None:
    model, data = zoo.build("llama"), Calibration(zoo.batches("llama"))
    base = mean_loss(model, data)
    grid = (4.0, 64.0, 1024.0, 16384.0)
    handle = adapt(model, recipe("auto", grid=grid), data)
    chosen, table = handle.report["gamma"], handle.report["gamma_losses"]
    assert set(table) == set(grid) and table[chosen] == min(table.values()) < base
    assert mean_loss(model, data) == pytest.approx(table[chosen], rel=1e-12)
    chosen_state = {n: t.clone() for n, t in handle.state_dict().items()}
    handle.detach()
    # The very start that this gamma gives when it is asked for, and the losses its own gammas give.
    for gamma in grid:
        other = adapt(model, recipe(gamma), data)
        assert mean_loss(model, data) == pytest.approx(table[gamma], rel=1e-9)
        if gamma == chosen:
            for name, tensor in other.state_dict().items():
                torch.testing.assert_close(tensor, chosen_state[name], rtol=1e-12, atol=1e-15)
        other.detach()


def test_automatic_gamma_keeps_the_papers_where_nothing_helps() -> None:
    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        return model(**batch).loss + 10.0 * is_attached(model), 1.0

    handle = adapt(zoo.build("llama"), recipe("auto", grid=(16.0, 64.0)), Calibration(zoo.batches("llama"), loss))
    assert min(handle.report["gamma_losses"].values()) > handle.report["loss"]
    assert handle.report["gamma"] == 128.0
    for b in handle.bindings:
        assert float(torch.linalg.matrix_norm(b.adapter.delta(b.layer).detach(), 2)) == pytest.approx(
            b.adapter.scale / 128
        )


def test_a_magnitude_form_starts_at_the_moved_weight() -> None:
    """DoRA on top: the magnitude is taken from ``W0 + s B0 A0``, so the split itself changes nothing more."""
    plain = recipe()
    dora = dataclasses.replace(plain, adapter=DoRA(rank=RANK, alpha=ALPHA, scaling="rslora"))
    data = Calibration(zoo.batches("llama"))
    one, two = adapt(zoo.build("llama"), plain, data), adapt(zoo.build("llama"), dora, data)
    for a, b in zip(one.bindings, two.bindings, strict=True):
        torch.testing.assert_close(a.adapter.delta(a.layer), b.adapter.delta(b.layer), rtol=1e-10, atol=1e-13)


def test_without_data_it_says_so_and_leaves_the_model_alone() -> None:
    model = zoo.build("llama")
    with pytest.raises(rankloom.errors.CompositionError, match=r"one-step-gradient.*calibration.*kaiming"):
        adapt(model, recipe())
    with pytest.raises(rankloom.errors.GradientError, match="no gamma of the grid"):
        adapt(model, recipe("auto", grid=(4.0,)), Calibration(zoo.batches("llama"), nan_when_adapted))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(hasattr(m, "_rankloom_forward") for m in model.modules())


def nan_when_adapted(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    return model(**batch).loss * (float("nan") if is_attached(model) else 1.0), 1.0


def is_attached(model: nn.Module) -> bool:
    return any("rankloom" in m._modules for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"gamma": 0}, "gamma"), ({"grid": (1.0, -1.0)}, "grid"), ({"passes": 1}, "passes")],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(rankloom.errors.RecipeError, match=message):
        OneStepGradient(**settings).check()
