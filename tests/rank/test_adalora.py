"""AdaLoRA's budget (2303.10512): the card's invariants, with recursions and allocations written out in plain Python."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets, adapt
from rankloom.adapters import Dense, LoRA
from rankloom.errors import CompositionError, RecipeError
from rankloom.init import Gaussian, OwnStart
from rankloom.rank import AdaLoRA, AdaLoRASchedule
from rankloom.rank.adalora import decide
from rankloom.rank.importance import budget_at
from tests import zoo


def recipe(rank: int = 4, modules: Any = "all-linear", **settings: Any) -> Recipe:
    return Recipe(
        targets=Targets(modules),
        adapter=LoRA(rank=rank, alpha=rank, scaling="triplet", core="diagonal"),
        init=Gaussian(std=0.1),
        rank=AdaLoRA(**{"target_rank": 2, "warmup": 1, "final": 3, "interval": 1, **settings}),
    )


def run(
    steps: int, total: int, kind: str = "llama", **settings: Any
) -> tuple[rankloom.Adaptation, AdaLoRASchedule, Any]:
    handle = adapt(zoo.build(kind), recipe(**settings))
    optimizer = handle.optimizer(1e-2, total_steps=total)
    (schedule,) = handle.driver.schedules
    zoo.train(handle, optimizer, zoo.batches(kind), steps)
    return handle, schedule, optimizer


def live(handle: rankloom.Adaptation) -> int:
    return sum(int((b.adapter.E * b.adapter.mask != 0).sum()) for b in handle.bindings)


def test_budget_figures() -> None:
    """Invariant 2: the card's figures, the ends, and that it never rises."""
    plan = {"first": 144, "last": 96, "warmup": 10, "final": 20, "total": 100}
    assert {t: budget_at(t, **plan) for t in (11, 20, 40, 60, 79)} == {11: 141, 20: 126, 40: 104, 60: 97, 79: 96}
    whole = [budget_at(t, **plan) for t in range(101)]
    assert whole == sorted(whole, reverse=True)
    assert whole[:11] == [144] * 11 and set(whole[80:]) == {96}


def test_fractions_are_of_the_run_and_impossible_runs_are_refused() -> None:
    handle = adapt(zoo.build("convnet"), recipe(rank=4, warmup=0.1, final=0.3))
    handle.optimizer(1e-2, total_steps=50)
    (schedule,) = handle.driver.schedules
    assert (schedule.warmup, schedule.final) == (5, 15)
    with pytest.raises(RecipeError, match=r"total_steps"):
        handle.optimizer(1e-2)
    refused = adapt(zoo.build("convnet"), recipe(warmup=5, final=5))
    with pytest.raises(RecipeError, match=r"no steps left to act in: warmup 5 \+ final 5 of 10"):
        refused.optimizer(1e-2, total_steps=10)


def test_exactly_the_budget_survives_every_allocation() -> None:
    """Invariant 3, and the final phase: the pattern stays, pruned components stay at zero."""
    total = 14
    handle = adapt(zoo.build("llama"), recipe())
    optimizer = handle.optimizer(1e-2, total_steps=total)
    (schedule,) = handle.driver.schedules
    components, targets = 4 * len(handle.bindings), len(handle.bindings)
    counts, masks = [], []
    for step in range(1, total + 1):
        zoo.train(handle, optimizer, zoo.batches("llama"), 1, start=step)
        counts.append(live(handle))
        masks.append(torch.cat([b.adapter.mask for b in handle.bindings]))
        if step > 1:
            want = budget_at(step, first=components, last=2 * targets, warmup=1, final=3, total=total)
            assert counts[-1] == want == schedule.budget(step), step
    assert counts == sorted(counts, reverse=True) and counts[-1] == 2 * targets
    assert all(m.all() for m in masks[: total - 4]) and int(masks[-1].sum()) == 2 * targets
    assert all(torch.equal(m, masks[-1]) for m in masks[total - 4 :])


def test_between_allocations_a_pruned_component_may_come_back() -> None:
    handle, schedule, optimizer = run(4, 20, interval=4)
    assert live(handle) == schedule.budget(4) < 4 * len(handle.bindings)
    zoo.train(handle, optimizer, zoo.batches("llama"), 1)
    assert live(handle) == 4 * len(handle.bindings)
    zoo.train(handle, optimizer, zoo.batches("llama"), 3)
    assert live(handle) == schedule.budget(8)


def test_no_room_to_prune_is_no_crash() -> None:
    """``init rank == target rank`` asks for the 0-th smallest score, which crashes elsewhere."""
    handle, _, _ = run(10, 10, rank=2, target_rank=2)
    assert all(b.adapter.mask.all() for b in handle.bindings)


