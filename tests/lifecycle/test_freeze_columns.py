"""LaMDA: the core's gradient, and columns of B that stay to the bit where they froze, whatever the optimizer does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rankloom
from rankloom.errors import CompositionError, RecipeError
from rankloom.kernels import lowrank
from rankloom.lifecycle.freeze_columns import frozen_columns
from tests import zoo


def started(total: int = 20, **changes: Any) -> tuple[rankloom.Adaptation, torch.optim.Optimizer]:
    recipe = rankloom.methods.get("lamda").with_(
        {"adapter.rank": 4, "targets.modules": ("q_proj", "down_proj"), **changes}
    )
    handle = rankloom.adapt(zoo.build("llama"), recipe)
    return handle, handle.optimizer(1e-2, total_steps=total, weight_decay=0.3, max_grad_norm=0.5)


def step(handle: rankloom.Adaptation) -> None:
    handle.model.train()
    handle.model(**zoo.batch("llama")).loss.backward()
    handle.step()


def columns(handle: rankloom.Adaptation) -> list[Tensor]:
    return [b.adapter.B.detach().clone() for b in handle.bindings]


def test_the_rule() -> None:
    """``f(0) = 0``, monotone, one column every ``eta T / r`` steps, all of them at ``eta T``."""
    for rank, total, eta in ((8, 100, 0.3), (5, 37, 0.3), (64, 1000, 0.7), (3, 10, 0.1)):
        counts = [frozen_columns(t, rank, eta * total) for t in range(total + 1)]
        assert counts[0] == 0 and counts == sorted(counts)
        assert counts[-1] == rank and all(c == rank for t, c in enumerate(counts) if t >= eta * total)
        assert all(c < rank for t, c in enumerate(counts) if t < eta * total - 1e-6)
    assert [frozen_columns(t, 4, 8.0) for t in range(9)] == [0, 0, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("init", ["kaiming", "weight-svd"])
def test_frozen_columns_stay_to_the_bit(init: str) -> None:
    """Under momentum and weight decay; the others move at every step, the core to the end."""
    handle, _ = started(init=init, **{"lifecycle.eta": 0.5})
    frozen_at: dict[int, list[Tensor]] = {}
    for t in range(1, 21):
        before, cores = columns(handle), [b.adapter.R.detach().clone() for b in handle.bindings]
        step(handle)
        count = frozen_columns(t - 1, 4, 10.0)  # while this step was taken
        for b, old, core in zip(handle.bindings, before, cores, strict=True):
            assert torch.equal(b.adapter.B[:, :count], old[:, :count])
            assert (b.adapter.B[:, count:] != old[:, count:]).any(0).all()
            assert not torch.equal(b.adapter.R, core)
        for column in range(frozen_columns(t, 4, 10.0)):
            frozen_at.setdefault(column, [b[:, column] for b in columns(handle)])
    for column, held in frozen_at.items():
        assert all(torch.equal(b[:, column], h) for b, h in zip(columns(handle), held, strict=True))
    assert len(frozen_at) == 4


def test_what_is_left_to_train_is_the_core_and_the_optimizer_forgets_the_rest() -> None:
    handle, optimizer = started()
    for _ in range(6):  # eta T
        assert len(optimizer.state) in (0, 2 * len(handle.bindings))
        step(handle)
    trained = [p for p in handle.parameters() if p.requires_grad]
    assert [p.numel() for p in trained] == [16] * len(handle.bindings)
    assert set(optimizer.state) == set(trained)
    step(handle)
    assert all(b.adapter.B.grad is None for b in handle.bindings)


def test_frozen_columns_do_not_count_in_the_norm_that_clips() -> None:
    handle, _ = started(total=40)
    for _ in range(9):
        step(handle)
    handle.model(**zoo.batch("llama")).loss.backward()
    count = frozen_columns(9, 4, 12.0)
    live = [b.adapter.B.grad[:, count:] for b in handle.bindings] + [b.adapter.R.grad for b in handle.bindings]
    want = sum(float(g.square().sum()) for g in live) ** 0.5
    assert 0 < count < 4 and handle.step() == pytest.approx(want, rel=1e-12)


def test_a_second_run_trains_b_again() -> None:
    handle, _ = started(total=4)
    for _ in range(4):
        step(handle)
    assert not any(b.adapter.B.requires_grad for b in handle.bindings)
    handle.optimizer(1e-2, total_steps=8)
    before = columns(handle)
    step(handle)
    assert all((old != b.adapter.B).any() for b, old in zip(handle.bindings, before, strict=True))


def test_the_gradient_of_the_core_and_what_the_backward_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """``dL/dR = s B^T G A^T``, and no tensor of the input's width is kept for it."""
    monkeypatch.setattr(lowrank, "forming_pays", lambda *_: False)  # as it is with a layer's real sides
    handle, _ = started()
    zoo.perturb(handle)
    b = handle.bindings[0]
    x = torch.randn(50, 16, dtype=torch.float64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = b.adapter.forward(x, b.layer)
    assert [tuple(t.shape) for t in kept if 50 in t.shape] == [(4, 50)]
    out.pow(3).sum().backward()
    dense = (b.layer.weight() + b.adapter.delta(b.layer).detach()).requires_grad_()
    (x @ dense.T).pow(3).sum().backward()
    want = b.adapter.scale * b.adapter.B.T @ dense.grad @ b.adapter.A.T
    torch.testing.assert_close(b.adapter.R.grad, want, rtol=1e-9, atol=1e-9)
    assert b.adapter.A.grad is None and not b.adapter.A.requires_grad


def test_what_cannot_work_is_refused() -> None:
    recipe = rankloom.methods.get("lamda")
    for eta in (0.0, 1.5):
        with pytest.raises(RecipeError, match="lifecycle eta"):
            recipe.with_({"lifecycle.eta": eta})
    with pytest.raises(CompositionError, match=r"'freeze-columns' needs trained B, which adapter 'lora\(train=A\)'"):
        rankloom.methods.get("cora").with_(lifecycle="freeze-columns").check()
    with pytest.raises(RecipeError, match="pass its length"):
        zoo.adapted("lamda", zoo.build("llama"), "llama").optimizer(1e-2)
