"""Storages of the base: what they store, what they leave alone, what they refuse."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.base import AsLoaded, TorchaoInt4, TorchaoInt8
from rankloom.errors import CompositionError, RecipeError, TargetError
from rankloom.quantized import is_quantized
from rankloom.targets import find_targets
from tests import zoo

pytest.importorskip("torchao", reason="torchao is not installed")


def stored(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_quantized(m.weight)}


def llama(dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> nn.Module:
    return zoo.build("llama", dtype=dtype, **{"hidden_size": 32, "intermediate_size": 64, **sizes})


def test_as_loaded_changes_nothing() -> None:
    model = llama()
    before = list(model.parameters())
    assert AsLoaded().prepare(model) == []
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("part", [TorchaoInt8(), TorchaoInt8(group_size=8), TorchaoInt4()])
def test_all_linears_but_the_head(part: Any) -> None:
    model = llama()
    names = part.prepare(model)
    assert stored(model) == set(names) and len(names) == 14 and not any("lm_head" in n for n in names)
    assert part.prepare(model) == []  # once is enough
    assert not any(p.requires_grad for p in model.parameters() if is_quantized(p))
    recipe = Recipe(base=part)
    assert len(recipe.check(model)) == 14
    assert Recipe.from_text(recipe.to_yaml()) == recipe


def test_excluded_and_whole_trained_modules_keep_their_weights() -> None:
    model = zoo.build("bert", dtype=torch.float32)
    names = TorchaoInt8(exclude=("*.output.dense",)).prepare(model, Targets(("query",), train=("classifier",)))
    assert "classifier" not in names and not any(n.endswith("output.dense") for n in names)
    assert {n.rsplit(".", 1)[-1] for n in names} == {"query", "key", "value", "dense"}
    rankloom.adapt(model, Recipe(targets=Targets(("query",), train=("classifier",)))).detach()


def test_tied_weights_stay_as_they_are() -> None:
    model = llama(tie_word_embeddings=True)
    TorchaoInt8().prepare(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_attaching_refuses_a_base_that_is_not_stored_so_and_prepares_nothing() -> None:
    model = llama()
    recipe = rankloom.methods.get("lora").with_(base="torchao-int8")
    with pytest.raises(
        CompositionError, match=r"q_proj stored in it, not as torch\.bfloat16: call recipe\.base\.prepare"
    ):
        rankloom.adapt(model, recipe)
    assert not stored(model)
    recipe.base.prepare(model, recipe.targets)
    rankloom.adapt(model, recipe).detach()
    with pytest.raises(CompositionError, match=r"'torchao-int4' expects .* not as Int8Tensor"):
        recipe.with_(base="torchao-int4").check(model)


@pytest.mark.parametrize(
    ("part", "sizes", "message"),
    [
        (TorchaoInt4(), {"intermediate_size": 48}, r"down_proj \(32, 48\) .* 48 inputs are no multiple of group_size 32"),
        (TorchaoInt4(), {"num_key_value_heads": 1}, r"k_proj \(8, 32\) .* 8 outputs are no multiple of 16"),
        (TorchaoInt8(group_size=24), {}, r"q_proj \(32, 32\) .* 32 inputs are no multiple of group_size 24; choose another"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named_before_anything_changes(part: Any, sizes: Any, message: str) -> None:
    model = llama(**sizes)
    with pytest.raises(TargetError, match=message):
        part.prepare(model)
    assert not stored(model)


def test_other_impossible_bases() -> None:
    with pytest.raises(TargetError, match=r"is torch\.float64: base 'torchao-int8' stores float32"):
        TorchaoInt8().prepare(zoo.build("llama"))
    with pytest.raises(
        TargetError, match=r"'torchao-int4' stores bfloat16 weights; load the model so \(dtype='bfloat16'\)"
    ):
        TorchaoInt4().prepare(llama(torch.float32))
    with pytest.raises(CompositionError, match="this model has none it may change"):
        TorchaoInt8().prepare(zoo.build("gpt2", dtype=torch.float32))
    with pytest.raises(RecipeError, match="must be 32, 64 or 128"):
        Recipe.from_dict({"base": {"kind": "torchao-int4", "group_size": 16}})
    with pytest.raises(RecipeError, match="group_size must be positive"):
        Recipe.from_dict({"base": {"kind": "torchao-int8", "group_size": 0}})
    with pytest.raises(TargetError, match="exclude pattern 'q_porj' matches nothing"):
        TorchaoInt8(exclude=("q_porj",)).prepare(llama())


def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(RecipeError, match=r"pip install 'rankloom\[torchao\]'"):
        TorchaoInt8().prepare(llama())


def test_a_float_adapter_loads_on_no_quantised_base_unless_forced(tmp_path: Path) -> None:
    model = llama()
    recipe = rankloom.methods.get("lora").with_(base="torchao-int8")
    recipe.base.prepare(model)
    rankloom.adapt(model, recipe).save(tmp_path / "adapter")
    with pytest.raises(rankloom.errors.FingerprintError):
        rankloom.load(llama(), tmp_path / "adapter")
    forced = rankloom.load(llama(), tmp_path / "adapter", force=True)
    assert forced.recipe.base == AsLoaded() and len(find_targets(forced.model, Targets())) == 14
