"""Hydra: both heads against the module written out, merging, and the one kernel against the heads apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom.base import TorchaoInt8
from rankloom.errors import RecipeError, TargetError
from rankloom.kernels import lowrank, lowrank_linear
from tests import zoo


def adapted(tokens: int = 30, bias: bool = True, **changes: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(7, 6, bias=bias, dtype=torch.float64)})
    settings = {"targets.modules": ("layer",), "adapter.rank": 3, "adapter.sequential_rank": 2, "adapter.alpha": 5.0}
    b = rankloom.adapt(model, rankloom.methods.get("hydra").with_({**settings, **changes})).bindings[0]
    for parameter in b.adapter.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(len(parameter)))
    return b, torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)


def by_hand(b: Any, x: Tensor) -> Tensor:
    """The two heads, the one on the output without the bias."""
    a, w = b.adapter, b.layer.weight()
    z = x @ w.T
    out = z + a.scale * (x @ a.A.T @ a.B.T + z @ a.A_s.T @ a.B_s.T)
    return out if b.layer.bias() is None else out + b.layer.bias()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 30])
def test_both_routes_are_the_heads_written_out(tokens: int, bias: bool) -> None:
    """Few tokens read the output, many run as one product with ``A_s W``: the same outputs and gradients."""
    b, x = adapted(tokens, bias)
    assert (b.adapter.operands(x, b.layer) is not None) is (tokens == 30)
    got, want = b.adapter.forward(x, b.layer), by_hand(b, x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    pull, inputs = torch.randn_like(want), (x, *b.adapter.parameters())
    for g, w in zip(torch.autograd.grad(got, inputs, pull), torch.autograd.grad(want, inputs, pull), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-9)


def test_the_merged_weight_is_the_papers() -> None:
    """``W' = (I + s B_s A_s) W + s B A``, of rank r + r_s over ``W``; the column space of the second head is ``B_s``'s."""
    b, x = adapted()
    a, w = b.adapter, b.layer.weight()
    eye = torch.eye(6, dtype=w.dtype)
    want = (eye + a.scale * a.B_s @ a.A_s) @ w + a.scale * a.B @ a.A
    delta = a.delta(b.layer).detach()
    torch.testing.assert_close(w + delta, want.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(x @ (w + delta).T + b.layer.bias(), a.forward(x, b.layer), rtol=0, atol=1e-11)
    assert torch.linalg.matrix_rank(delta) == 5
    up, down = a.factors_on(b.layer)
    assert up.shape == (6, 5) and down.shape == (5, 7) and a.factors() is None
    a.B.data.zero_()
    basis = torch.linalg.qr(a.B_s.detach()).Q
    delta = a.delta(b.layer).detach()
    torch.testing.assert_close(basis @ (basis.T @ delta), delta, rtol=0, atol=1e-11)


def test_without_the_second_head_it_is_lora() -> None:
    b, x = adapted()
    b.adapter.B_s.data.zero_()
    want = lowrank_linear(x, b.layer.weight(), b.layer.bias(), b.adapter.A, b.adapter.B, b.adapter.scale)
    got = b.adapter.forward(x, b.layer)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for g, w in zip(
        torch.autograd.grad(got.square().sum(), (b.adapter.A, b.adapter.B)),
        torch.autograd.grad(want.square().sum(), (b.adapter.A, b.adapter.B)),
        strict=True,
    ):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_the_weight_comes_back_through_the_woodbury_identity() -> None:
    """``W = (I + s B_s A_s)^-1 (W' - s B A)``, the inverse from an r_s x r_s one."""
    b, _ = adapted()
    a, w = b.adapter, b.layer.weight()
    merged = w + a.delta(b.layer)
    left, right = a.scale * a.B_s, a.A_s
    inner = torch.eye(2, dtype=w.dtype) + right @ left
    rest = merged - a.scale * a.B @ a.A
    torch.testing.assert_close(rest - left @ torch.linalg.solve(inner, right @ rest), w, rtol=0, atol=1e-10)


def test_the_one_kernel_keeps_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved by tokens is the input and the heads' hidden units, not the layer's output."""
    monkeypatch.setattr(lowrank, "forming_pays", lambda *_: False)  # as it is with a layer's real sides
    b, x = adapted(tokens=40)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        b.adapter.forward(x, b.layer)
    by_token = [tuple(t.shape) for t in kept if 40 in t.shape]
    assert sorted(by_token) == [(5, 40), (40, 7)]


def test_siblings_run_together() -> None:
    handle = zoo.adapted("hydra", zoo.build("llama"), "llama")
    zoo.perturb(handle)
    inputs = zoo.batch("llama", rows=6)
    merged = zoo.merged_copy(handle, zoo.build("llama"))
    torch.testing.assert_close(handle.model(**inputs).logits, merged(**inputs).logits, rtol=0, atol=1e-10)


def biased(model: Any, kind: str, modules: tuple[str, ...], **targets: Any) -> rankloom.Adaptation:
    recipe = zoo.recipe_of("hydra").with_({"adapter.biases": True, "adapter.sequential_rank": 2})
    handle = zoo.adapted(recipe.with_(targets={"modules": modules, **targets}), model, kind)
    zoo.perturb(handle, 0.3)
    return handle


@pytest.mark.parametrize("tokens", [1, 30])
def test_biases_of_both_heads_are_the_papers_two_modules(tokens: int) -> None:
    """``y = z + s (B (A x + c_A) + c_B) + s (B_s (A_s z + c_A_s) + c_B_s)`` with ``z`` the layer's whole output, its bias too."""
    b, x = adapted(tokens, **{"adapter.biases": True})
    a, z = b.adapter, x @ b.layer.weight().T + b.layer.bias()
    sizes = {name: len(p) for name, p in a.named_parameters() if name.startswith("c_")}
    assert sizes == {"c_A": 3, "c_B": 6, "c_A_s": 2, "c_B_s": 6}
    assert (a.operands(x, b.layer) is not None) is (tokens == 30)
    parallel = (x @ a.A.T + a.c_A) @ a.B.T + a.c_B
    want = z + a.scale * (parallel + (z @ a.A_s.T + a.c_A_s) @ a.B_s.T + a.c_B_s)
    got = a.forward(x, b.layer)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    eye = torch.eye(6, dtype=x.dtype)
    merged = (eye + a.scale * a.B_s @ a.A_s) @ b.layer.bias() + a.scale * (
        a.B @ a.c_A + a.c_B + a.B_s @ a.c_A_s + a.c_B_s
    )
    torch.testing.assert_close(b.layer.bias() + a.bias_delta(b.layer), merged, rtol=0, atol=1e-12)
    pull, inputs = torch.randn_like(want), (x, *a.parameters())
    for g, w in zip(torch.autograd.grad(got, inputs, pull), torch.autograd.grad(want, inputs, pull), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-9)


PLACES: dict[str, tuple[str, Any]] = {
    "siblings": ("bert", ("query", "key", "value", "output.dense")),
    "conv1d and its slices": ("gpt2", ("c_fc", "c_attn[q]", "h.1.attn.c_attn[32:48]")),
    "convolution": ("convnet", ("stem", "mix")),
    "vision": ("vit", "all-linear"),
}


@pytest.mark.parametrize("place", PLACES)
def test_biases_start_at_zero_train_merge_and_come_out_again(place: str, tmp_path: Path) -> None:
    kind, modules = PLACES[place]
    model, inputs = zoo.build(kind), zoo.batch(kind, seed=5)
    base, held = zoo.logits(model, inputs), dict(model.named_parameters())
    recipe = zoo.recipe_of("hydra").with_({"adapter.biases": True}).with_(targets={"modules": modules})
    handle = zoo.adapted(recipe, model, kind)
    assert torch.equal(zoo.logits(model, inputs), base)
    zoo.train(handle, handle.optimizer(1e-2), zoo.batches(kind), 3)
    for binding in handle.bindings:
        for name, p in binding.adapter.named_parameters():
            # The keys' bias cancels in the softmax.
            assert p.any() or (name.startswith("c_") and binding.name.endswith("key")), (binding.name, name)
    zoo.perturb(handle, 0.3)
    want = zoo.logits(model, inputs)
    torch.testing.assert_close(
        zoo.logits(zoo.merged_copy(handle, zoo.build(kind)), inputs), want, rtol=1e-10, atol=1e-10
    )
    handle.save(tmp_path / "own")
    report = handle.merge(inputs)
    assert report.weights == report.biases == len({b.target.module_name for b in handle.bindings})
    assert f"merged {report.weights} weights, {report.biases} biases into float64" in str(report)
    torch.testing.assert_close(zoo.logits(model, inputs), want, rtol=1e-10, atol=1e-10)
    handle.unmerge()
    assert torch.equal(zoo.logits(model, inputs), want)
    handle.detach()
    assert all(p is held[name] for name, p in model.named_parameters()) and torch.equal(zoo.logits(model, inputs), base)
    again = rankloom.load(zoo.build(kind), tmp_path / "own")
    assert torch.equal(zoo.logits(again.model, inputs), want)


def test_a_bias_that_trains_whole_beside_moves_once() -> None:
    model, inputs = zoo.build("bert"), zoo.batch("bert")
    handle = biased(model, "bert", ("value",), train=("value.bias",))
    want, base = zoo.logits(model, inputs), zoo.build("bert")
    handle.merge(inputs)
    torch.testing.assert_close(zoo.logits(model, inputs), want, rtol=1e-10, atol=1e-10)
    handle.detach()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("whole", [(), ("mlp.c_fc.bias",)])
def test_exports_bring_the_biases(whole: tuple[str, ...], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    handle = biased(zoo.build("gpt2"), "gpt2", ("c_fc", "c_attn[q]"), train=whole)
    inputs = zoo.batch("gpt2")
    want = zoo.logits(handle.model, inputs)
    report = handle.export(tmp_path / "peft")
    assert report["exact"] and json.loads((tmp_path / "peft/adapter_config.json").read_text())["bias"] == "lora_only"
    theirs = PeftModel.from_pretrained(zoo.build("gpt2"), str(tmp_path / "peft")).eval()
    torch.testing.assert_close(zoo.logits(theirs, inputs), want, rtol=1e-10, atol=1e-10)
    ours = rankloom.load(zoo.build("gpt2"), tmp_path / "peft")
    torch.testing.assert_close(zoo.logits(ours.model, inputs), want, rtol=1e-10, atol=1e-10)
    cut = handle.export(tmp_path / "cut", rank=1, probe=inputs)
    theirs = PeftModel.from_pretrained(zoo.build("gpt2"), str(tmp_path / "cut")).eval()
    gap = float((zoo.logits(theirs, inputs) - want).abs().max())
    assert not cut["exact"] and gap == pytest.approx(cut["drift"]["max"], rel=1e-6)
    handle.export(tmp_path / "merged", "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(zoo.logits(zoo.without_float32(merged), inputs), want, rtol=1e-10, atol=1e-10)


def test_biases_need_a_bias_to_be_merged_into() -> None:
    with pytest.raises(
        TargetError, match=r"merged into the layer's bias, and layer has none: set adapter.biases to false"
    ):
        adapted(bias=False, **{"adapter.biases": True})
    for kind, name in (("llama", "q_proj"), ("gpt2", "wte"), ("mixtral", "down_proj")):
        recipe = (
            zoo.recipe_of("hydra").with_({"adapter.biases": True}).with_(targets={"modules": (name,), "ties": "untie"})
        )
        with pytest.raises(TargetError, match=rf"{name}.* has none"):
            rankloom.adapt(zoo.build(kind), recipe)


def test_a_half_precision_base_with_biases() -> None:
    model = zoo.build("gpt2", dtype=torch.bfloat16)
    base = zoo.logits(model, zoo.batch("gpt2"))
    recipe = zoo.recipe_of("hydra").with_({"adapter.biases": True})
    handle = zoo.adapted(recipe, model, "gpt2")
    assert torch.equal(zoo.logits(model, zoo.batch("gpt2")), base) and base.dtype == torch.bfloat16
    losses = zoo.train(handle, handle.optimizer(1e-2), zoo.batches("gpt2"), 8)
    assert losses[-1] < losses[0] and all(p.dtype == torch.float32 for p in handle.parameters())
    handle.merge()
    assert model.transformer.h[0].mlp.c_fc.bias.dtype == torch.bfloat16


def test_a_quantised_base_with_biases() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = zoo.build("llama", dtype=torch.float32, attention_bias=True, hidden_size=32, intermediate_size=64)
    TorchaoInt8().prepare(model)
    inputs = zoo.batch("llama")
    base = zoo.logits(model, inputs)
    recipe = zoo.recipe_of("hydra").with_({"adapter.biases": True})
    handle = zoo.adapted(recipe.with_(targets={"modules": ("q_proj", "o_proj")}), model, "llama")
    assert torch.equal(zoo.logits(model, inputs), base)
    zoo.train(handle, handle.optimizer(1e-2), zoo.batches("llama"), 3)
    zoo.perturb(handle, 0.3)
    want = zoo.logits(model, inputs)
    report = handle.merge(inputs)
    assert report.dequantized == report.biases == 4
    torch.testing.assert_close(zoo.logits(model, inputs), want, rtol=1e-3, atol=1e-3)
    assert (want - base).abs().max() > 0.1
    handle.unmerge()
    assert torch.equal(zoo.logits(handle.detach(), inputs), base)


def test_parameters_and_refusals() -> None:
    b, _ = adapted()
    assert sum(p.numel() for p in b.adapter.parameters()) == 3 * (7 + 6) + 2 * 2 * 6
    b, _ = adapted(**{"adapter.biases": True})
    assert sum(p.numel() for p in b.adapter.parameters()) == 3 * (7 + 6) + 2 * 2 * 6 + 3 + 2 + 2 * 6
    with pytest.raises(RecipeError, match="sequential_rank must be at least 1"):
        adapted(**{"adapter.sequential_rank": 0})
    for changes in ({"adapter.sequential_rank": 7}, {"adapter.rank": 7}):
        with pytest.raises(TargetError, match=r"above 6, the most layer"):
            adapted(**changes)
