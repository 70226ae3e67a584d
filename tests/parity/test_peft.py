"""Against real PEFT, both ways, in float64: what we export it computes, attached and merged; what it saves we compute."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import DoRA, LoRA
from tests import zoo

peft = pytest.importorskip("peft")

METHODS = tuple(rankloom.methods.TABLE)
TOLERANCE = {"rtol": 0, "atol": 1e-9}


def inputs_for(kind: str) -> dict[str, Tensor]:
    batch = zoo.batch(kind)
    labels = batch.pop("labels")  # PEFT's AdaLoRA cannot evaluate with a loss
    return {**batch, "decoder_input_ids": labels} if kind == "t5" else batch


def through_peft(folder: Path, kind: str, **changes: Any) -> tuple[Tensor, Tensor]:
    """PEFT's logits with the adapter attached, and after its own merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about settings it corrects
        loaded = peft.PeftModel.from_pretrained(zoo.build(kind, **changes), folder).eval()
        attached = zoo.logits(loaded, inputs_for(kind))
        return attached, zoo.logits(loaded.merge_and_unload(), inputs_for(kind))


def assert_peft_agrees(handle: rankloom.Adaptation, kind: str, folder: Path, **options: Any) -> dict[str, Any]:
    expected = zoo.logits(handle.model, inputs_for(kind))
    report = handle.export(folder, **options)
    assert torch.equal(zoo.logits(handle.model, inputs_for(kind)), expected)  # exporting changed nothing here
    attached, merged = through_peft(folder, kind)
    close = {"rtol": 0, "atol": 1e-7} if report["form"] == "loha" else TOLERANCE  # PEFT rounds its alpha / r to float32
    torch.testing.assert_close(attached, expected, **close)
    torch.testing.assert_close(merged, expected, **close)
    return report