def pure_python(pairs: list[tuple[list[float], list[float]]], beta1: float, beta2: float) -> list[tuple[float, float]]:
    size = len(pairs[0][0])
    mean, spread = [0.0] * size, [0.0] * size
    for values, grads in pairs:
        for i, (p, g) in enumerate(zip(values, grads, strict=True)):
            s = abs(p * g)
            mean[i] = beta1 * mean[i] + (1 - beta1) * s
            spread[i] = beta2 * spread[i] + (1 - beta2) * abs(s - mean[i])
    return list(zip(mean, spread, strict=True))


def test_scores_against_a_recursion_in_plain_python() -> None:
    """Invariant 4: updated values, old gradients, five steps, and the triplet's score from them."""
    handle = adapt(zoo.build("convnet"), recipe(rank=3, modules=("mix",), beta1=0.8, beta2=0.6, orthogonality=0.1))
    optimizer = handle.optimizer(1e-2, total_steps=40)
    (schedule,) = handle.driver.schedules
    adapter = handle.bindings[0].adapter
    tensors = {"A": adapter.A, "B": adapter.B, "E": adapter.E}
    record: dict[str, list[tuple[list[float], list[float]]]] = {n: [] for n in tensors}
    original = schedule.after_step

    def spy(step: int) -> None:
        for n, t in tensors.items():
            record[n].append((t.detach().flatten().tolist(), t.grad.flatten().tolist()))
        original(step)

    schedule.after_step = spy
    zoo.train(handle, optimizer, zoo.batches("convnet"), 5)
    q = {}
    for n, pairs in record.items():
        want = pure_python(pairs, 0.8, 0.6)
        got = schedule.scores["mix"][n]
        np.testing.assert_allclose(got.mean.flatten(), [m for m, _ in want], rtol=1e-12)
        np.testing.assert_allclose(got.spread.flatten(), [s for _, s in want], rtol=1e-12)
        q[n] = np.array([m * s for m, s in want]).reshape(tensors[n].shape)
    triplets = [q["E"][i] + q["A"][i].mean() + q["B"][:, i].mean() for i in range(3)]
    np.testing.assert_allclose(schedule.component_scores(), triplets, rtol=1e-12)


def test_scores_follow_a_permutation_of_components() -> None:
    """Invariant 5."""
    _, schedule, _ = run(3, 40, kind="convnet", rank=3, target_rank=3)
    before = schedule.component_scores()
    order = torch.tensor([2, 0, 1])
    for tensors in schedule.scores.values():
        for name, s in tensors.items():
            s.mean, s.spread = (t[:, order] if name == "B" else t[order] for t in (s.mean, s.spread))
    want = torch.cat([part[order] for part in before.split(3)])
    assert torch.equal(schedule.component_scores(), want)


def test_ties_keep_the_earlier_component() -> None:
    assert decide(torch.tensor([0.0, 0.0, 0.0, 0.0]), 2).tolist() == [True, True, False, False]
    assert decide(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2).tolist() == [False, True, True, False]
    assert decide(torch.tensor([1.0, 2.0]), 0).tolist() == [False, False]
    assert decide(torch.tensor([1.0, 2.0]), 5).tolist() == [True, True]


