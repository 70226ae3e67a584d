"""The driver: events in order, once a step; the first-step check; gradients that are no numbers; clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankloom
from rankloom import Recipe, Targets, adapt
from rankloom.adapters import LoRA
from rankloom.drive import Driver
from rankloom.errors import GradientError, RankloomError
from rankloom.events import Schedule
from rankloom.init import Gaussian
from tests import zoo

METHODS = tuple(rankloom.methods.TABLE)


class Spy(Schedule):
    """Writes down every event and what the weights and gradients were."""

    interval = 2

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.log, self.before = parameter, [], None

    def before_forward(self, step: int) -> None:
        self.log.append(("before_forward", step))

    def extra_loss(self, step: int) -> Tensor:
        self.log.append(("extra_loss", step))
        return 3.0 * self.parameter.sum()

    def after_backward(self, step: int) -> None:
        self.log.append(("after_backward", step))
        self.before = self.parameter.detach().clone()
        self.grad = self.parameter.grad.clone()

    def after_step(self, step: int) -> None:
        self.log.append(("after_step", step))
        assert not torch.equal(self.before, self.parameter)
        assert torch.equal(self.grad, self.parameter.grad)

    def on_interval(self, step: int) -> None:
        self.log.append(("on_interval", step))

    def on_task_end(self) -> None:
        self.log.append(("on_task_end", None))

    def on_export(self) -> None:
        self.log.append(("on_export", None))


def spied(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[rankloom.Adaptation, Spy, torch.optim.Optimizer]:
    handle = adapt(zoo.build("convnet"), Recipe(adapter=LoRA(rank=2)))
    spy = Spy(handle.bindings[0].adapter.A)
    monkeypatch.setattr(type(handle.recipe.rank), "build", lambda self, bindings, total: spy)
    return handle, spy, handle.optimizer(1e-2, **settings)


def test_events_come_in_order_and_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, spy, optimizer = spied(monkeypatch)
    handle.model.train()
    for _ in range(2):
        for part in zoo.batches("convnet", 2):  # two micro-batches a step
            handle.model(**part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    one = ["before_forward", "before_forward", "extra_loss", "after_backward", "after_step"]
    assert [e for e, _ in spy.log] == [*one, *one, "on_interval"]
    assert [s for _, s in spy.log] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
    handle.model.eval()(**zoo.batch("convnet"))
    assert len(spy.log) == 11  # no event outside training
    handle.end_task()
    handle._exporting()
    assert [e for e, _ in spy.log[11:]] == ["on_task_end", "on_export"]


def test_forward_events_stop_while_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, spy, _ = spied(monkeypatch)
    handle.detach().train()(**zoo.batch("convnet"))
    assert spy.log == []
    handle.attach()
    handle.model.train()(**zoo.batch("convnet"))
    assert spy.log == [("before_forward", 0)]


def test_extra_losses_add_their_gradient_once(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, spy, optimizer = spied(monkeypatch)
    for _ in range(3):
        handle.model(**zoo.batch("convnet")).loss.backward()
    plain = handle.bindings[0].adapter.A.grad.clone()
    optimizer.step()
    torch.testing.assert_close(spy.grad, plain + 3.0)


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_clipping_counts_everything(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    """The norm is over all trainable tensors with the extra losses in it, as reported before clipping."""
    handle, spy, _ = spied(monkeypatch, max_grad_norm=limit)
    handle.model(**zoo.batch("convnet")).loss.backward()
    grads = {id(p): p.grad.clone() for p in handle.parameters()}
    grads[id(spy.parameter)] += 3.0
    norm = float(torch.cat([g.flatten() for g in grads.values()]).norm())
    assert handle.step() == pytest.approx(norm, rel=1e-9)
    factor = min(1.0, limit / norm)
    torch.testing.assert_close(spy.grad, grads[id(spy.parameter)] * factor, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_no_numbers_stop_without_touching_weights(method: str, value: float) -> None:
    handle = zoo.adapted(method, zoo.build("llama"), "llama")
    optimizer = handle.optimizer(1e-2, total_steps=9)
    zoo.train(handle, optimizer, zoo.batches("llama"), 2)
    before = {n: t.clone() for n, t in handle.state_dict().items()}
    state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in handle.schedule_state().items()}
    (handle.model(**zoo.batch("llama")).loss * value).backward()
    with pytest.raises(GradientError, match=r"the gradient of .+ is not finite at step 3; no weight was changed"):
        handle.step()
    assert all(torch.equal(t, before[n]) for n, t in handle.state_dict().items())
    for key, old in state.items():
        new = handle.schedule_state()[key]
        assert torch.equal(new, old) if isinstance(old, Tensor) else new == old
    optimizer.zero_grad()
    zoo.train(handle, optimizer, zoo.batches("llama"), 1)  # and the run can go on
    assert all(torch.isfinite(t).all() for t in handle.state_dict().values())


def test_the_tensor_that_is_no_number_is_named() -> None:
    handle = adapt(zoo.build("llama"), Recipe(adapter=LoRA(rank=2), init=Gaussian()))
    handle.optimizer(1e-2)
    handle.model(**zoo.batch("llama")).loss.backward()
    handle.named_parameters()["model.layers.1.mlp.up_proj.B"].grad[0, 0] = float("nan")
    with pytest.raises(GradientError, match=r"the gradient of model\.layers\.1\.mlp\.up_proj\.B is not finite"):
        handle.step()


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_an_unused_module_is_named_at_the_first_step() -> None:
    model = Unused()
    handle = adapt(model, Recipe(targets=Targets(("used", "idle")), adapter=LoRA(rank=2)))
    handle.optimizer(1e-2)
    before = [p.detach().clone() for p in handle.parameters()]
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(GradientError, match=r"no gradient reached idle\.A, idle\.B: .*targets\.exclude"):
        handle.step()
    assert all(torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))
    handle.optimizer(1e-2, allow_unused=True)
    handle.step()
    assert handle.driver.step == 1
    # Only the first step insists: experts that rest later are fine.
    other = adapt(Unused(), Recipe(targets=Targets(("used",)), adapter=LoRA(rank=2)))
    other.optimizer(1e-2)
    other.model(torch.ones(2, 4)).sum().backward()
    other.step()
    other.step()
    assert other.driver.step == 2


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.head = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.first(x), use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_checkpointing_with_frozen_inputs_is_named() -> None:
    """The classic: reentrant checkpoints run the block without gradients, and only the head learns, in silence."""
    model, x = Checkpointed(), torch.ones(2, 4)
    handle = adapt(model, Recipe(targets=Targets(("block",), train=("head",)), adapter=LoRA(rank=2)))
    handle.optimizer(1e-2)
    model(x).sum().backward()
    with pytest.raises(GradientError, match=r"no gradient reached block\.A, block\.B: .*enable_input_require_grads"):
        handle.step()
    handle.optimizer(1e-2).zero_grad()
    model(x.requires_grad_()).sum().backward()  # what enable_input_require_grads does
    handle.step()
    assert handle.driver.step == 1


def test_before_the_optimizer_there_is_nothing_to_drive() -> None:
    handle = adapt(zoo.build("convnet"), Recipe(adapter=LoRA(rank=2)))
    for call in (handle.step, handle.schedule_state, handle.end_task):
        with pytest.raises(RankloomError, match=r"call adaptation\.optimizer"):
            call()


def test_schedules_without_hooks_cost_no_hook() -> None:
    handle = adapt(zoo.build("convnet"), Recipe(adapter=LoRA(rank=2)))
    handle.optimizer(1e-2)
    assert not handle.model._forward_pre_hooks
    assert isinstance(handle.driver, Driver) and handle.driver.state_dict() == {"step": 0}
