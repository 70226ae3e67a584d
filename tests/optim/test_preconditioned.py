"""The pairs' view and the optimizer around them: batched equals one by one, state and hooks are torch's, the rest is AdamW's."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import rankloom
from rankloom import Recipe
from rankloom.adapters import Dense, DoRA, LoRA, Trainable
from rankloom.errors import CompositionError
from rankloom.init import OwnStart
from rankloom.optim import (
    AdamW,
    ALLoRA,
    LoRAPlus,
    LoRAPro,
    OptimizerPart,
    PreconditionedOptimizer,
    Riemannian,
    find_pairs,
    stacked,
)
from tests import zoo
from tests.optim.toy import Toy, rand, toy

PARTS: dict[str, OptimizerPart] = {
    "riemannian": Riemannian(damping=1e-3),
    "riemannian-sgd": Riemannian(inner="sgd", momentum=0.9, damping=1e-3),
    "riemannian-direction": Riemannian(acts_on="direction", damping=1e-1),
    "riemannian-gauss-seidel": Riemannian(order="gauss-seidel", damping=1e-3),
    "riemannian-plus": Riemannian(lr_ratio=4.0, damping=1e-3),
    "lora-pro": LoRAPro(),
    "lora-pro-symmetric": LoRAPro(split="symmetric"),
    "lora-pro-sgd": LoRAPro(inner="sgd"),
    "lora-pro-full": LoRAPro(moments="full"),
    "allora": ALLoRA(),
    "allora-direction": ALLoRA(acts_on="direction"),
}
every_part = pytest.mark.parametrize("name", PARTS)


def several() -> list[Toy]:
    """Five weights of three shapes, scales and ranks all different."""
    shapes = [(7, 6, 3, 1.0), (7, 6, 3, 2.0), (6, 7, 3, 0.5), (7, 6, 2, 1.5), (7, 6, 3, 3.0)]
    return [toy(*shape, seed=20 * i, name=f"layer{i}") for i, shape in enumerate(shapes)]


def run(optimizer: torch.optim.Optimizer, toys: list[Toy], steps: int = 4) -> None:
    for step in range(steps):
        for of in toys:
            of.g = rand(1000 * step + int(of.name[-1]), *of.g.shape)
            of.backward()
        optimizer.step()
        optimizer.zero_grad()


@every_part
def test_all_pairs_together_equal_one_by_one(name: str) -> None:
    together, apart = several(), several()
    run(PARTS[name].build([t for of in together for t in of.trainables], 0.05), together)
    for of in apart:
        run(PARTS[name].build(of.trainables, 0.05), [of])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one.a, other.a, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one.b, other.b, rtol=1e-10, atol=1e-12)


def test_pairs_of_one_shape_are_one_stack() -> None:
    toys = several()
    for of in toys:
        of.backward()
    pairs = find_pairs([t for of in reversed(toys) for t in reversed(of.trainables)])
    stacks = list(stacked(pairs, {p: p.grad for pair in pairs for p in pair.factors}))
    assert sorted(len(members) for members, _ in stacks) == [1, 1, 3]
    for members, stack in stacks:
        for i, pair in enumerate(members):
            assert torch.equal(stack.a[i], pair.a) and torch.equal(stack.b[i], pair.b)
            assert torch.equal(stack.grad_a[i], pair.a.grad) and torch.equal(stack.grad_b[i], pair.b.grad)
            assert float(stack.scale[i]) == pair.scale
            torch.testing.assert_close(stack.gram_a[i], pair.a @ pair.a.mT)
            torch.testing.assert_close(stack.gram_b[i], pair.b.mT @ pair.b)


def test_a_frozen_or_foreign_factor_makes_no_pair() -> None:
    of, other = toy(), toy(seed=9, name="other")
    rest = [Trainable("whole.A", nn.Parameter(rand(0, 2, 2)), "whole", None), other.trainables[1]]
    [pair] = find_pairs([*of.trainables, *rest])
    assert pair.a is of.a and pair.b is of.b
    with pytest.raises(CompositionError, match=r"no adapted weight trains both an A and a B; use optimizer='adamw'"):
        find_pairs(rest)


@every_part
def test_half_precision_pairs_are_solved_in_float32(name: str) -> None:
    """The step of narrow factors is the float32 one, rounded once."""
    of = toy(20, 16, 4)
    of.a.data, of.b.data = of.a.data.bfloat16(), of.b.data.bfloat16()
    grads = [
        (of.scale * product).bfloat16() for product in (of.b.data.double().mT @ of.g, of.g @ of.a.data.double().mT)
    ]
    moved = []
    for dtype in (torch.bfloat16, torch.float32):
        each = Toy(*(nn.Parameter(p.data.to(dtype, copy=True)) for p in (of.a, of.b)), of.g, of.scale)
        optimizer = PARTS[name].build(each.trainables, 1.0)
        each.a.grad, each.b.grad = (g.to(dtype) for g in grads)
        [(_, stack)] = stacked(find_pairs(each.trainables), {each.a: each.a.grad, each.b: each.b.grad})
        assert {t.dtype for t in stack} == {torch.float32}
        optimizer.step()
        assert each.a.dtype == each.b.dtype == dtype
        assert not torch.allclose(each.a.double(), of.a.double(), rtol=0, atol=2**-4)
        moved.append([each.a.detach().float(), each.b.detach().float()])
    # bfloat16 rounds at 2**-9 relative: in what the inner optimizer is fed, and in what it writes.
    torch.testing.assert_close(moved[0], moved[1], rtol=2**-7, atol=2**-6)


@every_part
def test_what_is_in_no_pair_follows_the_inner_optimizer_bit_for_bit(name: str) -> None:
    part = PARTS[name]
    of, head, bias = toy(), nn.Parameter(rand(1, 3, 4)), nn.Parameter(rand(2, 5))
    twins = nn.Parameter(head.detach().clone()), nn.Parameter(bias.detach().clone())
    rest = [Trainable("whole.head", head, "whole", None), Trainable("whole.bias", bias, "whole", None)]
    optimizer = part.build([rest[0], *of.trainables, rest[1]], 0.05, weight_decay=0.1)
    ratio = getattr(part, "lr_ratio", 1.0)
    groups = [{"params": [twins[0]], "weight_decay": 0.1}, {"params": [twins[1]], "lr": 0.05 * ratio}]
    plain: torch.optim.Optimizer
    if getattr(part, "inner", "adamw") == "sgd":
        plain = torch.optim.SGD(groups, lr=0.05, momentum=part.momentum)  # type: ignore[attr-defined]
    else:
        plain = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.0, fused=True)
    for step in range(4):
        of.backward()
        for p, twin in zip((head, bias), twins, strict=True):
            p.grad = rand(50 + step, *p.shape)
            twin.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    assert torch.equal(head, twins[0]) and torch.equal(bias, twins[1])


def through_disk(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "one-cycle": lambda o: OneCycleLR(o, max_lr=0.1, total_steps=20, cycle_momentum=False),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@every_part
def test_resume_is_bit_exact_under_a_scheduler(name: str, scheduler: str) -> None:
    def go(optimizer: torch.optim.Optimizer, rates: Any, toys: list[Toy], steps: range) -> None:
        for step in steps:
            for of in toys:
                of.g = rand(1000 * step + int(of.name[-1]), *of.g.shape)
                of.backward()
            optimizer.step()
            rates.step()
            optimizer.zero_grad()

    def start(toys: list[Toy]) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = PARTS[name].build([t for of in toys for t in of.trainables], 0.05, weight_decay=0.01)
        return optimizer, SCHEDULERS[scheduler](optimizer)

    straight = several()
    go(*start(straight), straight, range(7))
    broken = several()
    optimizer, rates = start(broken)
    go(optimizer, rates, broken, range(3))
    saved = through_disk((optimizer.state_dict(), rates.state_dict()))
    values = [(of.a.detach().clone(), of.b.detach().clone()) for of in broken]
    resumed = several()
    optimizer, rates = start(resumed)
    optimizer.load_state_dict(saved[0])
    rates.load_state_dict(saved[1])
    with torch.no_grad():
        for of, (a, b) in zip(resumed, values, strict=True):
            of.a.copy_(a)
            of.b.copy_(b)
    go(optimizer, rates, resumed, range(3, 7))
    for one, other in zip(straight, resumed, strict=True):
        assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)


@every_part
def test_a_learning_rate_of_zero_moves_nothing(name: str) -> None:
    toys = several()
    optimizer = PARTS[name].build([t for of in toys for t in of.trainables], 0.05, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(optimizer, toys)
    for of, same in zip(toys, several(), strict=True):
        assert torch.equal(of.a, same.a) and torch.equal(of.b, same.b)


@every_part
def test_gradients_are_left_as_they_were(name: str) -> None:
    """Schedules read sensitivities from gradients after the step: those have to be the loss's own."""
    of = toy()
    optimizer = PARTS[name].build(of.trainables, 0.05)
    of.backward()
    before = of.a.grad, of.b.grad, of.a.grad.clone(), of.b.grad.clone()
    optimizer.step()
    assert of.a.grad is before[0] and of.b.grad is before[1]
    assert torch.equal(of.a.grad, before[2]) and torch.equal(of.b.grad, before[3])


