"""Merging: right for every form and module, measured, and undone to the very same objects."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import LoRA
from rankloom.errors import ArtifactError, RankloomError
from tests import zoo

METHODS = tuple(rankloom.methods.TABLE)


def identities(model: nn.Module) -> list[tuple[str, int, bool]]:
    return [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", zoo.MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_merged_model_computes_what_the_adapted_one_did_and_unmerge_restores_it(method: str, kind: str) -> None:
    zoo.require_matrix(method)
    model, inputs = zoo.build(kind), zoo.batch(kind)
    bare, content = identities(model), values(model)
    handle = zoo.adapted(method, model, kind)
    zoo.perturb(handle)
    attached, adapted = identities(model), zoo.logits(model, inputs)
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    report = handle.merge(inputs)
    assert not any(isinstance(m, rankloom.attach.Attached) for m in model.modules())
    torch.testing.assert_close(zoo.logits(model, inputs), adapted, rtol=1e-10, atol=1e-10)
    assert report.drift is not None and report.drift.max < 1e-10 < report.drift.effect
    assert report.weights == len(handle.bindings)
    handle.unmerge()
    assert identities(model) == attached and equal(state, handle.state_dict())
    assert torch.equal(zoo.logits(model, inputs), adapted)
    handle.merge()
    handle.detach()
    assert identities(model) == bare and equal(values(model), content)


def test_summary_is_one_line_with_the_figures() -> None:
    handle = zoo.adapted("lora", zoo.build("llama", dtype=torch.bfloat16), "llama")
    zoo.perturb(handle)
    report = handle.merge()
    assert report.probe == "random" and report.drift is not None and report.drift.max > 0
    assert str(report).startswith("merged 14 weights into bfloat16: logit drift max ") and "\n" not in str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounds_once_from_a_wide_sum(dtype: torch.dtype) -> None:
    model = zoo.build("llama", dtype=dtype)
    handle = zoo.adapted("lora", model, "llama")
    zoo.perturb(handle)
    binding = handle.bindings[0]
    a, b = binding.adapter.A.detach().double(), binding.adapter.B.detach().double()
    exact = binding.layer.weight().double() + binding.adapter.scale * b @ a
    handle.merge()
    assert torch.equal(binding.layer.module.weight, exact.to(dtype))


@pytest.mark.parametrize("method", [m for m in METHODS if rankloom.methods.get(m).adapter.kind == "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_forms_merge_to_the_trained_weight_bit_for_bit(method: str, dtype: torch.dtype) -> None:
    handle = zoo.adapted(method, zoo.build("llama", dtype=dtype), "llama")
    zoo.perturb(handle, size=1.0)
    handle.merge()
    for binding in handle.bindings:
        assert torch.equal(binding.layer.module.weight, binding.adapter.weight)


def test_narrow_adapters_are_widened_before_multiplying() -> None:
    recipe = Recipe(adapter=LoRA(rank=3, dtype="bfloat16"))
    handle = zoo.adapted(recipe, zoo.build("llama", dtype=torch.float32), "llama")
    zoo.perturb(handle)
    binding = handle.bindings[0]
    exact = binding.adapter.scale * binding.adapter.B.double() @ binding.adapter.A.double()
    base = binding.layer.weight().double()
    handle.merge()
    assert torch.equal(binding.layer.module.weight, (base + exact).float())
    handle.unmerge()
    assert binding.adapter.A.dtype == torch.bfloat16


def test_several_slices_of_one_projection() -> None:
    model, inputs = zoo.build("gpt2"), zoo.batch("gpt2")
    handle = zoo.adapted(Recipe(targets=Targets(("c_attn[q]", "c_attn[v]")), adapter=LoRA(rank=2)), model, "gpt2")
    zoo.perturb(handle)
    adapted, before = zoo.logits(model, inputs), model.transformer.h[0].attn.c_attn.weight.clone()
    report = handle.merge(inputs)
    after = model.transformer.h[0].attn.c_attn.weight
    assert report.weights == 2 and torch.equal(after[:, 16:32], before[:, 16:32])
    torch.testing.assert_close(zoo.logits(model, inputs), adapted, rtol=1e-10, atol=1e-10)


def test_untied_weight_gets_its_own_parameter_and_the_config_says_so() -> None:
    model, inputs = zoo.build("llama", tie_word_embeddings=True), zoo.batch("llama")
    recipe = Recipe(targets=Targets("lm_head", ties="untie"), adapter=LoRA(rank=3))
    handle = zoo.adapted(recipe, model, "llama")
    zoo.perturb(handle)
    adapted = zoo.logits(model, inputs)
    report = handle.merge(inputs)
    assert report.untied == ("lm_head",) and "untied lm_head" in str(report)
    assert model.lm_head.weight is not model.model.embed_tokens.weight and not model.config.tie_word_embeddings
    torch.testing.assert_close(zoo.logits(model, inputs), adapted, rtol=1e-10, atol=1e-10)
    handle.unmerge()
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_tied_weight_trained_whole_stays_tied() -> None:
    model = zoo.build("llama", tie_word_embeddings=True)
    handle = zoo.adapted(Recipe(targets=Targets(train=("embed_tokens",)), adapter=LoRA(rank=2)), model, "llama")
    zoo.perturb(handle)
    handle.merge()
    trained = handle.named_parameters()["whole.model.embed_tokens.weight"]
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, trained) and model.lm_head.weight is not trained


def test_quantised_base_merges_to_a_dense_weight() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = zoo.build("llama", dtype=torch.float32), zoo.batch("llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    handle = zoo.adapted("lora", model, "llama")
    zoo.perturb(handle)
    stored, adapted = model.model.layers[0].mlp.up_proj.weight, zoo.logits(model, inputs)
    report = handle.merge(inputs)
    assert type(model.model.layers[0].mlp.up_proj.weight) is nn.Parameter
    torch.testing.assert_close(zoo.logits(model, inputs), adapted, rtol=1e-4, atol=1e-4)
    assert report.drift is not None and report.drift.max < 1e-4
    handle.unmerge()
    assert model.model.layers[0].mlp.up_proj.weight is stored and torch.equal(zoo.logits(model, inputs), adapted)


def test_merged_parameters_keep_the_flags_of_the_base() -> None:
    model = zoo.build("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    zoo.adapted("full", model, "llama").merge()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_measuring_leaves_every_module_in_its_mode() -> None:
    model = zoo.build("llama").train()
    model.model.norm.eval()
    modes = [m.training for m in model.modules()]
    handle = zoo.adapted("lora", model, "llama")
    handle.merge()
    assert [m.training for m in model.modules()] == modes


def test_attach_after_merge_unmerges() -> None:
    model = zoo.build("llama")
    handle = zoo.adapted("lora", model, "llama")
    before = identities(model)
    handle.merge()
    handle.attach()
    assert identities(model) == before
    with pytest.raises(RankloomError, match="nothing is merged"):
        handle.unmerge()


def test_merging_twice_is_refused() -> None:
    handle = zoo.adapted("lora", zoo.build("llama"), "llama")
    handle.merge()
    with pytest.raises(RankloomError, match="merged already: call unmerge"):
        handle.merge()
    with pytest.raises(ArtifactError, match="call unmerge"):
        handle.export("anywhere")


def test_a_model_that_does_not_say_its_inputs_is_merged_unmeasured() -> None:
    report = zoo.adapted("lora", zoo.build("convnet"), "convnet").merge()
    assert report.drift is None and "drift not measured: pass probe=" in str(report)


def test_a_form_that_is_no_matrix_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    handle = zoo.adapted("lora", model, "llama")
    monkeypatch.setattr(type(handle.bindings[0].adapter), "linear_in_x", False)
    with pytest.raises(ArtifactError, match="depends on the input and is no matrix"):
        handle.merge()
    assert handle.attached


def test_overflow_is_refused_and_nothing_changes() -> None:
    model = zoo.build("llama", dtype=torch.float16)
    handle = zoo.adapted("lora", model, "llama")
    with torch.no_grad():
        handle.bindings[3].adapter.B.fill_(1e6)
    before = identities(model)
    with pytest.raises(ArtifactError, match=r"o_proj is not finite in torch.float16: load the base in bfloat16"):
        handle.merge()
    assert identities(model) == before
