"""Adapters on decoder layers: where they sit, what they are shown, how they decode, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import LayerAdapter, LayerAdapterPart
from rankloom.attended import Attention
from rankloom.blocks import DECODERS
from rankloom.errors import ArtifactError, AttentionError, CompositionError, TargetError
from rankloom.init import OwnStart
from rankloom.targets import Target
from tests import zoo


class BottleneckAdapter(LayerAdapter):
    """``f(h) = U relu(D h)``: the whole of a second form."""

    roles: ClassVar[dict[str, str]] = {"down": "weight", "up": "weight"}

    def __init__(self, target: Target, hidden: int) -> None:
        super().__init__()
        self.seen: list[Attention] = []
        width, dtype = target.layer.features, target.layer.dtype
        self.down = nn.Parameter(torch.empty(hidden, width, dtype=dtype))
        self.up = nn.Parameter(torch.empty(width, hidden, dtype=dtype))

    def reset(self, base: Any, generator: torch.Generator) -> None:
        self.down.copy_(torch.randn(self.down.shape, generator=generator, dtype=torch.float64))
        self.up.zero_()

    def forward(self, h: Tensor, attention: Attention) -> Tensor:
        self.seen.append(attention)
        return (h @ self.down.T).relu() @ self.up.T


@dataclass(frozen=True)
class Bottleneck(LayerAdapterPart):
    """Settings of the form above; not in the registry, which other tests read."""

    slot: ClassVar[str] = "adapter"
    kind: ClassVar[str] = "bottleneck"
    hidden: int = 3

    def build(self, target: Target) -> BottleneckAdapter:
        return BottleneckAdapter(target, self.hidden)


def bottlenecks(model: nn.Module, *modules: str, **targets: Any) -> rankloom.Adaptation:
    chosen = Targets(modules or "all-linear", **targets)
    return rankloom.adapt(model, Recipe(targets=chosen, adapter=Bottleneck(), init=OwnStart()))


def gin(model: nn.Module, size: float = 0.3, **settings: Any) -> rankloom.Adaptation:
    """The table's method on a model, every tensor moved."""
    changes = {f"adapter.{name}": value for name, value in settings.items()}
    handle = rankloom.adapt(model, zoo.recipe_of("gin-attention").with_(changes))
    zoo.perturb(handle, size)
    return handle


FAMILIES = {
    "GemmaDecoderLayer": "gemma",
    "LlamaDecoderLayer": "llama",
    "MistralDecoderLayer": "mistral",
    "MixtralDecoderLayer": "mixtral",
    "Phi3DecoderLayer": "phi3",
    "Qwen2DecoderLayer": "qwen2",
    "Qwen2MoeDecoderLayer": "qwen2_moe",
    "Qwen3DecoderLayer": "qwen3",
    "Qwen3MoeDecoderLayer": "qwen3_moe",
    "SmolLM3DecoderLayer": "smollm3",
    "GPT2Block": "gpt2",
}


