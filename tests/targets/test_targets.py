"""Which weights: patterns, slices, ties, heads, near names; and one view of every layer kind."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom import Targets
from rankloom.errors import TargetError
from rankloom.layers import layer_of
from rankloom.targets import find_targets, matches, tied_weights, whole_parameters
from tests import zoo


def names(model: nn.Module, *args: Any, **settings: Any) -> list[str]:
    return [t.name for t in find_targets(model, Targets(*args, **settings))]


def test_all_linear_leaves_the_head_and_embeddings_alone() -> None:
    llama = names(zoo.build("llama"))
    assert len(llama) == 14 and not any("lm_head" in n or "embed" in n for n in llama)
    assert len(names(zoo.build("gpt2"))) == 8  # Conv1D counts as linear
    assert names(zoo.build("convnet")) == ["mix", "head"]  # no getter says which is the head
    assert all("lm_head" not in n for n in names(zoo.build("t5")))
    assert "classifier" in names(zoo.build("bert"))
    assert "classifier" not in names(zoo.build("bert"), train=("classifier",))
    assert names(zoo.build("bert"), train=("*",)) == names(zoo.build("bert"))


def test_projections_that_are_read_but_not_called_are_left_out() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16)
    assert names(block) == ["linear1", "linear2"]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 2),
        ("self_attn.q_proj", 2),
        ("model.layers.1.mlp.up_proj", 1),
        ("*.layers.0.*", 7),
        ("*proj", 14),
        (r"re:.*\.(q|v)_proj", 4),
        ("re:lm_head", 1),
        ("embed_tokens", 1),
        ("model.layers.?.mlp.*", 6),
    ],
)
def test_patterns(pattern: str, count: int) -> None:
    assert len(names(zoo.build("llama"), (pattern,))) == count


def test_patterns_are_not_loose() -> None:
    """A trailing part begins at a dot; a regular expression matches the whole path."""
    assert matches("proj", "a.proj") and not matches("proj", "a.q_proj")
    assert not matches("re:q_proj", "a.q_proj") and matches("re:.*q_proj", "a.q_proj")
    assert not matches("layers.1", "layers.11") and not matches("a", "a.b")
    for near_miss in ("_proj", "q_pro", "Q_proj", "layers.0", "re:q_proj", "layer.*"):
        with pytest.raises(TargetError):
            names(zoo.build("llama"), (near_miss,))


def test_every_pattern_has_to_match_and_near_names_are_shown() -> None:
    with pytest.raises(
        TargetError, match=r"target pattern 'q_porj' matches nothing in this model; did you mean .*q_proj"
    ):
        names(zoo.build("llama"), ("v_proj", "q_porj"))
    with pytest.raises(TargetError, match=r"exclude pattern 'up_prj' matches nothing.*up_proj"):
        names(zoo.build("llama"), exclude=("up_prj",))
    with pytest.raises(TargetError, match=r"train pattern 'nrom' matches nothing.*"):
        whole_parameters(zoo.build("llama"), Targets(train=("nrom",)), [])
    with pytest.raises(TargetError, match=r"model\.norm \(LlamaRMSNorm\), which has no weight to adapt|model\.norm"):
        names(zoo.build("llama"), ("model.norm",))


def test_order_is_the_models_and_duplicates_are_one() -> None:
    found = names(zoo.build("llama"), ("up_proj", "q_proj", "*.mlp.up_proj"))
    at = "model.layers.{}.{}"
    assert found == [at.format(i, m) for i in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj")]


def test_exclude_takes_out_again() -> None:
    found = names(zoo.build("llama"), exclude=("*.layers.0.*", "q_proj"))
    assert len(found) == 6 and all(".1." in n and "q_proj" not in n for n in found)


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        ("q", (0, 16)),
        ("k", (16, 32)),
        ("v", (32, 48)),
        ("0/3", (0, 16)),
        ("2/3", (32, 48)),
        ("5:9", (5, 9)),
        ("up", (24, 48)),
    ],
)
def test_slices(spec: str, rows: tuple[int, int]) -> None:
    (target,) = find_targets(zoo.build("gpt2"), Targets((f"h.0.attn.c_attn[{spec}]",)))
    assert target.name == f"transformer.h.0.attn.c_attn[{rows[0]}:{rows[1]}]"
    assert target.shape == (rows[1] - rows[0], 16) and target.layer.rows == rows
    whole = layer_of(target.layer.module)
    assert torch.equal(target.layer.weight(), whole.weight()[slice(*rows)])
    assert torch.equal(target.layer.bias(), whole.bias()[slice(*rows)])


def test_slices_of_grouped_heads_follow_the_configuration() -> None:
    model = nn.Module()
    model.qkv_proj = nn.Linear(16, 32)  # 4 query heads and 2 + 2 of keys and values, 4 wide
    model.config = types.SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)
    found = find_targets(model, Targets(("qkv_proj[q]", "qkv_proj[k]", "qkv_proj[v]")))
    assert [t.layer.rows for t in found] == [(0, 16), (16, 24), (24, 32)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("c_attn[0/5]", r"48 outputs, not 5 equal parts: give rows"),
        ("c_attn[0/0]", r"not 0 equal parts"),
        ("c_attn[40:99]", r"outside its 48 outputs"),
        ("c_attn[9:9]", r"outside its 48 outputs"),
        ("c_attn[queries]", r"cannot read slice \[queries\]"),
        ("wte[0:4]", r"Embedding: only fused linear"),
        ("nothing[q]", r"target pattern 'nothing' matches nothing"),
    ],
)
def test_slices_that_cannot_be(pattern: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        names(zoo.build("gpt2", tie_word_embeddings=False), (pattern,))


def test_overlapping_slices_are_refused() -> None:
    with pytest.raises(TargetError, match="overlap"):
        names(zoo.build("gpt2"), ("c_attn[q]", "c_attn[8:24]"))
    assert len(names(zoo.build("gpt2"), ("c_attn[q]", "c_attn[0:16]"))) == 2  # the same rows twice are one


def test_a_module_is_adapted_whole_or_by_slice() -> None:
    for patterns in (("c_attn", "c_attn[q]"), ("c_attn[q]", "*.c_attn")):
        with pytest.raises(TargetError, match=r"h\.0\.attn\.c_attn is chosen whole and by slice \[q\]"):
            names(zoo.build("gpt2"), patterns)


def test_ties_are_found_and_have_to_be_declared() -> None:
    model = zoo.build("llama", tie_word_embeddings=True)
    assert list(tied_weights(model).values()) == [["model.embed_tokens.weight", "lm_head.weight"]]
    for use, other in (("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")):
        with pytest.raises(TargetError, match=rf"{use} shares its weight with {other}: leave it out.*ties='untie'"):
            names(model, (use,))
        (target,) = find_targets(model, Targets((use,), ties="untie"))
        assert target.tied_to == (f"{other}.weight",)
    assert not tied_weights(zoo.build("llama"))
    assert len(names(model)) == 14  # untouched ties are no one's business


def test_whole_parameters_by_module_name_and_pattern() -> None:
    model = zoo.build("bert")
    targets = find_targets(model, Targets(("query",)))
    own = whole_parameters(model, Targets(("query",), train=("classifier", "LayerNorm", "*.query.bias")), targets)
    assert {"classifier.weight", "classifier.bias", "bert.embeddings.LayerNorm.weight"} <= own.keys()
    assert "bert.encoder.layer.0.attention.self.query.bias" in own and len(own) == 9
    everything = whole_parameters(model, Targets(("query",), train=("*",)), targets)
    assert len(everything) == len(list(model.parameters())) - 1  # the adapted weight is not trained twice


def test_tied_parameters_are_trained_whole_once() -> None:
    model = zoo.build("llama", tie_word_embeddings=True)
    assert list(whole_parameters(model, Targets(train=("embed_tokens", "lm_head")), [])) == [
        "model.embed_tokens.weight"
    ]


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(6, 5)
    nn.init.normal_(module.bias)
    return module


def scaled_embedding() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(9, 6, padding_idx=0, embed_scale=3.0)


LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(5, 6), lambda: torch.randn(2, 3, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 6, bias=False), lambda: torch.randn(3, 5)),
    "conv1d": (conv1d, lambda: torch.randn(2, 3, 5)),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: torch.randint(9, (2, 4))),
    "embedding, padded": (lambda: nn.Embedding(9, 6, padding_idx=0), lambda: torch.randint(9, (2, 4))),
    "embedding, scaled": (scaled_embedding, lambda: torch.randint(9, (2, 4))),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 3, 5, 5)),
    "conv2d, dilated": (lambda: nn.Conv2d(3, 6, (3, 2), dilation=2, bias=False), lambda: torch.randn(2, 3, 7, 7)),
    "conv2d, circular": (
        lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"),
        lambda: torch.randn(2, 3, 5, 5),
    ),
    "conv2d, unbatched": (lambda: nn.Conv2d(3, 6, 3), lambda: torch.randn(3, 5, 5)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_one_view_of_every_layer(kind: str) -> None:
    """Output, replacement of the weight, and a low-rank product, each against the module with its weight changed."""
    make, draw = LAYERS[kind]
    module = make().double()
    x = draw()
    x = x.double() if x.is_floating_point() else x
    layer = layer_of(module)
    out, inn = layer.out_features, layer.in_features
    assert layer.weight().shape == (out, inn) and out == 6
    assert not layer.weight().requires_grad
    assert torch.equal(layer(x), module(x))
    assert torch.equal(layer.from_matrix(layer.to_matrix(layer.stored)), layer.stored)
    assert torch.equal(layer.apply(x, layer.weight()), module(x))  # to the bit: dense forms start from it
    a, b = torch.randn(2, inn, dtype=torch.float64), torch.randn(out, 2, dtype=torch.float64)
    before = module(x).detach()
    low, applied = layer.lowrank(x, a, b), layer.apply(x, layer.weight() + b @ a)
    zoo.add_to_weight(module, b @ a)
    after = module(x).detach()
    torch.testing.assert_close(applied, after, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(low, after - before, rtol=1e-10, atol=1e-11)
    if "grouped" not in kind:
        torch.testing.assert_close(layer.up(layer.down(x, a), b), after - before, rtol=1e-10, atol=1e-11)
    gain = torch.randn(out, dtype=torch.float64)
    if "unbatched" not in kind:
        rows = layer.tokens(after * layer.broadcast(gain))
        torch.testing.assert_close(rows, layer.tokens(after) * gain)
        assert rows.shape == (after.numel() // out, out)


def test_what_we_do_not_know_is_not_a_layer() -> None:
    for module in (nn.LayerNorm(4), nn.Conv1d(2, 2, 1), nn.ReLU(), nn.ConvTranspose2d(2, 2, 1), nn.LSTM(2, 2)):
        assert layer_of(module) is None


def test_fused_kernels_stand_in_for_plain_linears_only() -> None:
    class Special(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Renamed(nn.Linear):
        pass

    assert layer_of(nn.Linear(3, 3)).ordinary and layer_of(Renamed(3, 3)).ordinary
    assert not layer_of(Special(3, 3)).ordinary
    patched = nn.Linear(3, 3)
    patched.forward = lambda x: F.linear(x, patched.weight)  # as offloading libraries do
    assert not layer_of(patched).ordinary
    assert not layer_of(nn.Linear(3, 3)).with_output(torch.zeros(1, 3)).ordinary


def test_a_subclass_keeps_its_own_forward() -> None:
    from rankloom import Recipe, adapt
    from rankloom.adapters import LoRA

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(4, 4, dtype=torch.float64))
    x = torch.randn(3, 4, dtype=torch.float64)
    before = model(x)
    adapt(model, Recipe(targets=Targets(("0",)), adapter=LoRA(rank=2)))
    assert torch.equal(model(x), before)
