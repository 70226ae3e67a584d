"""Chains of links: what a merge leaves alone, what the links add up to, and the theory of random sketches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import DoRA, LoRA
from rankloom.errors import CompositionError, RecipeError
from rankloom.lifecycle import MergeAndRestart
from rankloom.rank import AdaLoRA
from tests import zoo

N, RANK = 30, 3


class Quadratic(nn.Module):
    """``f(W) = 1/2 ||W - W*||^2``: the identity goes in, so the layer's output is the weight."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layer = nn.Linear(N, N, bias=False, dtype=torch.float64)
        self.goal = torch.randn(N, N, generator=generator, dtype=torch.float64)

    def forward(self) -> SimpleNamespace:
        weight = self.layer(torch.eye(N, dtype=torch.float64)).T
        return SimpleNamespace(logits=weight, loss=0.5 * (weight - self.goal).square().sum())


def chain(every: int = 3, train: str = "all", alpha: float = 6.0, **settings: Any) -> Recipe:
    return Recipe(
        targets=Targets(("q_proj", "v_proj")),
        adapter=LoRA(rank=RANK, alpha=alpha, train=train),
        lifecycle=MergeAndRestart(every=every, **settings),
    )


def on_quadratic(train: str, seed: int = 0) -> tuple[rankloom.Adaptation, Any, Any]:
    recipe = chain(every=1, train=train).with_(targets={"modules": ("layer",)})
    handle = rankloom.adapt(Quadratic(), recipe, seed=seed)
    handle.optimizer(0.0)
    return handle, handle.bindings[0].adapter, handle.driver.schedules[0]


def natural_step(handle: rankloom.Adaptation, adapter: Any, gamma: float = 1.0) -> Tensor:
    """The trained factor's gradient over the frozen one's Gram matrix. Returns the projector of the frozen factor."""
    handle.model().loss.backward()
    a, b, s = adapter.A.detach(), adapter.B.detach(), adapter.scale
    with torch.no_grad():
        if "A" in adapter.trained():
            adapter.A -= gamma * torch.linalg.pinv(s**2 * b.T @ b) @ adapter.A.grad
            adapter.A.grad = None
            return b @ torch.linalg.pinv(b.T @ b) @ b.T
        adapter.B -= gamma * adapter.B.grad @ torch.linalg.pinv(s**2 * a @ a.T)
        adapter.B.grad = None
        return a.T @ torch.linalg.pinv(a @ a.T) @ a