@every_part
def test_a_pair_without_gradients_stays(name: str) -> None:
    used, idle = toy(), toy(seed=7, name="idle")
    optimizer = PARTS[name].build([*idle.trainables, *used.trainables], 0.05, weight_decay=0.1)
    start = idle.a.detach().clone(), idle.b.detach().clone(), used.a.detach().clone()
    used.backward()
    optimizer.step()
    assert torch.equal(idle.a, start[0]) and torch.equal(idle.b, start[1]) and not torch.equal(used.a, start[2])
    assert idle.a.grad is None


@every_part
def test_a_step_that_fails_leaves_weights_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = toy()
    optimizer = PARTS[name].build(of.trainables, 0.05)
    of.backward()
    before = of.a.detach().clone(), of.b.detach().clone(), of.a.grad, of.b.grad

    def fail() -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(optimizer.inner, "step", fail)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()
    assert torch.equal(of.a, before[0]) and torch.equal(of.b, before[1])
    assert of.a.grad is before[2] and of.b.grad is before[3]


@every_part
def test_hooks_run_once_and_closures_run(name: str) -> None:
    """torch wraps ``step`` of the class an optimizer is made of: a subclass of AdamW would run its hooks twice."""
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).step()
    of, calls = toy(), []
    optimizer = PARTS[name].build(of.trainables, 0.05)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> float:
        of.backward()
        return 1.5

    start = of.a.detach().clone()
    assert optimizer.step(closure) == 1.5
    assert calls == ["before", "after"] and not torch.equal(of.a, start)


