"""FlyLoRA against a loop over tokens and experts; its selection, its balance, and the matrix it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import FlyLoRA, FlyLoRAAdapter
from rankloom.errors import ArtifactError, RankloomError, RecipeError, TargetError
from rankloom.init import OwnStart
from rankloom.layers import Conv2dLayer, LinearLayer
from rankloom.targets import Target
from tests import zoo


def made(out: int = 5, fan_in: int = 12, **settings: Any) -> tuple[FlyLoRAAdapter, LinearLayer]:
    layer = LinearLayer(nn.Linear(fan_in, out, dtype=torch.float64).requires_grad_(False))
    adapter: Any = FlyLoRA(**{"rank": 6, "active": 2, "alpha": 9.0, **settings}).build(
        Target("some.layer", layer, "some.layer")
    )
    with torch.no_grad():
        adapter.B.normal_()
        adapter.bias.normal_(std=0.05)
    return adapter, layer


def by_hand(adapter: Any, layer: LinearLayer, x: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Token by token, expert by expert."""
    outs, picked = [], []
    for token in x.detach():
        y = [float(row @ token) for row in adapter.A]
        scores = [v + float(d) for v, d in zip(y, adapter.bias, strict=True)]
        scores = [abs(v) for v in scores] if adapter.score == "abs" else scores
        best = sorted(range(len(y)), key=lambda i: (-scores[i], i))[: adapter.active]
        out = layer(token)
        for i in best:
            out = out + 1.5 * y[i] * adapter.B[:, i]
        outs.append(out)
        picked.append(sorted(best))
    return torch.stack(outs), picked