class Deaf(nn.Module):
    """A layer the loss ignores beside one it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 6, dtype=torch.float64)
        self.idle = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return (self.used(x) + 0 * self.idle(x)).square().mean()


@pytest.mark.parametrize("target_rank", [1, 2, 3])
def test_dead_layers_do_not_change_the_count(target_rank: int) -> None:
    """All their scores are zero, a tie: exactly the budget is kept all the same, components at zero included."""
    model = Deaf()
    handle = adapt(model, recipe(rank=4, modules=("used", "idle"), target_rank=target_rank, orthogonality=0.0))
    optimizer = handle.optimizer(1e-2, total_steps=8)
    for _ in range(8):
        model(torch.ones(3, 6, dtype=torch.float64)).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = {b.name: int(b.adapter.mask.sum()) for b in handle.bindings}
    assert sum(kept.values()) == 2 * target_rank
    assert kept["used"] == min(4, 2 * target_rank)


def test_regulariser_against_numpy() -> None:
    """Invariant 7: zero for orthonormal factors, blind to the core, the mean over factors of norms that are not squared."""
    handle = adapt(zoo.build("convnet"), recipe(rank=3, orthogonality=0.25))
    handle.optimizer(1e-2, total_steps=40)
    (schedule,) = handle.driver.schedules
    zoo.perturb(handle, 0.3)
    norms = []
    for b in handle.bindings:
        a, up = b.adapter.A.detach().numpy(), b.adapter.B.detach().numpy()
        norms += [np.linalg.norm(a @ a.T - np.eye(3)), np.linalg.norm(up.T @ up - np.eye(3))]
    value = schedule.extra_loss(0)
    assert float(value.detach()) == pytest.approx(0.25 * sum(norms) / len(norms), rel=1e-12)
    with torch.no_grad():
        for b in handle.bindings:
            b.adapter.E += 1.0
    assert float(schedule.extra_loss(0).detach()) == float(value.detach())
    with torch.no_grad():
        for b in handle.bindings:
            b.adapter.A.copy_(torch.linalg.qr(b.adapter.A.T).Q.T)
            b.adapter.B.copy_(torch.linalg.qr(b.adapter.B).Q)
    assert float(schedule.extra_loss(0).detach()) < 1e-14
    schedule.extra_loss(0).backward()
    assert all(torch.isfinite(b.adapter.A.grad).all() for b in handle.bindings)  # a norm's gradient at zero
    off = adapt(zoo.build("convnet"), recipe(rank=3, orthogonality=0.0))
    off.optimizer(1e-2, total_steps=40)
    assert off.driver.schedules[0].extra_loss(0) is None


@pytest.mark.parametrize("micro", [1, 3])
def test_the_regulariser_reaches_the_gradient_once_a_step(micro: int) -> None:
    handle = adapt(zoo.build("convnet"), recipe(rank=3, orthogonality=0.25))
    optimizer = handle.optimizer(1e-2, total_steps=40)
    (schedule,) = handle.driver.schedules
    seen: list[list[Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([b.adapter.A.grad.clone() for b in handle.bindings]))
    factors = [b.adapter.A for b in handle.bindings]
    want = torch.autograd.grad(schedule.extra_loss(0), factors)
    for part in zoo.batches("convnet", micro):
        (handle.model(**part).loss / micro).backward()
    assert all(not a.grad.any() for a in factors)  # the core is zero, so the task says nothing about A yet
    handle.step()
    for got, w in zip(seen[0], want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-12, atol=1e-15)


def test_the_live_components_alone_reproduce_the_masked_model() -> None:
    """Invariant 6: rows where the mask is true, same scale; a layer may end with none."""
    handle, _, _ = run(12, 12, target_rank=1)
    ranks = []
    for b in handle.bindings:
        keep = b.adapter.mask
        ranks.append(int(keep.sum()))
        up = b.adapter.B[:, keep] * b.adapter.E[keep] * b.adapter.scale
        torch.testing.assert_close(up @ b.adapter.A[keep], b.adapter.delta(b.layer), rtol=1e-12, atol=1e-15)
    assert sum(ranks) == len(ranks)
    assert all(
        b.adapter.scale == pytest.approx(4 / (4 + 1e-5), rel=1e-12) for b in handle.bindings
    )  # never the live rank


@pytest.mark.parametrize("stop", [2, 6, 10])
def test_restored_mid_schedule_it_goes_on_bit_for_bit(stop: int) -> None:
    """Invariant 8: warm-up, pruning, final phase."""
    total = 12
    straight, schedule, _ = run(total, total)
    broken, _, optimizer = run(stop, total)
    buffer = io.BytesIO()
    torch.save([dict(broken.state_dict()), broken.schedule_state(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    tensors, state, moments = torch.load(buffer, weights_only=True)
    resumed = adapt(zoo.build("llama"), recipe(), seed=5)
    optimizer = resumed.optimizer(1e-2, total_steps=total)
    resumed.load_state_dict(tensors)
    resumed.load_schedule_state(state)
    optimizer.load_state_dict(moments)
    zoo.train(resumed, optimizer, zoo.batches("llama"), total - stop, start=stop)
    for one, other in zip(straight.bindings, resumed.bindings, strict=True):
        for (name, a), b in zip(one.adapter.state_dict().items(), other.adapter.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    (again,) = resumed.driver.schedules
    for key, value in schedule.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_a_schedule_of_another_run_is_refused() -> None:
    handle, _, _ = run(2, 12, kind="convnet", rank=3)
    state = handle.schedule_state()
    other = adapt(zoo.build("llama"), recipe())
    other.optimizer(1e-2, total_steps=12)
    with pytest.raises(rankloom.errors.ArtifactError, match="schedule state does not fit"):
        other.load_schedule_state(state)


def test_it_needs_rankable_components() -> None:
    with pytest.raises(
        CompositionError, match=r"rank 'adalora' needs ranked components.*'lora'.*lora\(core=diagonal\)"
    ):
        Recipe(rank=AdaLoRA()).check()
    with pytest.raises(CompositionError, match=r"'adalora' needs ranked components, which adapter 'dense'"):
        Recipe(adapter=Dense(), init=OwnStart(), rank=AdaLoRA()).check()
    with pytest.raises(RecipeError, match="interval"):
        AdaLoRA(interval=0).check()


def test_a_skipped_optimizer_step_skips_the_score() -> None:
    """As a loss scaler does on overflow: no step, no event."""
    handle, schedule, _ = run(2, 12, kind="convnet", rank=3)
    before = schedule.component_scores().clone()
    handle.model(**zoo.batch("convnet")).loss.backward()
    assert torch.equal(before, schedule.component_scores()) and handle.driver.step == 2
    assert math.isfinite(handle.step())
    assert not torch.equal(before, schedule.component_scores()) and handle.driver.step == 3