def test_groups_and_state_are_the_inner_optimizers() -> None:
    toys = several()
    optimizer = Riemannian(lr_ratio=3.0).build([t for of in toys for t in of.trainables], 0.1)
    assert isinstance(optimizer, PreconditionedOptimizer) and isinstance(optimizer.inner, torch.optim.AdamW)
    run(optimizer, toys, 2)
    for _ in range(2):
        assert optimizer.param_groups is optimizer.inner.param_groups and optimizer.state is optimizer.inner.state
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.3])
        assert set(optimizer.state[toys[0].a]) == {"step", "exp_avg", "exp_avg_sq"}
        optimizer.load_state_dict(through_disk(optimizer.state_dict()))


def test_weight_decay_is_decoupled_and_not_preconditioned() -> None:
    for part in PARTS.values():
        if getattr(part, "momentum", 0.0):
            continue  # torch's SGD puts decay into its momentum
        moved = {}
        for decay in (0.0, 0.1):
            of = toy()
            optimizer = part.build(of.trainables, 0.05, weight_decay=decay)
            of.backward()
            optimizer.step()
            moved[decay] = of.a.detach()
        torch.testing.assert_close(moved[0.1], moved[0.0] - 0.05 * 0.1 * toy().a.detach(), rtol=1e-9, atol=1e-10)