@pytest.mark.parametrize("score", ["signed", "abs"])
def test_the_output_is_the_sum_over_the_chosen_experts(score: Any) -> None:
    adapter, layer = made(score=score)
    x = torch.randn(17, 12, dtype=torch.float64)
    want, picked = by_hand(adapter, layer, x)
    torch.testing.assert_close(adapter.forward(x, layer), want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(adapter.forward(x.view(1, 17, 12), layer)[0], want, rtol=1e-12, atol=1e-13)
    chosen = adapter.chosen(x @ adapter.A.mT)
    assert [row.nonzero().flatten().tolist() for row in chosen] == picked


def test_ties_fall_to_the_lower_index_and_constants_change_nothing() -> None:
    adapter, _ = made()
    with torch.no_grad():
        adapter.bias.zero_()
    assert adapter.chosen(torch.zeros(3, 6)).nonzero()[:, 1].tolist() == [0, 1] * 3
    h = torch.randn(50, 6, dtype=torch.float64)
    before = adapter.chosen(h)
    adapter.bias += 0.5
    assert torch.equal(before, adapter.chosen(h))


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_are_those_of_the_loop(detach: bool) -> None:
    adapter, layer = made(detach_input=detach)
    x = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    want, picked = by_hand(adapter, layer, x)
    pull = torch.randn_like(want)
    out = adapter.forward(x, layer)
    grad_x, grad_b = torch.autograd.grad(out, [x, adapter.B], pull)
    torch.testing.assert_close(grad_b, torch.autograd.grad(want, adapter.B, pull)[0], rtol=1e-12, atol=1e-13)
    through = pull @ layer.weight()
    if not detach:
        mask = torch.zeros(9, 6, dtype=torch.float64)
        for token, experts in enumerate(picked):
            mask[token, experts] = 1
        through = through + 1.5 * ((pull @ adapter.B) * mask) @ adapter.A
    torch.testing.assert_close(grad_x, through, rtol=1e-12, atol=1e-13)


def test_experts_never_chosen_have_no_gradient() -> None:
    adapter, layer = made()
    with torch.no_grad():
        adapter.bias.copy_(torch.tensor([100.0, 0, 0, 100.0, 0, 0]))
    adapter.forward(torch.randn(8, 12, dtype=torch.float64), layer).sum().backward()
    assert adapter.B.grad[:, [0, 3]].all() and not adapter.B.grad[:, [1, 2, 4, 5]].any()


@pytest.mark.parametrize(
    ("rank", "active", "fan_in", "nonzero"), [(6, 2, 12, 4), (32, 8, 100, 25), (6, 1, 3, 1), (4, 4, 7, 7)]
)
def test_rows_have_their_number_of_entries_and_come_back_from_the_seed(
    rank: int, active: int, fan_in: int, nonzero: int
) -> None:
    one, other, elsewhere = (made(fan_in=fan_in, rank=rank, active=active, seed=seed)[0] for seed in (0, 0, 1))
    assert (one.A != 0).sum(1).tolist() == [nonzero] * rank
    assert torch.equal(one.A, other.A) and not torch.equal(one.A, elsewhere.A)
    assert set(one.state_dict()) == {"B", "bias", "digest"}


def test_entries_are_normal_over_the_rank_and_independent_between_layers() -> None:
    layer = LinearLayer(nn.Linear(2000, 4))
    first, second = (FlyLoRA(rank=32, active=8).build(Target(n, layer, n)) for n in ("a", "b"))
    values = 32 * first.A[first.A != 0]  # type: ignore[index, operator, union-attr]
    assert abs(float(values.mean())) < 5 / len(values) ** 0.5 and abs(float(values.var()) - 1) < 0.06
    overlap = float(((first.A != 0) & (second.A != 0)).float().mean())  # type: ignore[operator, union-attr]
    assert abs(overlap - 1 / 16) < 0.006


def test_all_experts_are_a_matrix() -> None:
    adapter, layer = made(active=6)
    x = torch.randn(7, 12, dtype=torch.float64)
    torch.testing.assert_close(adapter.delta(layer), 1.5 * adapter.B @ adapter.A, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(
        adapter.forward(x, layer), layer(x) + x @ adapter.delta(layer).mT, rtol=1e-12, atol=1e-13
    )
    assert adapter.mergeable and adapter.linear_in_x and FlyLoRA(rank=6, active=6).schedule([], None) is None


def recipe(**changes: Any) -> Recipe:
    made = Recipe(targets=Targets(("up_proj", "down_proj")), adapter=FlyLoRA(rank=6, active=2), init=OwnStart())
    return made.with_({f"adapter.{name}": value for name, value in changes.items()})


def test_what_is_no_matrix_cannot_be_merged_or_exported(tmp_path: Path) -> None:
    handle = rankloom.adapt(zoo.build("llama"), recipe())
    for refused in (
        handle.merge,
        lambda: handle.export(tmp_path / "m", "merged"),
        lambda: handle.export(tmp_path / "p"),
    ):
        with pytest.raises(ArtifactError, match="depends on the input and is no matrix") as caught:
            refused()
        assert "\n" not in str(caught.value)
    with pytest.raises(RankloomError, match=r"unless adapter.active is the rank"):
        handle.bindings[0].adapter.delta(handle.bindings[0].layer)
    assert rankloom.adapt(zoo.build("llama"), recipe(active=6)).merge().weights == 4


def counted(handle: rankloom.Adaptation) -> list[Tensor]:
    return [b.adapter.counts.clone() for b in handle.bindings]


@pytest.mark.parametrize("checkpointing", [None, False, True])  # none, the saved-tensor kind, the reentrant kind
def test_every_token_counts_once_however_it_is_run(checkpointing: bool | None) -> None:
    handle = rankloom.adapt(zoo.build("llama"), recipe())
    zoo.perturb(handle)
    if checkpointing is not None:
        handle.model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        handle.model.enable_input_require_grads()
    batch = zoo.batch("llama")
    handle.model.train()(**batch).loss.backward()
    # The last of 7 positions predicts nothing, so nothing is learned from it.
    assert [int(c.sum()) for c in counted(handle)] == [2 * 4 * 6] * 4


def test_neither_evaluation_nor_no_grad_counts() -> None:
    handle = rankloom.adapt(zoo.build("llama"), recipe())
    zoo.perturb(handle)
    handle.model.eval()(**zoo.batch("llama")).loss.backward()
    with torch.no_grad():
        handle.model.train()(**zoo.batch("llama"))
    assert not any(c.any() for c in counted(handle))


def test_padding_does_not_count() -> None:
    totals = []
    for padded in (0, 3):
        handle = rankloom.adapt(zoo.build("llama"), recipe())
        zoo.perturb(handle)
        batch = {k: v.clone() for k, v in zoo.batch("llama", rows=2).items()}
        if padded:
            batch["attention_mask"][:, -padded:] = 0
            batch["labels"][:, -padded:] = -100
        handle.model.train()(**batch).loss.backward()
        totals.append(int(counted(handle)[0].sum()))
    assert totals == [2 * 2 * 6, 2 * 2 * (6 - 3)]


def test_the_bias_moves_once_a_step_against_the_busy() -> None:
    handle = rankloom.adapt(zoo.build("llama"), recipe(balance_rate=0.01))
    zoo.perturb(handle)
    handle.optimizer(1e-3)
    for seed in (0, 1):  # two micro-batches
        handle.model.train()(**zoo.batch("llama", seed)).loss.backward()
    before = counted(handle)
    assert not any(b.adapter.bias.any() for b in handle.bindings)
    handle.step()
    for binding, counts in zip(handle.bindings, before, strict=True):
        want = 0.01 * torch.sign(counts.double().mean() - counts.double())
        torch.testing.assert_close(binding.adapter.bias.double(), want, rtol=1e-6, atol=1e-9)
    assert not any(c.any() for c in counted(handle))
    assert not any(name.endswith("bias") for name in handle.named_parameters())


def test_counts_converge_to_the_mean() -> None:
    adapter, layer = made(out=4, fan_in=12, balance_rate=0.02)
    (schedule,) = [FlyLoRA(rank=6, active=2, balance_rate=0.02).schedule([_Bound(adapter)], None)]  # type: ignore[list-item]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64) + 1.5  # a constant part favours some experts
    spreads = []
    for step in range(200):
        out = adapter.train().forward(x, layer)
        out.sum().backward()
        counts = adapter.counts.double()
        spreads.append(float((counts - 400 * 2 / 6).abs().max()))
        assert schedule is not None
        schedule.after_step(step)
    assert spreads[0] > 100 and max(spreads[-20:]) < 30


class _Bound:
    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter


def test_impossible_settings_are_refused() -> None:
    for broken in ({"active": 0}, {"active": 7}, {"balance_rate": -1.0}):
        with pytest.raises(RecipeError, match=r"1 <= adapter.active <= adapter.rank"):
            recipe(**broken).check()
    grouped = Target("conv", Conv2dLayer(nn.Conv2d(4, 4, 3, groups=2)), "conv")
    with pytest.raises(TargetError, match="conv is a grouped convolution"):
        FlyLoRA().check_on([grouped])
