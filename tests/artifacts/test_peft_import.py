"""PEFT folders that are not what they should be: each is one line with exact counts, and the model is left alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import LoRA
from rankloom.errors import ArtifactError
from tests import zoo

Q = "base_model.model.model.layers.0.self_attn.q_proj"
V = Q.replace("q_proj", "v_proj")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As PEFT writes it: no file of ours, so only PEFT's own information is there to check."""
    recipe = Recipe(targets=Targets(("q_proj", "v_proj"), train=("norm",)), adapter=LoRA(rank=3))
    handle = zoo.adapted(recipe, zoo.build("llama"), "llama")
    zoo.perturb(handle)
    handle.export(tmp_path / "e")
    (tmp_path / "e" / "rankloom_export.json").unlink()
    return tmp_path / "e"


def settings(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path)

    return edit


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    os.truncate(folder / "adapter_model.safetensors", 900)


def not_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("r: 8")


def stranger(held: dict[str, Tensor]) -> None:
    held[Q.replace("q_proj", "q_prj") + ".lora_A.weight"] = held[Q + ".lora_A.weight"].clone()


def embedding_base(held: dict[str, Tensor]) -> None:
    held[Q + ".base_layer.weight"] = torch.zeros(16, 16)


BAD = {
    "pickle": (
        pickled,
        r"no adapter_model.safetensors but the pickle adapter_model.bin, which is never opened.*peft: ",
    ),
    "truncated": (truncated, r"adapter_model.safetensors is truncated or damaged \(900 bytes"),
    "not json": (not_json, r"adapter_config.json is not valid JSON"),
    "another method": (
        settings(peft_type="IA3"),
        r"holds the PEFT type IA3, rankloom loads LORA, ADALORA, LOKR, LOHA, MISS, FOURIERFT, VERA, RANDLORA: merge it",
    ),
    "no method": (settings(peft_type=None), r"holds the PEFT type None"),
    "edited base": (settings(init_lora_weights="pissa_niter_4"), r"started by 'pissa_niter_4', which changes the base"),
    "bias in B": (settings(lora_bias=True), r"sets lora_bias, which rankloom does not have"),
    "invented": (
        settings(use_next_year=True, layer_replication=[[0, 1]]),
        r"sets layer_replication, use_next_year, which",
    ),
    "missing B": (tensors(lambda t: t.pop(V + ".lora_B.weight")), r"layers.0.self_attn.v_proj lacks .*lora_B"),
    "missing magnitude": (settings(use_dora=True), r"q_proj lacks or does not expect lora_magnitude_vector"),
    "missing module": (
        tensors(lambda t: [t.pop(V + f".lora_{x}.weight") for x in "AB"]),
        r"1 of 4 modules that adapter_config.json targets have no tensors in .* \(as model.layers.0.self_attn.v_proj\)",
    ),
    "unknown module": (
        tensors(stranger),
        r"1 of 10 tensors in .* are for modules this model does not have \(as model.layers.0.self_attn.q_prj; did you mean",
    ),
    "unknown parameter": (
        tensors(lambda t: t.update({"base_model.model.stranger": torch.ones(2)})),
        r"1 of 2 further tensors in .* have no place in this model or differ from its own \(as stranger\)",
    ),
    "another weight below": (tensors(embedding_base), r"1 of 2 further tensors .*q_proj.base_layer.weight"),
    "rank": (settings(r=4), r"q_proj: lora_[AB] has shape .*3.*, the configuration and this model say .*4"),
    "width": (
        tensors(lambda t: t.update({Q + ".lora_A.weight": torch.zeros(3, 20)})),
        r"q_proj: lora_A has shape \(3, 20\), the configuration and this model say \(3, 16\): load the base model",
    ),
    "resized": (
        tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(41, 16)})),
        r"lm_head.weight has shape \(41, 16\) in .*, \(40, 16\) in this model: resize the model",
    ),
    "nothing": (
        tensors(lambda t: [t.pop(k) for k in list(t) if "lora" in k]),
        r"4 of 4 modules that adapter_config.json",
    ),
    "nothing at all": (
        lambda f: (settings(target_modules=None)(f), tensors(lambda t: [t.pop(k) for k in list(t) if "lora" in k])(f)),
        r"adapts no module: there is nothing to load",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders(case: str, folder: Path) -> None:
    spoil, message = BAD[case]
    spoil(folder)
    model = zoo.build("llama")
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(ArtifactError, match=message) as caught:
        rankloom.load(model, folder)
    assert "\n" not in str(caught.value)
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == before


def test_the_base_is_named_where_the_file_names_it(folder: Path) -> None:
    settings(base_model_name_or_path="org/base")(folder)
    with pytest.raises(ArtifactError, match="load the base it was made on, org/base"):
        rankloom.load(zoo.build("gpt2"), folder)


def test_copies_of_what_the_base_has_say_nothing_new(folder: Path) -> None:
    """PEFT writes the frozen table under an adapted embedding; loading takes it for what it is."""
    model = zoo.build("llama")
    own = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    tensors(lambda t: t.update({Q + ".base_layer.weight": own}))(folder)
    assert set(rankloom.load(model, folder).trained_whole()) == {"model.norm.weight"}


def test_a_tie_that_the_file_parts(folder: Path) -> None:
    tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(40, 16)}))(folder)
    with pytest.raises(
        ArtifactError, match=r"does not train model.embed_tokens.weight whole.*tie_word_embeddings=False"
    ):
        rankloom.load(zoo.build("llama", tie_word_embeddings=True), folder)
    values = {
        f"base_model.model.{n}.weight": torch.full((40, 16), v)
        for n, v in (("lm_head", 1.0), ("model.embed_tokens", 2.0))
    }
    tensors(lambda t: t.update(values))(folder)
    with pytest.raises(ArtifactError, match=r"is tied to .* here, but .* has different values: untie them first"):
        rankloom.load(zoo.build("llama", tie_word_embeddings=True), folder)


def test_grouped_convolutions_and_embedding_dora(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(4, 4, 3, groups=2), "table": torch.nn.Embedding(5, 4)})
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    tmp_path.joinpath("adapter_config.json").write_text(json.dumps(config))
    held = {"conv.lora_A.weight": torch.zeros(1, 4, 3, 3), "conv.lora_B.weight": torch.zeros(4, 1, 1, 1)}
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="grouped convolution is no update of its weight"):
        rankloom.load(model, tmp_path)
    tmp_path.joinpath("adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    held = {"table.lora_embedding_A": torch.zeros(1, 5), "table.lora_embedding_B": torch.zeros(4, 1)}
    save_file({**held, "table.lora_magnitude_vector": torch.zeros(5)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="normalises an embedding by token"):
        rankloom.load(model, tmp_path)