def family(kind: str, **changes: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": zoo.VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    if kind == "gpt2":
        sizes = {"vocab_size": zoo.VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "eos_token_id": 2}
    elif kind == "phi3":
        del sizes["head_dim"]
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return zoo.without_float32(AutoModelForCausalLM.from_config(config)).double().eval()


def test_every_known_layer_is_tested() -> None:
    assert FAMILIES.keys() == DECODERS.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_added_to_the_state_between_attention_and_mlp(name: str) -> None:
    """By hooks on the bare model's own modules, and by the probabilities it returns itself."""
    model = family(FAMILIES[name], attn_implementation="eager")
    batch = {k: v for k, v in zoo.batch("llama").items() if k != "labels"}
    batch["attention_mask"][0, -2:] = 0  # theirs overflows to NaN where a row of float64 sees nothing
    attention, _ = DECODERS[name]
    layers = [m for m in model.modules() if type(m).__name__ == name]
    norms = [getattr(layer, "ln_2", None) or layer.post_attention_layernorm for layer in layers]
    seen: dict[str, list[Tensor]] = {"given": [], "attended": [], "state": []}
    hooks = [
        h
        for layer, norm in zip(layers, norms, strict=True)
        for h in (
            layer.register_forward_pre_hook(lambda m, args: seen["given"].append(args[0])),
            layer.get_submodule(attention).register_forward_hook(lambda m, a, out: seen["attended"].append(out[0])),
            norm.register_forward_pre_hook(lambda m, args: seen["state"].append(args[0])),
        )
    ]
    with torch.no_grad():
        bare = model(**batch, output_attentions=True)
        for given, attended, state in zip(*seen.values(), strict=True):
            torch.testing.assert_close(given + attended, state, rtol=1e-14, atol=1e-14)
        before = [s.clone() for s in seen["state"]]
        handle = bottlenecks(model)
        for binding in handle.bindings:
            nn.init.normal_(binding.adapter.up)
        for values in seen.values():
            values.clear()
        again = model(**batch, output_attentions=True)
    first = handle.bindings[0].adapter
    added = (before[0] @ first.down.T).relu() @ first.up.T
    torch.testing.assert_close(seen["state"][0], before[0] + added, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(again.logits, bare.logits)
    for binding, weights in zip(handle.bindings, again.attentions, strict=True):
        (call,) = binding.adapter.seen
        keys = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
        logits = call.scale * call.query @ keys.mT + call.mask
        real = batch["attention_mask"].bool()[:, None, :, None]
        torch.testing.assert_close(
            logits.softmax(-1) * real, weights * real, rtol=1e-6, atol=1e-7
        )  # theirs: via float32
    for h in hooks:
        h.remove()
    handle.detach()
    for layer in layers:
        assert layer.get_submodule(attention).config is model.config


def test_targets_are_layers_or_their_attention_modules() -> None:
    def names(*modules: str, **more: Any) -> list[str]:
        handle = bottlenecks(zoo.build("llama"), *modules, **more)
        assert all(t.shape == (16, 16) and not t.tied_to for t in handle.targets)
        return [t.name for t in handle.targets]

    both = ["model.layers.0", "model.layers.1"]
    assert names() == names("self_attn") == names("*.layers.?") == both
    assert names("layers.1") == names("layers.1.self_attn") == names(exclude=("layers.0",)) == both[1:]
    with pytest.raises(TargetError, match=r"layer pattern 'q_proj' matches nothing in this model"):
        names("q_proj")
    with pytest.raises(CompositionError, match="adapts nothing"):
        names(exclude=("self_attn",))


def test_whole_parameters_train_beside_a_layer_adapter() -> None:
    model = zoo.build("llama")
    handle = bottlenecks(model, train=("norm",))
    zoo.train(handle, handle.optimizer(1e-2), zoo.batches("llama"), 2)
    base = zoo.build("llama").model.norm.weight
    assert not torch.equal(handle.named_parameters()["whole.model.norm.weight"], base)
    handle.detach()
    assert torch.equal(model.model.norm.weight, base)


@pytest.fixture
def unknown_attention() -> Iterator[str]:
    """An attention function of the user's own, whose masks could be anything."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("unknown", sdpa_attention_forward)
    AttentionMaskInterface.register("unknown", sdpa_mask)
    yield "unknown"
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("unknown")


def test_the_attention_function_may_change_while_attached(unknown_attention: str) -> None:
    model = zoo.build("llama")
    gin(model)
    batch = zoo.batch("llama")
    batch["attention_mask"][1, -3:] = 0
    want = zoo.logits(model, batch)
    model.set_attn_implementation("eager")
    # Padded queries aside; eager attention passes through float32.
    torch.testing.assert_close(zoo.logits(model, batch)[1, :4], want[1, :4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(zoo.logits(model, batch)[0], want[0], rtol=1e-6, atol=1e-6)
    model.set_attn_implementation(unknown_attention)
    with pytest.raises(AttentionError, match=r"now attends by 'unknown'.*set_attn_implementation"):
        zoo.logits(model, batch)


def test_attention_cannot_be_accelerated_under_a_layer_adapter() -> None:
    from rankloom.attention.accelerate import accelerate_attention

    model = zoo.build("llama")
    handle = gin(model)
    with pytest.raises(AttentionError, match=r"a layer adapter follows this model's attention.*detach\(\)"):
        accelerate_attention(model)
    handle.detach()
    accelerate_attention(model).remove()


def left_padded() -> dict[str, Tensor]:
    ids = zoo.batch("llama")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[2, :1] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("edges", ["causal", "past", "self"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_token_by_token_equals_the_full_forward(kind: str, edges: str) -> None:
    model = zoo.build(kind)
    gin(model, edges=edges, aggregate="learned" if edges == "past" else "sum")
    inputs = left_padded()
    full = model(**inputs, use_cache=False).logits
    out = model(inputs["input_ids"][:, :3], attention_mask=inputs["attention_mask"][:, :3], use_cache=True)
    cache, got = out.past_key_values, [out.logits]
    for start, stop in ((3, 5), (5, 6), (6, 7)):
        out = model(
            inputs["input_ids"][:, start:stop], attention_mask=inputs["attention_mask"][:, :stop], past_key_values=cache
        )
        got.append(out.logits)
    real = inputs["attention_mask"].bool()
    # GPT-2 counts positions from the padding on, Llama rotates by differences: both agree where tokens are real.
    torch.testing.assert_close(torch.cat(got, 1)[real], full[real], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_sliding_window_forgets_features_with_its_keys() -> None:
    model = family("mistral", sliding_window=4, attn_implementation="sdpa")
    gin(model)
    ids = torch.randint(3, zoo.VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    full = model(ids, use_cache=False).logits
    cache, got = None, []
    for start, stop in ((0, 6), (6, 8), *((t, t + 1) for t in range(8, 12))):
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), full, rtol=1e-10, atol=1e-10)
    assert all(layer.features.shape[1] == layer.keys.shape[2] == 3 for layer in cache.layers)
    # The window is part of the graph: another model with the same weights and a wider one says something else.
    assert not torch.allclose(model(ids[:, -4:], use_cache=False).logits[:, -1], full[:, -1], atol=1e-6)


@torch.no_grad()
def test_the_cache_can_be_cropped_repeated_selected_and_reset() -> None:
    model = zoo.build("llama")
    gin(model)
    ids = zoo.batch("llama")["input_ids"]
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-3)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([7, 0, 2]))
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    rows = torch.tensor([0, 3, 1])
    got = model(ids[rows, 4:], past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids[rows], use_cache=False).logits[:, 4:], rtol=1e-10, atol=1e-10)
    cache.reset()
    got = model(ids[:2], past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids[:2], use_cache=False).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_says_the_same_with_and_without_cache(beams: int) -> None:
    model = zoo.build("llama")
    handle = gin(model, size=1.0)
    settings = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    inputs = left_padded()
    adapted = model.generate(**inputs, **settings)
    assert torch.equal(adapted, model.generate(**inputs, **settings, use_cache=False))
    assert not torch.equal(adapted, handle.detach().generate(**inputs, **settings))


def test_caches_and_masks_that_cannot_be_followed_are_refused() -> None:
    from transformers import StaticCache

    model = zoo.build("llama")
    ids = zoo.batch("llama")["input_ids"]
    with torch.no_grad():
        bare = model(ids, use_cache=True).past_key_values
        handle = gin(model)
        with pytest.raises(AttentionError, match="passed this layer without its adapter: start with an empty cache"):
            model(ids[:, :1], past_key_values=bare)
        with pytest.raises(AttentionError, match=r"a cache of StaticLayer cannot carry.*dynamic cache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))
        assert model(ids).logits.isfinite().all()  # refusals leave nothing behind
        with pytest.raises(AttentionError, match=r"one mask for all heads.*\(4, 4, 7, 7\)"):
            model(ids, attention_mask=torch.ones(4, 4, 7, 7, dtype=torch.bool).tril())
        with pytest.raises(AttentionError, match="outside its decoder layer"):
            layer = model.model.layers[0]
            states = torch.randn(1, 3, 16, dtype=torch.float64)
            layer.self_attn(states, position_embeddings=model.model.rotary_emb(states, torch.arange(3)[None]))
    assert all(b.layer.attention.__dict__["_rankloom_forward"].residual is None for b in handle.bindings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init": "kaiming"}, "init 'kaiming' needs factors"),
        ({"init": "weight-svd"}, "init 'weight-svd' needs factors"),
        ({"rank": "adalora"}, "rank 'adalora' needs ranked components"),
        ({"rank": "sparsity-budget"}, "rank 'sparsity-budget' needs sparsity"),
        ({"lifecycle": "merge-and-restart"}, "lifecycle 'merge-and-restart' needs"),
        ({"optimizer": "lora-pro"}, "optimizer 'lora-pro' needs trained pairs"),
        ({"optimizer": "projected"}, "optimizer 'projected' needs dense weights"),
    ],
)
def test_parts_that_need_a_weight_are_refused(changes: dict[str, str], said: str) -> None:
    with pytest.raises(CompositionError, match=said):
        zoo.recipe_of("gin-attention").with_(**changes).check(zoo.build("llama"))


def test_no_merge_no_export_and_no_second_adapter(tmp_path: Path) -> None:
    model = zoo.build("llama")
    handle = gin(model)
    inputs = zoo.batch("llama")
    before = zoo.logits(model, inputs)
    with pytest.raises(ArtifactError, match=r"gin-attention.*cannot be merged; save it with handle.save\(\)"):
        handle.merge(inputs)
    for form in ("peft", "merged"):
        with pytest.raises(ArtifactError, match=r"is no matrix.*save it with handle.save\(\)"):
            handle.export(tmp_path / form, form)
        assert not (tmp_path / form).exists()
    with pytest.raises(TargetError, match="already carries an adapter"):
        rankloom.adapt(model, Recipe())
    assert torch.equal(zoo.logits(model, inputs), before)


def test_attention_that_cannot_be_followed_is_refused_before_anything_is_allocated(unknown_attention: str) -> None:
    model = zoo.build("llama")
    model.set_attn_implementation(unknown_attention)
    for bad, said in (
        (model, r"layers.0 attends by 'unknown'.*set_attn_implementation\('sdpa'\)"),
        (zoo.build("gpt2", add_cross_attention=True), "also attends to an encoder"),
        (zoo.build("gpt2", reorder_and_upcast_attn=True, attn_implementation="eager"), "order of its own"),
        (zoo.build("gpt-oss"), "GptOssForCausalLM has no pre-norm decoder layer.*LlamaDecoderLayer"),
    ):
        with pytest.raises(TargetError, match=said):
            rankloom.adapt(bad, zoo.recipe_of("gin-attention"))
        assert not any("rankloom" in m._modules for m in bad.modules())
