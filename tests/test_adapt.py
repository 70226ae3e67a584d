"""`adapt` and its handle: what does not fit the generic suite."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets, adapt
from rankloom.adapters import Dense, DoRA, LoRA
from rankloom.errors import CompositionError, RecipeError, TargetError
from rankloom.init import Gaussian, OwnStart
from tests import zoo

METHODS = tuple(rankloom.methods.TABLE)


def test_importing_is_light() -> None:
    """Nothing heavy before it is needed; a fresh interpreter, since this one has everything."""
    heavy = [
        "transformers",
        "matplotlib",
        "datasets",
        "accelerate",
        "typer",
        "rich",
        "pydantic",
        "peft",
        "torchao",
        "scipy",
    ]
    code = f"import sys, rankloom; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_handle_is_the_model_itself() -> None:
    model = zoo.build("llama")
    modules = dict(model.named_modules())
    handle = adapt(model, Recipe(adapter=LoRA(rank=2)))
    assert handle.model is model
    assert all(model.get_submodule(n) is m for n, m in modules.items())
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)  # other libraries' checks still hold


def test_merging_keeps_working_when_detached_inside() -> None:
    handle = adapt(zoo.build("llama"), Recipe(adapter=LoRA(rank=2), init=Gaussian()))
    zoo.perturb(handle)
    inputs = zoo.batch("llama")
    adapted, bare = zoo.logits(handle.model, inputs), zoo.logits(zoo.build("llama"), inputs)
    with handle.detached() as model:
        assert torch.equal(zoo.logits(model, inputs), bare)
    assert torch.equal(zoo.logits(handle.model, inputs), adapted)
    with pytest.raises(ZeroDivisionError), handle.detached():
        raise ZeroDivisionError
    assert torch.equal(zoo.logits(handle.model, inputs), adapted)
    handle.attach()  # twice is once
    assert torch.equal(zoo.logits(handle.model, inputs), adapted)
    handle.detach()
    handle.detach()
    assert torch.equal(zoo.logits(handle.model, inputs), bare)


def test_an_attached_model_cannot_take_another_handle_back() -> None:
    model = zoo.build("llama")
    first = adapt(model, Recipe(adapter=LoRA(rank=2)))
    first.detach()
    second = adapt(model, Recipe(adapter=LoRA(rank=3)))
    with pytest.raises(TargetError, match="already carries an adapter"):
        first.attach()
    second.detach()
    first.attach()


def test_seeds_decide_the_random_start() -> None:
    starts = [adapt(zoo.build("llama"), Recipe(adapter=LoRA(rank=2)), seed=s).state_dict() for s in (0, 0, 1)]
    name = "model.layers.0.mlp.up_proj.A"
    assert torch.equal(starts[0][name], starts[1][name]) and not torch.equal(starts[0][name], starts[2][name])


@pytest.mark.parametrize("alpha", [4.0, 16.0])
@pytest.mark.parametrize("rank", [1, 3])
def test_scales(alpha: float, rank: int) -> None:
    """rsLoRA at rank r is LoRA with alpha sqrt(r); triplets divide by the initial rank for ever."""
    for scaling, want in (
        ("standard", alpha / rank),
        ("rslora", alpha / rank**0.5),
        ("triplet", alpha / (rank + 1e-5)),
    ):
        handle = adapt(zoo.build("convnet"), Recipe(adapter=LoRA(rank=rank, alpha=alpha, scaling=scaling)))
        assert {b.adapter.scale for b in handle.bindings} == {want}
    two = [
        Recipe(adapter=LoRA(rank=rank, alpha=alpha, scaling="rslora")),
        Recipe(adapter=LoRA(rank=rank, alpha=alpha * rank**0.5)),
    ]
    outputs = []
    for recipe in two:
        handle = adapt(zoo.build("convnet"), recipe)
        zoo.perturb(handle)
        outputs.append(zoo.logits(handle.model, zoo.batch("convnet")))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-13)


def test_ranks_and_alphas_by_pattern_last_match_wins() -> None:
    adapter = LoRA(
        rank=2,
        alpha=8,
        rank_pattern={"layers.*": 9, "*.mlp.*": 3, "model.layers.1.mlp.up_proj": 5},
        alpha_pattern={"re:.*q_proj": 1.0},
    )
    adapter = LoRA(**{**vars(adapter), "rank_pattern": {k: v for k, v in adapter.rank_pattern.items() if v != 9}})
    handle = adapt(zoo.build("llama"), Recipe(adapter=adapter))
    ranks = {b.name: b.adapter.rank for b in handle.bindings}
    assert ranks["model.layers.0.mlp.up_proj"] == 3 and ranks["model.layers.1.mlp.up_proj"] == 5
    assert ranks["model.layers.0.self_attn.q_proj"] == 2
    scales = {b.name: b.adapter.scale for b in handle.bindings}
    assert scales["model.layers.0.self_attn.q_proj"] == 0.5 and scales["model.layers.0.self_attn.k_proj"] == 4.0


def test_patterns_of_ranks_have_to_match_and_hold_for_slices() -> None:
    with pytest.raises(TargetError, match=r"adapter pattern 'up_porj' matches none of the targets"):
        Recipe(adapter=LoRA(rank=2, rank_pattern={"up_porj": 3})).check(zoo.build("llama"))
    with pytest.raises(TargetError, match=r"adapter pattern 'k' matches none"):
        Recipe(adapter=LoRA(rank=2, alpha_pattern={"k": 3.0})).check(zoo.build("llama"))
    recipe = Recipe(targets=Targets(("c_attn[q]",)), adapter=LoRA(rank=2, rank_pattern={"h.1.attn.c_attn": 3}))
    assert [b.adapter.rank for b in adapt(zoo.build("gpt2"), recipe).bindings] == [2, 3]


def test_a_rank_above_the_layer_is_refused_before_anything_is_allocated() -> None:
    model = zoo.build("llama")
    for part in (LoRA(rank=9), DoRA(rank=9)):
        with pytest.raises(TargetError, match=r"rank 9 is above min\(out, in\) = 8 of model.layers.0.self_attn.k_proj"):
            Recipe(adapter=part).check(model)
    Recipe(adapter=LoRA(rank=9, rank_pattern={"k_proj": 8, "v_proj": 8})).check(model)
    with pytest.raises(TargetError, match="rank 17"):
        Recipe(adapter=LoRA(rank=8, rank_pattern={"q_proj": 17})).check(model)
    with pytest.raises(TargetError):
        adapt(model, Recipe(adapter=LoRA(rank=9)))
    assert all(p.requires_grad for p in model.parameters())


def test_nothing_to_adapt_is_an_error() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(CompositionError, match="adapts nothing"):
        Recipe().check(model)
    handle = adapt(model, Recipe(targets=Targets(train=("0",))))  # trained whole alone is a recipe too
    assert list(handle.named_parameters()) == ["whole.0.weight", "whole.0.bias"]


@pytest.mark.parametrize("adapter", [LoRA(rank=2, dropout=0.5), DoRA(rank=2, dropout=0.5)])
@pytest.mark.parametrize(
    ("kind", "modules"), [("llama", "all-linear"), ("gpt2", ("c_fc", "wpe")), ("convnet", ("body",))]
)
def test_dropout_acts_in_training_only_and_on_the_low_rank_path(
    adapter: LoRA, kind: str, modules: tuple[str, ...]
) -> None:
    model, inputs = zoo.build(kind), zoo.batch(kind)
    before = zoo.logits(model, inputs)
    handle = adapt(model, Recipe(targets=Targets(modules), adapter=adapter))
    model.train()
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-12, atol=1e-12)  # B = 0: nothing to drop
    zoo.perturb(handle)
    one, two = model(**inputs).logits, model(**inputs).logits
    assert not torch.equal(one, two)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_dropout_on_a_look_up_does_nothing() -> None:
    model = zoo.build("gpt2")
    handle = adapt(model, Recipe(targets=Targets(("wpe",)), adapter=LoRA(rank=2, dropout=0.9)))
    zoo.perturb(handle)
    inputs = zoo.batch("gpt2")
    assert torch.equal(model.train()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str) -> None:
    """Under autocast the adapted model computes in half precision where the bare one does, and says the same."""
    model, inputs = zoo.build("llama", dtype=torch.float32), zoo.batch("llama")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = model(**inputs).logits
        one = model.model.layers[0].mlp.up_proj(torch.ones(2, 16)).dtype
    handle = zoo.adapted(method, model, "llama")
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            after = model(**inputs).logits
            assert model.model.layers[0].mlp.up_proj(torch.ones(2, 16)).dtype == one
        if not handle.recipe.init.moves_output:
            assert torch.equal(before, after)
        loss = model(**inputs).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in handle.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_dtype_of_trainable_tensors_can_be_chosen(dtype: str) -> None:
    for adapter in (LoRA(rank=2, dtype=dtype), DoRA(rank=2, dtype=dtype)):
        handle = adapt(zoo.build("llama", dtype=torch.bfloat16), Recipe(adapter=adapter))
        assert {p.dtype for p in handle.parameters()} == {getattr(torch, dtype)}
        before = zoo.logits(zoo.build("llama", dtype=torch.bfloat16), zoo.batch("llama"))
        assert torch.equal(zoo.logits(handle.model, zoo.batch("llama")), before)


class DoRAOracle(nn.Module):
    """``y = m / ||V|| (x V^T) + b`` with the norm detached: the paper's, in one line."""

    def __init__(self, layer: nn.Linear, a: Tensor, b: Tensor, m: Tensor, scale: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = layer.weight.detach(), layer.bias.detach(), scale
        self.a, self.b, self.m = (nn.Parameter(t.detach().clone()) for t in (a, b, m))

    def forward(self, x: Tensor) -> Tensor:
        v = self.weight + self.scale * self.b @ self.a
        return x @ (self.m / v.norm(dim=1).detach())[:, None].mul(v).T + self.bias


def test_dora_against_the_paper() -> None:
    """Values and gradients with the norm held constant; row norms of the merged weight are |m|."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64))
    handle = adapt(model, Recipe(targets=Targets(("0",)), adapter=DoRA(rank=2)))
    adapter = handle.bindings[0].adapter
    torch.testing.assert_close(adapter.m, model[0].weight.norm(dim=1), rtol=1e-14, atol=0)
    zoo.perturb(handle, 0.5)
    oracle = DoRAOracle(model[0], adapter.A, adapter.B, adapter.m, adapter.scale)
    x = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), oracle(x), rtol=1e-12, atol=1e-13)
    model(x).square().sum().backward()
    oracle(x).square().sum().backward()
    for ours, theirs in ((adapter.A, oracle.a), (adapter.B, oracle.b), (adapter.m, oracle.m)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    merged = model[0].weight + adapter.delta(handle.bindings[0].layer)
    torch.testing.assert_close(merged.norm(dim=1), adapter.m.abs(), rtol=1e-12, atol=0)


def test_a_frozen_base_that_was_frozen_stays_so() -> None:
    model = zoo.build("llama").requires_grad_(False)
    handle = adapt(model, Recipe(adapter=LoRA(rank=2)))
    handle.detach()
    assert not any(p.requires_grad for p in model.parameters())


def test_dense_keeps_the_bases_precision_or_widens_it() -> None:
    for dtype, want in (("base", torch.bfloat16), ("auto", torch.float32)):
        recipe = Recipe(adapter=Dense(dtype=dtype), init=OwnStart())
        handle = adapt(zoo.build("llama", dtype=torch.bfloat16), recipe)
        assert {b.adapter.weight.dtype for b in handle.bindings} == {want}


def test_methods_are_found_by_name_with_near_names() -> None:
    with pytest.raises(RecipeError, match=r"unknown method 'lora_one'; did you mean lora-one"):
        rankloom.methods.get("lora_one")
