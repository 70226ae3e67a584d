"""SBoRA: a few columns or rows of the weight learn; against LoRA with an explicit one-hot factor and masked full training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom.errors import RecipeError, TargetError
from rankloom.kernels import lowrank_linear
from rankloom.kernels.selected import selected_linear
from tests import zoo

every_side = pytest.mark.parametrize("side", ["in", "out"])


def adapted(side: str, out: int = 6, fan_in: int = 9, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(fan_in, out, dtype=torch.float64)})
    settings = {"targets.modules": ("layer",), "adapter.rank": 4, "adapter.side": side, **changes}
    return rankloom.adapt(model, rankloom.methods.get("sbora-fa").with_(settings), seed=seed).bindings[0]


def moved(side: str, **changes: Any) -> Any:
    binding = adapted(side, **changes)
    binding.adapter.factor.data.normal_(generator=torch.Generator().manual_seed(2))
    return binding


@every_side
@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 3, 9)])
def test_the_kernel_is_lora_with_a_one_hot_factor(side: str, shape: tuple[int, ...]) -> None:
    """Outputs and every gradient; inputs of any number of axes."""
    b = moved(side)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    up, down = b.adapter.effective()
    weight, bias = b.layer.weight(), b.layer.bias()
    want = lowrank_linear(x, weight, bias, down, up, b.adapter.scale)
    got = selected_linear(x, weight, bias, b.adapter.factor, b.adapter.index, b.adapter.scale, b.adapter.side)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    pull = torch.randn_like(want)
    inputs = (x, b.adapter.factor)
    for g, w in zip(torch.autograd.grad(got, inputs, pull), torch.autograd.grad(want, inputs, pull), strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x, f: selected_linear(x, weight, bias, f, b.adapter.index, 0.7, b.adapter.side), inputs
    )


@every_side
def test_what_the_backward_keeps(side: str) -> None:
    """Columns: r features of the input; rows: the input. Never an output, never a dense update."""
    b, x = moved(side), torch.randn(50, 9, dtype=torch.float64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        b.adapter.forward(x, b.layer)
    own = [t for t in kept if t.data_ptr() != b.layer.stored.data_ptr()]
    assert sum(t.numel() for t in own if len(t) == 50) == 50 * (4 if side == "in" else 9)
    assert max(t.numel() for t in own if len(t) != 50) <= b.adapter.factor.numel()


@every_side
def test_only_the_selected_features_move_and_sgd_is_masked_full_training(side: str) -> None:
    """The gradient is ``s G`` on the selected columns or rows, so SGD is full training there with ``lr s^2``, step by step."""
    b = adapted(side)
    dense, lr = b.layer.weight().clone().requires_grad_(), 0.05
    mask = torch.zeros_like(dense)
    mask[(slice(None), b.adapter.index) if side == "in" else (b.adapter.index,)] = 1
    x = torch.randn(20, 9, dtype=torch.float64)
    for _ in range(4):
        (nn.functional.linear(x, dense, b.layer.bias()).square().mean()).backward()
        b.adapter.forward(x, b.layer).square().mean().backward()
        with torch.no_grad():
            dense -= lr * b.adapter.scale**2 * mask * dense.grad
            b.adapter.factor.sub_(b.adapter.factor.grad, alpha=lr)
        dense.grad = b.adapter.factor.grad = None
        delta = b.adapter.delta(b.layer).detach()
        torch.testing.assert_close(b.layer.weight() + delta, dense.detach(), rtol=0, atol=1e-12)
    assert torch.equal(delta != 0, mask != 0)


@every_side
def test_features_are_distinct_and_drawn_by_the_targets_seed(side: str) -> None:
    first, again, other = (adapted(side, 40, 50, seed=s).adapter.index for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(set(first.tolist())) == 4 and int(first.max()) < (50 if side == "in" else 40)


@every_side
def test_selection_by_norm(side: str) -> None:
    b = adapted(side, **{"adapter.select": "norm"})
    norms = b.layer.weight().norm(dim=0 if side == "in" else 1)
    assert set(b.adapter.index.tolist()) == set(norms.argsort(descending=True)[:4].tolist())


def test_disjoint_features_do_not_interfere() -> None:
    one, two = moved("in"), moved("in")
    one.adapter.index.copy_(torch.tensor([0, 2, 4, 6]))
    two.adapter.index.copy_(torch.tensor([1, 3, 5, 7]))
    first, second = (b.adapter.delta(b.layer).detach() for b in (one, two))
    assert not (first * second).any() and not (first.T @ second * 0).any()
    assert torch.equal((one.layer.weight() + first) + second, (one.layer.weight() + second) + first)


@every_side
def test_the_file_holds_the_factor_and_r_integers(side: str, tmp_path: Path) -> None:
    recipe = rankloom.methods.get("sbora-fa").with_({"adapter.side": side, "targets.modules": ("q_proj",)})
    handle = rankloom.adapt(zoo.build("llama"), recipe)
    tensors = handle.state_dict()
    assert sum(t.numel() for t in tensors.values() if t.dtype == torch.int64) == 8 * len(handle.bindings)
    assert sum(t.numel() for t in tensors.values() if t.dtype != torch.int64) == 8 * 16 * len(handle.bindings)
    handle.save(tmp_path / "adapter")
    again = rankloom.load(zoo.build("llama"), tmp_path / "adapter")
    assert torch.equal(again.bindings[0].adapter.index, handle.bindings[0].adapter.index)


@every_side
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dropout_acts_before_the_selection_and_only_in_training(side: str, kind: str) -> None:
    recipe = zoo.recipe_of("sbora-fa").with_({"adapter.side": side, "adapter.dropout": 0.5})
    handle = zoo.adapted(recipe, zoo.build(kind), kind)
    zoo.perturb(handle)
    inputs = zoo.batch(kind)
    merged = zoo.merged_copy(handle, zoo.build(kind))
    torch.testing.assert_close(zoo.logits(handle.model, inputs), zoo.logits(merged, inputs), rtol=0, atol=1e-10)
    handle.model.train()
    torch.manual_seed(0)
    assert not torch.equal(handle.model(**inputs).logits, handle.model(**inputs).logits)


def test_what_cannot_work_is_refused() -> None:
    for changes in ({"adapter.rank": 0}, {"adapter.dropout": 1.0}):
        with pytest.raises(RecipeError, match="adapter"):
            rankloom.methods.get("sbora-fa").with_(changes).check()
    with pytest.raises(TargetError, match=r"layer has 9 features on its input side, fewer than the 10.*at most 9"):
        adapted("in", **{"adapter.rank": 10})
    with pytest.raises(TargetError, match="6 features on its output side"):
        adapted("out", **{"adapter.rank": 7})