@pytest.mark.parametrize("train", ["A", "B"])
def test_a_link_is_a_projected_gradient_step(train: str) -> None:
    handle, adapter, schedule = on_quadratic(train)
    model: Any = handle.model
    for _ in range(3):
        before, gamma = model().logits.detach(), 0.7
        gradient = before - model.goal
        projector = natural_step(handle, adapter, gamma)
        torch.testing.assert_close(projector @ projector, projector)
        assert torch.linalg.matrix_rank(projector) == RANK
        want = projector @ gradient if train == "A" else gradient @ projector
        torch.testing.assert_close(model().logits.detach(), before - gamma * want, rtol=1e-10, atol=1e-10)
        schedule.on_interval(1)
        torch.testing.assert_close(model().logits.detach(), before - gamma * want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("train", ["A", "B"])
def test_random_sketches_average_to_a_multiple_of_the_identity_and_contract_as_they_should(train: str) -> None:
    handle, adapter, schedule = on_quadratic(train)
    model: Any = handle.model
    links, total = 150, torch.zeros(N, N, dtype=torch.float64)
    first = float(model().loss.detach())
    for _ in range(links):
        total += natural_step(handle, adapter)
        schedule.on_interval(1)
    last = float(model().loss.detach())
    rate = (last / first) ** (1 / links)
    assert abs(rate - (1 - RANK / N)) < 0.01, rate
    # Entries of a projector have a standard deviation below sqrt(r)/n; five of them, of a mean over the links.
    torch.testing.assert_close(
        total / links, RANK / N * torch.eye(N, dtype=torch.float64), rtol=0, atol=5 * RANK**0.5 / N / links**0.5
    )


def test_without_a_chain_an_asymmetric_link_stops_at_the_projected_optimum() -> None:
    handle, adapter, _ = on_quadratic("A")
    model: Any = handle.model
    start = model().logits.detach()
    for _ in range(3):
        projector = natural_step(handle, adapter)
    outside = (start - model.goal) - projector @ (start - model.goal)
    torch.testing.assert_close(model().logits.detach() - model.goal, outside, rtol=1e-9, atol=1e-9)
    assert outside.norm() > 0.5 * (start - model.goal).norm()


@pytest.mark.parametrize("recipe", [chain(), chain(train="A"), chain(train="B"), chain(sketch="random")])
def test_the_rank_of_the_sum_is_the_links_times_the_rank(recipe: Recipe) -> None:
    handle = zoo.adapted(recipe, zoo.build("llama"), "llama")
    optimizer = handle.optimizer(1e-2)
    for links in (1, 2):
        zoo.train(handle, optimizer, zoo.batches("llama"), 3)
        for b in handle.bindings:
            assert torch.linalg.matrix_rank(b.adapter.delta(b.layer)) == min(links * RANK, *b.target.shape)


MOVED = {
    "linear": ("llama", ("q_proj", "down_proj"), {}),
    "fused": ("gpt2", ("c_attn[q]", "c_proj"), {}),
    "embedding": ("gpt2", ("wte",), {"tie_word_embeddings": False}),
    "convolution": ("convnet", ("stem", "body", "mix"), {}),
}


@pytest.mark.parametrize("case", MOVED)
def test_merging_leaves_the_function_and_the_stored_weights_alone(case: str) -> None:
    kind, modules, changes = MOVED[case]
    model, inputs = zoo.build(kind, **changes), zoo.batch(kind)
    handle = zoo.adapted(chain().with_(targets={"modules": modules}), model, kind)
    bare = {n: p.clone() for n, p in model.named_parameters() if "rankloom" not in n}
    handle.optimizer(1e-2)
    for _ in range(2):
        zoo.perturb(handle)
        before = zoo.logits(model, inputs)
        handle.driver.schedules[0].on_interval(3)
        torch.testing.assert_close(zoo.logits(model, inputs), before, rtol=1e-10, atol=1e-10)
    zoo.perturb(handle)
    merged = zoo.merged_copy(handle, zoo.build(kind, **changes))
    torch.testing.assert_close(zoo.logits(model, inputs), zoo.logits(merged, inputs), rtol=1e-10, atol=1e-10)
    handle.detach()
    assert all(torch.equal(p, bare[n]) for n, p in model.named_parameters())


def test_half_precision_bases_swallow_no_small_link() -> None:
    """Links a thousandth of the weight's resolution: one alone changes no bit of the copy, their sum does."""
    model = zoo.build("llama", dtype=torch.bfloat16)
    handle = zoo.adapted(chain(), model, "llama")
    handle.optimizer(1e-2)
    adapter, layer = handle.bindings[0].adapter, handle.bindings[0].layer
    schedule, resolution = handle.driver.schedules[0], float(layer.weight().abs().max()) * 2**-8
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(adapter.B.shape, generator=generator)
    rows, want = None, torch.zeros_like(adapter.merged)
    for _ in range(200):
        with torch.no_grad():
            rows = adapter.A.detach().clone() if rows is None else rows
            adapter.A.copy_(rows)
            adapter.B.copy_(direction * resolution * 1e-2)
        want += (adapter.scale * adapter.B @ adapter.A).detach()
        schedule.on_interval(3)
    assert adapter.merged.dtype == torch.float32
    torch.testing.assert_close(adapter.merged, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert adapter.current(layer).weight().dtype == torch.bfloat16
    expected = (layer.weight().float() + want).bfloat16().float()
    torch.testing.assert_close(adapter.current(layer).weight().float(), expected, rtol=2**-7, atol=0)
    assert not torch.equal(adapter.current(layer).weight(), layer.weight())


@pytest.mark.parametrize("moments", ["reset", "random", "magnitude"])
def test_moments_of_the_factors_start_again_and_no_others(moments: Any) -> None:
    recipe = chain(moments=moments, prune=0.75).with_({"targets.train": ("lm_head", "norm")})
    handle = zoo.adapted(recipe, zoo.build("llama"), "llama")
    optimizer = handle.optimizer(1e-2)
    zoo.train(handle, optimizer, zoo.batches("llama"), 2)
    seen: dict[str, Tensor] = {}

    def before_the_restart(*_: Any) -> None:
        seen.update({t.name: optimizer.state[t.parameter]["exp_avg"].clone() for t in handle.trainables()})

    hooks = optimizer._optimizer_step_post_hooks
    restart = dict(hooks)
    hooks.clear()
    optimizer.register_step_post_hook(before_the_restart)
    hooks.update(restart)
    zoo.train(handle, optimizer, zoo.batches("llama"), 1, start=2)
    for t in handle.trainables():
        state = optimizer.state.get(t.parameter, {})
        if t.target is None:
            assert torch.equal(state["exp_avg"], seen[t.name]) and state["step"] == 3
        elif moments == "reset":
            assert not state
        else:
            kept = state["exp_avg"] != 0
            assert not state["exp_avg_sq"][~kept].any() and state["exp_avg_sq"][kept].all()  # one mask for both
            assert torch.equal(state["exp_avg"][kept], seen[t.name][kept]) and state["step"] == 3
            if moments == "magnitude":
                assert int(kept.sum()) == round(0.25 * kept.numel())
                assert seen[t.name][kept].abs().min() >= seen[t.name][~kept].abs().max()
            else:
                assert 0 < kept.float().mean() < 0.6


def test_the_learning_rate_rises_again_from_zero_under_any_schedule() -> None:
    handle = zoo.adapted(chain(every=4, warmup=2), zoo.build("llama"), "llama")
    optimizer = handle.optimizer(1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))
    shown = []
    for step in range(10):
        before = {n: p.detach().clone() for n, p in handle.named_parameters().items()}
        zoo.train(handle, optimizer, zoo.batches("llama"), 1, start=step)
        moved = any(not torch.equal(p, before[n]) for n, p in handle.named_parameters().items())
        assert moved is not (step in (4, 8))
        shown.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    own = [1e-2 / (1 + step) for step in range(10)]
    factors = [1, 1, 1, 1, 0, 0.5, 1, 1, 0, 0.5]
    assert used == pytest.approx([rate * factor for rate, factor in zip(own, factors, strict=True)])
    assert shown == pytest.approx(own)  # the run's schedule reads and writes its own rates only


def test_the_frozen_factor_has_no_gradient_no_state_and_is_not_counted() -> None:
    handle = zoo.adapted(chain(train="B"), zoo.build("llama"), "llama")
    assert all(t.role == "B" and t.parameter.numel() == RANK * len(t.parameter) for t in handle.trainables())
    first = [b.adapter.A.clone() for b in handle.bindings]
    zoo.train(handle, handle.optimizer(1e-2), zoo.batches("llama"), 4)
    for b, a in zip(handle.bindings, first, strict=True):
        assert not torch.equal(b.adapter.A, a) and not b.adapter.A.requires_grad


def test_a_drawn_side_is_frozen_for_its_link_and_both_come_up() -> None:
    handle = zoo.adapted(chain(every=2, warmup=0, sketch="random"), zoo.build("llama"), "llama")
    optimizer = handle.optimizer(1e-2)
    sides = []
    for link in range(8):
        trained = [set(b.adapter.trained()) for b in handle.bindings]
        assert all(t == trained[0] and len(t) == 1 for t in trained)
        sides += trained[0]
        frozen = {n: p.detach().clone() for n, p in handle.named_parameters().items() if not p.requires_grad}
        zoo.train(handle, optimizer, zoo.batches("llama"), 1, start=2 * link)
        for name, p in handle.named_parameters().items():
            if name in frozen:
                assert p.grad is None and p not in optimizer.state and torch.equal(p, frozen[name])
            else:
                assert p in optimizer.state
        zoo.train(handle, optimizer, zoo.batches("llama"), 1, start=2 * link + 1)
    assert sides[0] == "B" and set(sides) == {"A", "B"}


@pytest.mark.parametrize("optimizer", ["adamw", "riemannian", "lora-pro"])
@pytest.mark.parametrize("sketch", ["recipe", "random"])
def test_resuming_in_the_middle_of_a_chain_is_bit_exact(optimizer: str, sketch: Any, tmp_path: Path) -> None:
    recipe = chain(every=3, warmup=1, sketch=sketch).with_(optimizer=optimizer)
    data = zoo.batches("llama", 3)
    straight = zoo.adapted(recipe, zoo.build("llama"), "llama", seed=5)
    losses = zoo.train(straight, straight.optimizer(1e-2), data, 17)
    for stop in (6, 13):  # right after a restart, and inside the fifth link
        broken = zoo.adapted(recipe, zoo.build("llama"), "llama", seed=5)
        run = broken.optimizer(1e-2)
        zoo.train(broken, run, data, stop)
        broken.save(tmp_path / f"{stop}")
        resumed = rankloom.load(zoo.build("llama"), tmp_path / f"{stop}")
        again = resumed.optimizer(1e-2)
        resumed.load_schedule_state(broken.schedule_state())
        again.load_state_dict(run.state_dict())
        assert zoo.train(resumed, again, data, 17 - stop, start=stop) == losses[stop:]
        mine, theirs = resumed.state_dict(), straight.state_dict()
        assert all(torch.equal(mine[n], theirs[n]) for n in theirs)


def test_seeds_make_chains_and_no_factors_come_twice() -> None:
    drawn = []
    for seed in (0, 1):
        _, adapter, schedule = on_quadratic("A", seed)
        for _ in range(3):
            drawn.append(adapter.B.clone())
            schedule.on_interval(1)
    assert len({tuple(b.flatten().tolist()) for b in drawn}) == 6


def test_a_short_chain_exports_exactly_and_a_long_one_says_what_is_lost(tmp_path: Path) -> None:
    handle = zoo.adapted(chain(every=2, warmup=0), zoo.build("llama"), "llama")
    optimizer, inputs = handle.optimizer(1e-2), zoo.batch("llama")
    zoo.train(handle, optimizer, zoo.batches("llama"), 1)
    assert handle.export(tmp_path / "none")["exact"]
    zoo.train(handle, optimizer, zoo.batches("llama"), 2)
    report = handle.export(tmp_path / "one")
    assert report["exact"] and report["rank"] == 2 * RANK
    back = rankloom.load(zoo.build("llama"), tmp_path / "one")
    torch.testing.assert_close(zoo.logits(back.model, inputs), zoo.logits(handle.model, inputs), rtol=1e-10, atol=1e-10)
    zoo.train(handle, optimizer, zoo.batches("llama"), 12)
    report = handle.export(tmp_path / "many", rank=4)
    assert not report["exact"] and report["relative_error"] > 0


@pytest.mark.parametrize("storage", ["int8", "int4-packed"])
def test_quantised_bases(storage: str) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from tests.quantized import bases

    model, data = bases.quantized(storage), bases.data()
    handle = rankloom.adapt(model, chain(every=2, warmup=0))
    losses = zoo.train(handle, handle.optimizer(1e-2), data, 6)
    assert losses[-1] < losses[0] and all(b.adapter.links == 3 for b in handle.bindings)
    bare = bases.dequantized(bases.quantized(storage))
    bases.close(zoo.logits(model, data[0]), zoo.logits(zoo.merged_copy(handle, bare), data[0]))


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (chain().with_(init="weight-svd"), "a repeatable start"),
        (chain().with_(init="one-step-gradient"), "a repeatable start"),
        (chain().with_(adapter=DoRA()), "links"),
        (chain().with_(adapter=LoRA(core="diagonal"), rank=AdaLoRA()), "fixed ranks"),
        (chain(train="B", sketch="random"), "trained pairs"),
    ],
)
def test_what_cannot_be_a_chain_is_refused(recipe: Recipe, why: str) -> None:
    with pytest.raises(CompositionError, match=rf"'merge-and-restart' needs {why}, which .*; it works with"):
        recipe.check()


@pytest.mark.parametrize("settings", [{"every": 0}, {"every": 5, "warmup": 5}, {"warmup": -1}, {"prune": 1.5}])
def test_impossible_settings(settings: Any) -> None:
    with pytest.raises(RecipeError, match=r"lifecycle\."):
        chain(**{"every": 3, **settings}).check()