def test_clipping_by_the_global_norm_scales_the_step() -> None:
    """A transform that is linear in the gradients passes the factor on: direction and relative sizes stay."""
    steps = {}
    for clip in (None, 1e-3):
        handle = zoo.adapted(zoo.recipe_of("lora-pro").with_(optimizer={"inner": "sgd"}), zoo.build("llama"), "llama")
        zoo.perturb(handle)
        before = {n: t.clone() for n, t in handle.state_dict().items()}
        optimizer = handle.optimizer(1e-3, max_grad_norm=clip)
        zoo.train(handle, optimizer, zoo.batches("llama", 1), 1)
        factor = 1.0 if clip is None else clip / handle.driver.grad_norm
        assert factor <= 1.0
        steps[clip] = {n: (t - before[n]) / factor for n, t in handle.state_dict().items()}
    for name, step in steps[None].items():
        torch.testing.assert_close(steps[1e-3][name], step, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["riemannian", "lora-pro", "allora"])
def test_forms_without_a_trained_pair_are_refused(optimizer: str) -> None:
    for adapter, named in ((Dense(), "dense"), (LoRA(core="diagonal"), "lora(core=diagonal)")):
        init = OwnStart() if named == "dense" else Recipe().init
        with pytest.raises(CompositionError) as caught:
            Recipe(adapter=adapter, init=init).with_(optimizer=optimizer).check()
        message = str(caught.value)
        assert f"optimizer {optimizer!r} needs trained pairs, which adapter {named!r} does not have" in message
        assert "it works with adapter 'lora', adapter 'dora'" in message
    Recipe(adapter=DoRA()).with_(optimizer=optimizer).check()


def test_lora_plus_groups() -> None:
    of = toy()
    table = Toy(nn.Parameter(rand(3, 2, 9)), nn.Parameter(rand(4, 5, 2)), rand(5, 5, 9), 1.0, "table")
    lookups = [t._replace(lookup=True) for t in table.trainables]
    rest = [
        Trainable("m", nn.Parameter(rand(6, 7)), "magnitude", "layer"),
        Trainable("whole.w", nn.Parameter(rand(7, 2, 2)), "whole", None),
    ]
    optimizer = LoRAPlus(lr_ratio=16, weight_decay=0.1).build([*of.trainables, *lookups, *rest], 1e-3)
    groups = {
        round(g["lr"], 9): ([tuple(p.shape) for p in g["params"]], g["weight_decay"])
        for g in optimizer.param_groups
        if g["params"][0].ndim > 1
    }
    assert groups == {1e-3: ([(3, 6), (2, 2)], 0.1), 16e-3: ([(7, 3)], 0.1), 1e-6: ([(2, 9), (5, 2)], 0.1)}
    [vectors] = [g for g in optimizer.param_groups if g["params"][0].ndim == 1]
    assert vectors["lr"] == 16e-3 and vectors["weight_decay"] == 0
    same = LoRAPlus(embedding_lr=None).build([*of.trainables, *lookups], 1e-3)
    assert [g["lr"] for g in same.param_groups] == [1e-3, 16e-3]


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_lora_plus_with_a_ratio_of_one_is_adamw_bit_for_bit(adapter: str) -> None:
    results = []
    for part in (AdamW(weight_decay=0.1), LoRAPlus(lr_ratio=1.0, weight_decay=0.1)):
        recipe = zoo.tiny(Recipe(adapter=LoRA() if adapter == "lora" else DoRA(), optimizer=part))
        handle = zoo.adapted(recipe, zoo.build("llama"), "llama")
        zoo.train(handle, handle.optimizer(1e-2), zoo.batches("llama"), 4)
        results.append(handle.state_dict())
    assert all(torch.equal(results[0][n], t) for n, t in results[1].items())


@pytest.mark.parametrize("name", ["riemannian", "lora-pro", "allora", "lora-plus"])
def test_the_driver_counts_each_step_once(name: str) -> None:
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).step()
    handle = rankloom.adapt(zoo.build("llama"), zoo.recipe_of(name))
    zoo.train(handle, handle.optimizer(1e-2), zoo.batches("llama"), 3)
    assert handle.driver.step == 3