@pytest.mark.parametrize("kind", zoo.MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_model(method: str, kind: str, tmp_path: Path) -> None:
    zoo.require_matrix(method)
    handle = zoo.adapted(method, zoo.build(kind), kind)
    zoo.perturb(handle)
    # An update of full rank fits once the rank is large enough, so the same equality holds for every method.
    full = {} if rankloom.methods.TABLE[method].export.startswith("exact") else {"energy": 1.0}
    report = assert_peft_agrees(handle, kind, tmp_path / "export", **full)
    assert report["exact"] and report["relative_error"] < 1e-12
    again = rankloom.load(zoo.build(kind), tmp_path / "export")
    torch.testing.assert_close(
        zoo.logits(again.model, inputs_for(kind)), zoo.logits(handle.model, inputs_for(kind)), **TOLERANCE
    )


LAYERS: dict[str, tuple[str, Recipe, str]] = {
    "embedding": ("llama", Recipe(targets=Targets(("embed_tokens", "q_proj")), adapter=LoRA(rank=3)), "lora"),
    "convolution": ("convnet", Recipe(targets=Targets(("stem", "body", "mix")), adapter=LoRA(rank=3)), "lora"),
    "convolution-dora": ("convnet", Recipe(targets=Targets(("stem", "body")), adapter=DoRA(rank=3)), "dora"),
    "slices": ("gpt2", Recipe(targets=Targets(("c_attn[q]", "c_attn[v]", "c_proj")), adapter=LoRA(rank=3)), "lora"),
    "slices-dora": ("gpt2", Recipe(targets=Targets(("c_attn[q]", "c_attn[v]")), adapter=DoRA(rank=3)), "dora"),
    "one-slice-dora": ("gpt2", Recipe(targets=Targets(("c_attn[16:48]",)), adapter=DoRA(rank=3)), "dora"),
    "diagonal-dora": ("llama", Recipe(adapter=DoRA(rank=3, core="diagonal")), "dora"),
    "head": ("bert", Recipe(targets=Targets(train=("classifier",)), adapter=LoRA(rank=3)), "lora"),
    "bias": ("gpt2", Recipe(targets=Targets(train=("c_attn.bias", "ln_f")), adapter=LoRA(rank=3)), "lora"),
    "triplet-scale": ("llama", Recipe(adapter=LoRA(rank=3, scaling="triplet")), "lora"),
    "patterns": (
        "llama",
        Recipe(
            targets=Targets(("q_proj", "v_proj")),
            adapter=LoRA(
                rank=3, scaling="rslora", rank_pattern={"q_proj": 2}, alpha_pattern={"*.1.*": 5, "*.0.*": 0.3}
            ),
        ),
        "lora",
    ),
    "adalora-patterns": (
        "llama",
        Recipe(
            adapter=LoRA(rank=4, alpha=7, scaling="triplet", core="diagonal", rank_pattern={"q_proj": 2, "up_proj": 3})
        ),
        "adalora",
    ),
}


@pytest.mark.parametrize("form", ["auto", "lora"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_and_setting(name: str, form: str, tmp_path: Path) -> None:
    kind, recipe, native = LAYERS[name]
    handle = zoo.adapted(recipe, zoo.build(kind), kind)
    zoo.perturb(handle)
    report = assert_peft_agrees(handle, kind, tmp_path / "export", form=form, energy=1.0)
    assert report["form"] == (native if form == "auto" else "lora") and report["exact"]
    config = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    if form == "lora":
        assert not (config["rank_pattern"] or config["alpha_pattern"] or config["use_rslora"] or config["use_dora"])
        assert config["lora_alpha"] == config["r"]


def masked_adalora(kind: str) -> rankloom.Adaptation:
    handle = zoo.adapted("adalora", zoo.build(kind), kind)
    zoo.perturb(handle)
    for index, binding in enumerate(handle.bindings):
        binding.adapter.mask[: index % (binding.adapter.rank + 1)] = False  # every rank from full to none
    return handle


@pytest.mark.parametrize("form", ["auto", "lora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_adalora_leaves_masked_components_out(kind: str, form: str, tmp_path: Path) -> None:
    handle = masked_adalora(kind)
    report = assert_peft_agrees(handle, kind, tmp_path / "export", form=form)
    live = {b.name: int(b.adapter.mask.sum()) for b in handle.bindings if b.adapter.mask.any()}
    assert report["targets"].keys() == live.keys() and 0 < len(live) < len(handle.bindings)
    if form == "auto":
        assert {name: entry["rank"] for name, entry in report["targets"].items()} == live


def test_adalora_pruned_to_nothing(tmp_path: Path) -> None:
    handle = zoo.adapted("adalora", zoo.build("llama"), "llama")
    for binding in handle.bindings:
        binding.adapter.mask.fill_(False)
    assert_peft_agrees(handle, "llama", tmp_path / "export")


@pytest.mark.parametrize("rank", [1, 4])
def test_approximations_report_the_error_and_the_drift_peft_has(rank: int, tmp_path: Path) -> None:
    handle = zoo.adapted("full", zoo.build("llama"), "llama")
    zoo.perturb(handle)
    expected = zoo.logits(handle.model, inputs_for("llama"))
    report = handle.export(tmp_path / "export", rank=rank, probe=inputs_for("llama"))
    assert not report["exact"] and {entry["rank"] for entry in report["targets"].values()} == {rank}
    attached, merged = through_peft(tmp_path / "export", "llama")
    for logits in (attached, merged):
        assert float((logits - expected).abs().max()) == pytest.approx(report["drift"]["max"], rel=1e-9)
        assert float((logits - expected).abs().mean()) == pytest.approx(report["drift"]["mean"], rel=1e-9)


# --- the other way ---------------------------------------------------------------------------------------------------------


def made_by_peft(config: Any, kind: str, folder: Path, **changes: Any) -> Tensor:
    """Attach with PEFT, move everything that trains, save; the logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(zoo.build(kind, **changes), config).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "ranknum" not in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if isinstance(config, peft.AdaLoraConfig):
            allocate(model)
        logits = zoo.logits(model, inputs_for(kind))
        model.save_pretrained(folder)
    return logits


def allocate(model: nn.Module) -> None:
    """The state PEFT's allocator leaves: a pattern, and zeros where it is False."""
    pattern = {}
    layers = [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_E") and "default" in m.lora_E]
    for index, (name, module) in enumerate(layers):
        rank = len(module.lora_E["default"])
        mask = [(j + index) % 3 > 0 and index % 5 > 0 for j in range(rank)]
        module.lora_E["default"].data[~torch.tensor(mask)] = 0
        pattern[f"{name.removeprefix('base_model.model.')}.lora_E"] = mask
    model.peft_config["default"].rank_pattern = pattern


def lora(*targets: str, **settings: Any) -> Any:
    return peft.LoraConfig(r=3, lora_alpha=7, target_modules=list(targets), **settings)


IMPORTS = {
    "lora": ("llama", lambda: lora("q_proj", "v_proj")),
    "all-linear": ("llama", lambda: peft.LoraConfig(r=3, target_modules="all-linear")),
    "regex": ("llama", lambda: peft.LoraConfig(r=3, target_modules=r".*\.1\..*(q|up)_proj")),
    "layers": ("llama", lambda: lora("q_proj", layers_to_transform=[1])),
    "excluded": ("llama", lambda: lora("q_proj", exclude_modules=["model.layers.0.self_attn.q_proj"])),
    "rslora-conv1d": ("gpt2", lambda: lora("c_attn", "c_proj", use_rslora=True, fan_in_fan_out=True)),
    "dora-bias": ("gpt2", lambda: lora("c_attn", use_dora=True, fan_in_fan_out=True, bias="lora_only")),
    "patterns": (
        "llama",
        lambda: lora(
            "q_proj",
            "v_proj",
            use_rslora=True,
            rank_pattern={"q_proj": 2, "^model.layers.0.self_attn.v_proj": 1},
            alpha_pattern={"1.self_attn.v_proj": 3},
        ),
    ),
    "embedding": ("llama", lambda: lora("embed_tokens", "q_proj")),
    "convolution-bias": ("convnet", lambda: lora("stem", "body", "mix", bias="all")),
    "convolution-dora": ("convnet", lambda: lora("stem", "mix", use_dora=True)),
    "head": ("bert", lambda: lora("query", "value", task_type="SEQ_CLS")),
    "saved-modules": ("llama", lambda: lora("q_proj", modules_to_save=["embed_tokens", "lm_head", "norm"])),
    "rank-above-room": ("llama", lambda: peft.LoraConfig(r=30, target_modules=["q_proj", "k_proj", "down_proj"])),
    "encoder-decoder": ("t5", lambda: lora("q", "v")),
    "images": ("vit", lambda: lora("projection", "q_proj", modules_to_save=["classifier"])),
    "adalora": (
        "llama",
        lambda: peft.AdaLoraConfig(init_r=4, lora_alpha=7, target_modules=["q_proj", "up_proj"], total_step=9),
    ),
    "adalora-conv1d": (
        "gpt2",
        lambda: peft.AdaLoraConfig(init_r=4, target_modules=["c_attn", "c_fc"], total_step=9, fan_in_fan_out=True),
    ),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_what_peft_saves_loads_here(name: str, tmp_path: Path) -> None:
    kind, config = IMPORTS[name]
    expected = made_by_peft(config(), kind, tmp_path / "peft")
    model = zoo.build(kind)
    handle = rankloom.load(model, tmp_path / "peft")
    torch.testing.assert_close(zoo.logits(model, inputs_for(kind)), expected, **TOLERANCE)
    handle.merge()
    torch.testing.assert_close(zoo.logits(model, inputs_for(kind)), expected, **TOLERANCE)
    handle.unmerge()
    handle.save(tmp_path / "ours")  # and it is an ordinary adaptation from here on
    handle.export(tmp_path / "back")
    handle.detach()
    torch.testing.assert_close(through_peft(tmp_path / "back", kind)[0], expected, **TOLERANCE)
    rankloom.load(model, tmp_path / "ours")
    torch.testing.assert_close(zoo.logits(model, inputs_for(kind)), expected, **TOLERANCE)


@torch.no_grad()
def moved(model: torch.nn.Module) -> None:
    """As after some training: every trainable parameter elsewhere."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def started_by_peft(start: str, **settings: Any) -> Any:
    """A PEFT model whose init edits the base weights; in float32, which it insists on."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    model, modules = zoo.build("llama", dtype=torch.float32), ["q_proj", "down_proj"]
    if start == "lora_ga":
        settings["lora_ga_config"] = peft.LoraGAConfig()
    if start == "corda":
        settings["corda_config"] = CordaConfig()
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=modules, init_lora_weights=start, **settings)
    ids = zoo.batch("llama", rows=1)["input_ids"]
    if start == "lora_ga":
        preprocess_loraga(model, config, lambda: model(input_ids=ids, labels=ids).loss.backward())
    if start == "corda":
        preprocess_corda(model, config, run_model=lambda: model(ids))
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora", "lora_ga", "corda"])
def test_adapters_whose_start_edited_the_base_load_once_peft_has_converted_them(
    start: str, rslora: bool, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = started_by_peft(start, use_rslora=rslora)
        model.peft_config["default"].init_lora_weights = True  # so that PEFT does not edit the base again
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = start
        moved(model)
        expected = zoo.logits(model, inputs_for("llama"))
        model.save_pretrained(tmp_path / "raw")
        model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    base = zoo.build("llama", dtype=torch.float32)
    with pytest.raises(rankloom.errors.ArtifactError, match=rf"started by '{start}', which changes the base.*convert"):
        rankloom.load(base, tmp_path / "raw")
    assert all(p.requires_grad for p in base.parameters())
    handle = rankloom.load(base, tmp_path / "converted")
    assert {b.adapter.rank for b in handle.bindings} == {6}
    torch.testing.assert_close(zoo.logits(base, inputs_for("llama")), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(
        expected, zoo.logits(zoo.build("llama", dtype=torch.float32), inputs_for("llama")), atol=0.1
    )


def test_an_eva_adapter_with_its_own_ranks_loads(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=3, lora_alpha=7, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights="eva"
        )
        model = peft.get_peft_model(zoo.build("llama", dtype=torch.float32), config)
        peft.initialize_lora_eva_weights(model, [zoo.batch("llama", 3, rows=8)], show_progress_bar=False)
        moved(model)
        expected = zoo.logits(model, inputs_for("llama"))
        model.save_pretrained(tmp_path / "eva")
    handle = rankloom.load(zoo.build("llama", dtype=torch.float32), tmp_path / "eva")
    assert len({b.adapter.rank for b in handle.bindings}) > 1
    torch.testing.assert_close(zoo.logits(handle.model, inputs_for("llama")), expected, rtol=1e-4, atol=1e-4)


def test_an_embedding_adapted_on_one_side_of_a_tie(tmp_path: Path) -> None:
    expected = made_by_peft(lora("embed_tokens", "q_proj"), "llama", tmp_path / "peft", tie_word_embeddings=True)
    model = zoo.build("llama", tie_word_embeddings=True)
    handle = rankloom.load(model, tmp_path / "peft")
    assert handle.recipe.targets.ties == "untie"
    torch.testing.assert_close(zoo.logits(model, inputs_for("llama")), expected, **TOLERANCE)


def test_a_tied_embedding_trained_whole_reaches_both_ends_in_peft(tmp_path: Path) -> None:
    model = zoo.build("llama", tie_word_embeddings=True)
    handle = zoo.adapted(Recipe(targets=Targets(train=("embed_tokens",)), adapter=LoRA(rank=2)), model, "llama")
    zoo.perturb(handle)
    expected = zoo.logits(model, inputs_for("llama"))
    report = handle.export(tmp_path / "export")
    assert report["modules_to_save"] == ["model.embed_tokens", "lm_head"]
    for logits in through_peft(tmp_path / "export", "llama", tie_word_embeddings=True):
        torch.testing.assert_close(logits, expected, **TOLERANCE)
    again = rankloom.load(zoo.build("llama", tie_word_embeddings=True), tmp_path / "export")
    torch.testing.assert_close(zoo.logits(again.model, inputs_for("llama")), expected, **TOLERANCE)


def test_trained_in_float32_over_a_bfloat16_base(tmp_path: Path) -> None:
    handle = zoo.adapted("lora", zoo.build("llama", dtype=torch.bfloat16), "llama")
    zoo.perturb(handle)
    expected = zoo.logits(handle.model, inputs_for("llama"))
    handle.export(tmp_path / "export")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(zoo.build("llama", dtype=torch.bfloat16), tmp_path / "export")
    torch.testing.assert_close(zoo.logits(loaded, inputs_for("llama")), expected, rtol=0.05, atol=0.05)
