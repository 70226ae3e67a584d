"""Exports that need no peer to judge: approximation errors, the merged folder, what is refused, what is left unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import DoRA, LoRA
from rankloom.artifacts import files
from rankloom.errors import ArtifactError, FingerprintError
from tests import zoo

METHODS = tuple(rankloom.methods.TABLE)
TRANSFORMERS = tuple(kind for kind in zoo.MODELS if kind != "convnet")


def adapted(method: str | Recipe = "lora", kind: str = "llama", **changes: Any) -> rankloom.Adaptation:
    handle = zoo.adapted(method, zoo.build(kind, **changes), kind)
    zoo.perturb(handle)
    return handle


def exported_delta(folder: Path, name: str) -> Tensor:
    """The update a plain reader computes, from the files alone."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    return config["lora_alpha"] / config["r"] * b @ a


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("method", ["full", "dora"])
def test_cut_to_the_best_approximation_with_its_true_error(method: str, rank: int, tmp_path: Path) -> None:
    handle = adapted(method)
    report = handle.export(tmp_path / "e", rank=rank)
    lost = total = 0.0
    for binding in handle.bindings:
        true = binding.adapter.delta(binding.layer).detach()
        values = torch.linalg.svdvals(true)
        best = float(values[rank:].norm())
        missed = float((true - exported_delta(tmp_path / "e", binding.name)).norm())
        assert missed == pytest.approx(best, rel=1e-9, abs=1e-12)  # Eckart-Young: no rank-r matrix is closer
        assert report["targets"][binding.name]["relative_error"] == pytest.approx(best / float(true.norm()), abs=1e-12)
        lost, total = lost + missed**2, total + float(true.norm()) ** 2
    assert report["relative_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-9)
    stored = json.loads((tmp_path / "e" / "rankloom_export.json").read_text())
    assert stored["relative_error"] == report["relative_error"]
    assert Recipe.from_dict(stored["recipe"]) == handle.recipe
    assert stored["drift"]["max"] > 0 and stored["drift"]["effect"] > 0


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_energy_asks_for_the_least_rank_that_keeps_it(energy: float, tmp_path: Path) -> None:
    handle = adapted("full")
    report = handle.export(tmp_path / "e", energy=energy)
    for binding in handle.bindings:
        values = torch.linalg.svdvals(binding.adapter.delta(binding.layer).detach())
        share = values.square().cumsum(0) / values.square().sum()
        error = report["targets"][binding.name]["relative_error"]
        assert error == pytest.approx(float((1 - share[share >= energy][0]).abs().sqrt()), abs=1e-7)
    assert handle.export(tmp_path / "e", energy=energy, max_rank=2)["rank"] <= 2


def test_a_dense_update_of_low_rank_is_found_to_be_one(tmp_path: Path) -> None:
    handle = zoo.adapted("full", zoo.build("llama"), "llama")
    with torch.no_grad():
        for binding in handle.bindings:
            out, into = binding.target.shape
            binding.adapter.weight += torch.randn(out, 2).double() @ torch.randn(2, into).double()
    report = handle.export(tmp_path / "e", energy=1.0)
    assert report["exact"] and report["rank"] == 2 and report["drift"] is None and report["relative_error"] < 1e-12


def test_randomised_decomposition_of_large_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankloom.artifacts.lowrank._EXACT_SVD_UP_TO", 4)
    handle = adapted("full")
    report = handle.export(tmp_path / "e", rank=4)
    for binding in handle.bindings:
        values = torch.linalg.svdvals(binding.adapter.delta(binding.layer).detach())
        best = float(values[4:].norm() / values.norm())
        assert report["targets"][binding.name]["relative_error"] == pytest.approx(best, rel=1e-3)


def test_nothing_trained_is_an_exact_zero(tmp_path: Path) -> None:
    report = zoo.adapted("full", zoo.build("llama"), "llama").export(tmp_path / "e")
    assert report["exact"] and report["relative_error"] == 0 and report["rank"] == 1


def test_exporting_a_low_rank_form_at_a_lower_rank(tmp_path: Path) -> None:
    handle = adapted("lora")
    assert handle.export(tmp_path / "a", rank=3)["exact"] and not handle.export(tmp_path / "b", rank=2)["exact"]


def test_settings_of_the_native_form_stay_readable(tmp_path: Path) -> None:
    handle = adapted(Recipe(adapter=LoRA(rank=3, alpha=7, scaling="rslora", dropout=0.1)))
    handle.export(tmp_path / "e", base_model="org/base")
    config = json.loads((tmp_path / "e" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 7, True)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["task_type"] == "CAUSAL_LM" and config["lora_dropout"] == 0.1
    assert config["base_model_name_or_path"] == "org/base" and config["rank_pattern"] == {}
    card = (tmp_path / "e" / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/base\nlibrary_name: peft\n")


def test_a_card_does_not_carry_a_path_of_this_machine(tmp_path: Path) -> None:
    handle = adapted()
    handle.model.config._name_or_path = str(tmp_path)
    handle.export(tmp_path / "e")
    assert str(tmp_path) not in (tmp_path / "e" / "README.md").read_text()


def test_an_export_knows_its_base(tmp_path: Path) -> None:
    adapted().export(tmp_path / "e")
    with pytest.raises(FingerprintError, match="force=True"):
        rankloom.load(zoo.build("llama", seed=1), tmp_path / "e")
    rankloom.load(zoo.build("llama", seed=1), tmp_path / "e", force=True)


@pytest.mark.parametrize("format", ["peft", "merged"])
@pytest.mark.parametrize("attached", [True, False])
def test_the_handle_is_left_as_it_was(format: Any, attached: bool, tmp_path: Path) -> None:
    handle = adapted("full")
    if not attached:
        handle.detach()
    before = [(n, id(p), p.requires_grad) for n, p in handle.model.named_parameters()]
    handle.export(tmp_path / "e", format=format)
    assert handle.attached is attached
    assert [(n, id(p), p.requires_grad) for n, p in handle.model.named_parameters()] == before


# --- merged ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_merged_folder_is_an_ordinary_model(method: str, kind: str, tmp_path: Path) -> None:
    zoo.require_matrix(method)
    handle = adapted(method, kind)
    inputs = zoo.batch(kind)
    expected = zoo.logits(handle.model, inputs)
    report = handle.export(tmp_path / "m", format="merged", probe=inputs)
    assert report["drift"]["max"] < 1e-10 and "logit drift max" in report["summary"]
    recipe = json.loads((tmp_path / "m" / "rankloom_export.json").read_text())["recipe"]
    assert torch.equal(zoo.logits(handle.model, inputs), expected) and Recipe.from_dict(recipe) == handle.recipe
    # Single precision is as much as transformers promises: it computes position tables and some layers in it.
    loaded = type(handle.model).from_pretrained(tmp_path / "m", dtype=torch.float64)
    torch.testing.assert_close(zoo.logits(loaded, inputs), expected, rtol=1e-4, atol=1e-5)
    handle.merge()
    own = handle.model.state_dict()
    assert all(torch.equal(own[name].to(t.dtype), t) for name, t in loaded.state_dict().items())


def test_an_untied_model_is_loaded_untied(tmp_path: Path) -> None:
    handle = adapted(Recipe(targets=Targets("lm_head", ties="untie"), adapter=LoRA(rank=3)), tie_word_embeddings=True)
    inputs = zoo.batch("llama")
    expected = zoo.logits(handle.model, inputs)
    handle.export(tmp_path / "m", format="merged")
    loaded = type(handle.model).from_pretrained(tmp_path / "m", dtype=torch.float64)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight and handle.model.config.tie_word_embeddings
    torch.testing.assert_close(zoo.logits(loaded, inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_tied_model_stays_tied(tmp_path: Path) -> None:
    handle = adapted("galore", tie_word_embeddings=True)
    handle.export(tmp_path / "m", format="merged")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")


def test_a_quantised_base_is_written_dense(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = zoo.build("llama", dtype=torch.float32), zoo.batch("llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    handle = zoo.adapted(Recipe(targets=Targets("q_proj"), adapter=LoRA(rank=2)), model, "llama")
    zoo.perturb(handle)
    model.config.quantization_config = {"quant_method": "torchao"}
    expected, stored = zoo.logits(model, inputs), model.model.layers[0].mlp.up_proj.weight
    handle.export(tmp_path / "m", format="merged")
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    assert model.config.quantization_config and model.model.layers[0].mlp.up_proj.weight is stored
    loaded = type(model).from_pretrained(tmp_path / "m")
    torch.testing.assert_close(zoo.logits(loaded, inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_merged_export_can_be_repeated_beside_its_tokenizer(tmp_path: Path) -> None:
    handle = adapted()
    handle.export(tmp_path / "m", format="merged")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    handle.export(tmp_path / "m", format="merged")
    (tmp_path / "m" / "thesis.tex").write_text("mine")
    with pytest.raises(ArtifactError, match=r"other entries \(as thesis.tex\)"):
        handle.export(tmp_path / "m", format="merged")


def test_a_failed_merged_export_restores_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = adapted()
    before = [(n, id(p)) for n, p in handle.model.named_parameters()]

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handle.model, "save_pretrained", full, raising=False)
    with pytest.raises(ArtifactError, match="No space left"):
        handle.export(tmp_path / "m", format="merged")
    assert handle.attached and [(n, id(p)) for n, p in handle.model.named_parameters()] == before
    assert not (tmp_path / "m").exists()


# --- refused --------------------------------------------------------------------------------------------------------------


class Strided(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("settings", [{"groups": 2}, {"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}])
def test_convolutions_peft_would_compute_otherwise(settings: dict[str, Any], tmp_path: Path) -> None:
    handle = rankloom.adapt(Strided(**settings), Recipe(targets=Targets("conv"), adapter=LoRA(rank=2)))
    with pytest.raises(ArtifactError, match="PEFT's LoRA drops groups, dilation and padding modes of a convolution"):
        handle.export(tmp_path / "e")


def test_options_and_formats_are_checked(tmp_path: Path) -> None:
    handle = adapted()
    cases = {
        ("gguf", ()): "unknown export format 'gguf' (known: peft, merged)",
        ("merged", ("rank",)): "export to merged has no option 'rank' (known: probe, max_shard_size)",
        ("peft", ("form",)): "unknown form 1 (known: auto, lora)",
    }
    for (format, options), message in cases.items():
        with pytest.raises(ArtifactError) as caught:
            handle.export(tmp_path / "e", format=format, **dict.fromkeys(options, 1))  # type: ignore[arg-type]
        assert str(caught.value) == message
    with pytest.raises(ArtifactError, match="rank must be at least 1, got 0"):
        handle.export(tmp_path / "e", rank=0)


def test_a_recipe_without_targets_has_no_peft_form(tmp_path: Path) -> None:
    recipe = Recipe(targets=Targets(modules=(), train=("norm",)), adapter=LoRA(rank=2))
    with pytest.raises(ArtifactError, match=r"adapts no weight, which PEFT cannot express: export\(format='merged'\)"):
        adapted(recipe).export(tmp_path / "e")


def test_a_model_without_save_pretrained(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"ConvNet has no save_pretrained: use handle.merge"):
        adapted("lora", "convnet").export(tmp_path / "e", format="merged")


def test_embedding_dora_is_not_pefts_dora(tmp_path: Path) -> None:
    report = adapted(Recipe(targets=Targets("embed_tokens"), adapter=DoRA(rank=2))).export(tmp_path / "e")
    assert report["form"] == "lora" and not report["exact"]


def test_plain_values() -> None:
    assert files.plain({"a": {1, 2}, "b": float("inf"), "c": torch.tensor(1.5)}) == {"a": [1, 2], "b": None, "c": 1.5}
