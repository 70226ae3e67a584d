"""Experts that a mixture holds as 3-D parameters: every expert a weight, whatever implementation multiplies with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import rankloom
import rankloom.experts
from rankloom import Recipe, Targets
from rankloom.adapters import DoRA, LoRA
from rankloom.errors import TargetError
from rankloom.kernels.experts import formed_again, updated_stack
from rankloom.lifecycle import MergeAndRestart
from tests import zoo

NAMES = ("gate_up_proj", "down_proj")
every_mixture = pytest.mark.parametrize("kind", zoo.MIXTURES)
FORMS = {
    "lora": Recipe(adapter=LoRA(rank=3, alpha=6)),
    "offset": Recipe(adapter=LoRA(rank=3, alpha=3)).with_(init="weight-svd"),
    "dora": Recipe(adapter=DoRA(rank=3, alpha=6)),
    "dense": rankloom.methods.get("full").with_(targets={"train": ()}),
}


def on(names: tuple[str, ...] = NAMES, form: str = "lora") -> Recipe:
    return FORMS[form].with_(targets={"modules": names})


@every_mixture
@pytest.mark.parametrize("form", FORMS)
def test_every_expert_is_a_weight_of_its_own(kind: str, form: str) -> None:
    model, inputs = zoo.build(kind), zoo.batch(kind)
    before, bare = zoo.logits(model, inputs), {n: p.clone() for n, p in model.named_parameters()}
    handle = zoo.adapted(on(form=form), model, kind)
    assert len(handle.targets) == 2 * 2 * 4  # layers, stacks, experts
    assert torch.equal(zoo.logits(model, inputs), before)
    zoo.perturb(handle)
    merged = zoo.merged_copy(handle, zoo.build(kind))
    torch.testing.assert_close(zoo.logits(model, inputs), zoo.logits(merged, inputs), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(zoo.logits(model, inputs), before, atol=1e-4)
    handle.detach()
    assert torch.equal(zoo.logits(model, inputs), before)
    assert all(torch.equal(p, bare[n]) for n, p in model.named_parameters())
    assert not any("gate_up_proj" in m.__dict__ for m in model.modules())


@every_mixture
@pytest.mark.parametrize("form", ["lora", "offset", "dora"])
def test_gradients_are_those_of_the_merged_model(kind: str, form: str) -> None:
    """Against autograd through ``W + delta`` of an ordinary copy; experts without a token get zero."""
    model, inputs = zoo.build(kind), zoo.batch(kind)
    handle = zoo.adapted(on(form=form), model, kind)
    zoo.perturb(handle)
    got = torch.autograd.grad(model(**inputs).loss, handle.parameters())
    merged = zoo.merged_copy(handle, zoo.build(kind))
    merged(**inputs).loss.backward()
    total = 0
    for b in handle.bindings:
        whole = merged.get_parameter(b.target.module_name).grad[b.layer.index]
        total = total + (b.adapter.delta(b.layer) * b.layer.to_matrix(whole)).sum()
    want = torch.autograd.grad(total, handle.parameters())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@every_mixture
def test_all_implementations_of_experts(kind: str, implementation: str) -> None:
    results = []
    for name in ("eager", implementation):
        model = zoo.build(kind, dtype=torch.float32)  # the grouped product has no float64
        handle = zoo.adapted(on(("gate_up_proj", "down_proj[1]", "down_proj[3]")), model, kind)
        zoo.perturb(handle)
        model.set_experts_implementation(name)
        loss = model(**zoo.batch(kind)).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, handle.parameters())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_the_adapted_stacks_are_not_kept_for_the_backward_pass(implementation: str, monkeypatch: Any) -> None:
    made: list[StorageWeakRef] = []

    def watched(*args: Any) -> Any:
        stack = updated_stack(*args)
        made.append(StorageWeakRef(stack.made.untyped_storage()))
        return stack

    monkeypatch.setattr(rankloom.experts, "updated_stack", watched)
    model = zoo.build("mixtral", dtype=torch.float32)
    model.set_experts_implementation(implementation)
    handle = zoo.adapted(on(), model, "mixtral")
    zoo.perturb(handle)
    loss = model(**zoo.batch("mixtral")).loss
    assert len(made) == 4 and all(ref.expired() for ref in made)
    loss.backward()


def test_what_is_formed_again_is_what_was() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, left, right = (torch.randn(s, generator=generator).double() for s in ((4, 5, 3), (2, 5, 2), (2, 2, 3)))
    left.requires_grad_()
    for index in ([1, 3], [0, 2]):
        stack = updated_stack(weight, left, right, index)
        want = weight.clone()
        want[index] += left @ right
        assert torch.equal(stack.made, want)
        x = torch.randn(4, 6, 5, generator=generator).double().requires_grad_()
        views = [lambda m: m, lambda m: m.mT.mT, lambda m: m.transpose(0, 1).transpose(0, 1)]
        for view in views:
            with formed_again([stack]):
                y = (
                    (x @ view(stack.made)).square().sum()
                    + (x[2, :2] @ stack.made[2]).sum()
                    + (x[3] @ stack.made[3, :, 1:]).sum()
                )
            got = torch.autograd.grad(y, (x, left), retain_graph=True)
            plain = torch.stack(
                [weight[e] + (left @ right)[index.index(e)] if e in index else weight[e] for e in range(4)]
            )
            z = (x @ plain).square().sum() + (x[2, :2] @ plain[2]).sum() + (x[3] @ plain[3, :, 1:]).sum()
            for g, w in zip(got, torch.autograd.grad(z, (x, left)), strict=True):
                torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


@every_mixture
def test_merge_save_load_and_export(kind: str, tmp_path: Path) -> None:
    model, inputs = zoo.build(kind), zoo.batch(kind)
    handle = zoo.adapted(on((*NAMES, "q_proj")), model, kind)
    zoo.train(handle, handle.optimizer(1e-2), zoo.batches(kind), 3)
    adapted = zoo.logits(model, inputs)
    handle.save(tmp_path / "adapter")
    again = rankloom.load(zoo.build(kind), tmp_path / "adapter")
    assert torch.equal(zoo.logits(again.model, inputs), adapted)
    report = handle.merge(inputs)
    assert report.drift is not None and report.drift.max < 1e-8 and report.weights == 6
    handle.unmerge()
    assert torch.equal(zoo.logits(model, inputs), adapted)
    handle.export(tmp_path / "merged", "merged", probe=inputs)
    back = zoo.without_float32(type(model).from_pretrained(tmp_path / "merged", dtype=torch.float64))
    torch.testing.assert_close(zoo.logits(back, inputs), adapted, rtol=1e-7, atol=1e-7)
    with pytest.raises(rankloom.errors.ArtifactError, match=r"PEFT cannot adapt .*export merged"):
        handle.export(tmp_path / "peft")


@every_mixture
def test_it_learns_and_leaves_the_router_alone(kind: str) -> None:
    model = zoo.build(kind)
    before = {n: p.clone() for n, p in model.named_parameters()}
    handle = zoo.adapted(on(), model, kind)
    losses = zoo.train(handle, handle.optimizer(1e-2), zoo.batches(kind, 1), 12)
    assert losses[-1] < losses[0] - 0.1
    assert {p for p in model.parameters() if p.requires_grad} == set(handle.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_half_precision_checkpointing_and_chains() -> None:
    model = zoo.build("mixtral", dtype=torch.bfloat16)
    before = zoo.logits(model, zoo.batch("mixtral"))
    recipe = Recipe(Targets(NAMES), LoRA(rank=3), lifecycle=MergeAndRestart(every=3))
    handle = zoo.adapted(recipe, model, "mixtral")
    assert torch.equal(before, zoo.logits(model, zoo.batch("mixtral")))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = zoo.train(handle, handle.optimizer(1e-2), zoo.batches("mixtral", 1), 10)
    assert losses[-1] < losses[0] - 0.1 and all(b.adapter.links == 3 for b in handle.bindings)


def test_checkpointing_changes_no_gradient() -> None:
    grads: list[list[Tensor]] = []
    for checkpointing in (False, True):
        model = zoo.build("mixtral")
        handle = zoo.adapted(on(), model, "mixtral")
        zoo.perturb(handle)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        model(**zoo.batch("mixtral")).loss.backward()
        grads.append([p.grad for p in handle.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_names() -> None:
    def names(*patterns: str, **settings: Any) -> list[str]:
        recipe = Recipe(Targets(patterns, **settings), LoRA(rank=2))
        return [t.name for t in recipe.check(zoo.build("mixtral"))]

    layer = "model.layers.0.mlp.experts"
    assert names(r"re:.*\.0\.mlp\.experts\.gate_up_proj") == [f"{layer}.gate_up_proj[{e}]" for e in range(4)]
    assert names(f"{layer}.down_proj[2]") == [f"{layer}.down_proj[2]"]
    assert all("experts" not in t.name for t in Recipe().check(zoo.build("mixtral")))  # all-linear
    for pattern in ("down_proj[4]", "down_proj[0:8]", "down_proj[q]"):
        with pytest.raises(TargetError, match=r"number of an expert, 0 to 3"):
            names(pattern)
    assert len(names("gate_up_proj", exclude=("*.1.mlp.experts.gate_up_proj",))) == 4


def test_ranks_by_expert() -> None:
    model, inputs = zoo.build("mixtral"), zoo.batch("mixtral")
    form = LoRA(rank=2, rank_pattern={"model.layers.0.mlp.experts.gate_up_proj[1]": 5, "down_proj": 3})
    handle = zoo.adapted(Recipe(Targets(NAMES), form), model, "mixtral")
    assert {b.adapter.rank for b in handle.bindings} == {2, 3, 5}
    zoo.perturb(handle)
    merged = zoo.merged_copy(handle, zoo.build("mixtral"))
    torch.testing.assert_close(zoo.logits(model, inputs), zoo.logits(merged, inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (on().with_({"adapter.dropout": 0.1}), "dropout cannot act"),
        (on().with_(init="one-step-gradient"), "one expert of a stack"),
        (on().with_(init="activation-svd"), "no linear layer"),
    ],
)
def test_refusals(recipe: Recipe, why: str) -> None:
    model = zoo.build("mixtral")
    with pytest.raises(TargetError, match=why):
        zoo.adapted(recipe, model, "mixtral")
    assert not any("rankloom" in m._modules for m in model.modules())
