"""PEFT's folders of the forms beside LoRA, both ways, in float64: each computes what the other saved, and what does not fit is
one line."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import BAT, AdapterPart, FourierFT, LoHa, LoKr, MiSS, RandLoRA, VeRA
from rankloom.errors import ArtifactError
from rankloom.init import OwnStart
from tests import zoo

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not save")

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
SINGLE = {"rtol": 1e-5, "atol": 1e-5}  # PEFT forms FourierFT's update in float32, whatever the model computes in
LLAMA = {"target_modules": ["q_proj", "k_proj", "down_proj"]}  # three shapes: corners are taken, terms differ
GPT2 = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
CONVNET = {"target_modules": ["stem", "body", "mix"]}


def saved_by_peft(config: Any, kind: str, folder: Path, **save: Any) -> Tensor:
    """Attach with PEFT, move everything that trains, save; the logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(zoo.build(kind), config).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in made.parameters():
                if p.requires_grad:
                    p += 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        made.save_pretrained(folder, **save)
    return zoo.logits(made, zoo.batch(kind))


def through_peft(folder: Path, kind: str) -> tuple[Tensor, Tensor]:
    """PEFT's logits with the adapter attached, and after its own merge; whatever it loads, it has to know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's and transformers' own affair
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out is set to|.*Already found a `peft_config`")
        # PEFT's RandLoRA repeats its shared bases under every module, and misses the copies where they are written once.
        warnings.filterwarnings("ignore", message=r"Found missing adapter keys[^,]*\.randlora_A")
        loaded = peft.PeftModel.from_pretrained(zoo.build(kind), folder).eval()
        attached = zoo.logits(loaded, zoo.batch(kind))
        return attached, zoo.logits(loaded.merge_and_unload(), zoo.batch(kind))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def vera(**settings: Any) -> Any:
    return peft.VeraConfig(**{"r": 5, **LLAMA, **settings})


def randlora(**settings: Any) -> Any:
    return peft.RandLoraConfig(**{"r": 3, "randlora_alpha": 2, **LLAMA, **settings})


SAVED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "lokr": ("llama", lambda: peft.LoKrConfig(r=1, alpha=3, **LLAMA), "lokr"),
    "lokr, both": (
        "llama",
        lambda: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=2, **LLAMA),
        "lokr",
    ),
    "lokr, whole head": (
        "llama",
        lambda: peft.LoKrConfig(r=4, init_weights="lycoris", modules_to_save=["lm_head"], **LLAMA),
        "lokr",
    ),
    "lokr, patterns": (
        "llama",
        lambda: peft.LoKrConfig(
            r=1, alpha=3, rank_pattern={"q_proj": 2, r".*0.mlp.down_proj": 3}, alpha_pattern={"k_proj": 5}, **LLAMA
        ),
        "lokr",
    ),
    "lokr, convolution": ("convnet", lambda: peft.LoKrConfig(r=1, **CONVNET), "lokr"),
    "lokr, Tucker": ("convnet", lambda: peft.LoKrConfig(r=1, use_effective_conv2d=True, **CONVNET), "lokr"),
    "loha": ("llama", lambda: peft.LoHaConfig(r=2, alpha=3, **LLAMA), "loha"),
    "loha, patterns": (
        "llama",
        lambda: peft.LoHaConfig(
            r=2, alpha=3, rank_pattern={"down_proj": 4}, alpha_pattern={"1.self_attn.k_proj": 5}, **LLAMA
        ),
        "loha",
    ),
    "loha, convolution": ("convnet", lambda: peft.LoHaConfig(r=1, **CONVNET), "loha"),
    "loha, Tucker": ("convnet", lambda: peft.LoHaConfig(r=2, use_effective_conv2d=True, **CONVNET), "loha"),
    "miss": ("llama", lambda: peft.MissConfig(r=4, **LLAMA), "miss"),
    "miss, ragged": ("llama", lambda: peft.MissConfig(r=5, modules_to_save=["lm_head"], **LLAMA), "miss"),
    "miss, random start": ("llama", lambda: peft.MissConfig(r=4, init_weights=False, **LLAMA), "miss"),
    "miss, mini": ("llama", lambda: peft.MissConfig(r=4, init_weights="mini", mini_r=2, **LLAMA), "miss"),
    "miss, bat": ("llama", lambda: peft.MissConfig(r=4, init_weights="bat", **LLAMA), "bat"),
    "fourierft": ("llama", lambda: peft.FourierFTConfig(n_frequency=20, scaling=30.0, **LLAMA), "fourierft"),
    "fourierft, another seed": (
        "gpt2",
        lambda: peft.FourierFTConfig(n_frequency=20, random_loc_seed=5, modules_to_save=["ln_f"], **GPT2),
        "fourierft",
    ),
    "vera": ("llama", lambda: vera(), "vera"),
    "vera, from its key": ("llama", lambda: vera(projection_prng_key=3, save_projection=False), "vera"),
    "vera, Conv1D": ("gpt2", lambda: vera(vera_dropout=0.1, modules_to_save=["ln_f"], **GPT2), "vera"),
    "randlora": ("llama", lambda: randlora(modules_to_save=["lm_head"]), "randlora"),
    "randlora, from its key": ("llama", lambda: randlora(projection_prng_key=3, save_projection=False), "randlora"),
    "randlora, sparse": ("llama", lambda: randlora(sparse=True, save_projection=False), "randlora"),
    "randlora, very sparse": ("llama", lambda: randlora(very_sparse=True, save_projection=False), "randlora"),
    "randlora, Conv1D": ("gpt2", lambda: randlora(**GPT2), "randlora"),
    "randlora, bases wider than any module's": (
        "llama",
        lambda: randlora(target_modules=["up_proj", "down_proj"]),
        "randlora",
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_peft_saves_loads_here_and_goes_back_number_for_number(name: str, tmp_path: Path) -> None:
    kind, config, form = SAVED[name]
    asked = config()
    close = SINGLE if form == "fourierft" else TOLERANCE
    expected = saved_by_peft(asked, kind, tmp_path / "peft")
    assert float((expected - zoo.logits(zoo.build(kind), zoo.batch(kind))).abs().max()) > 0.01
    model = zoo.build(kind)
    handle = rankloom.load(model, tmp_path / "peft")
    assert handle.recipe.adapter.kind == form and handle.report["peft_type"] == asked.peft_type
    torch.testing.assert_close(zoo.logits(model, zoo.batch(kind)), expected, **close)
    handle.merge()
    torch.testing.assert_close(zoo.logits(model, zoo.batch(kind)), expected, **close)
    handle.unmerge()

    report = handle.export(tmp_path / "back")
    assert (report["form"], report["exact"], report["reason"]) == (form, True, None)
    for logits in through_peft(tmp_path / "back", kind):
        torch.testing.assert_close(logits, expected, **close)
    theirs, mine = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("peft", "back"))
    if "Tucker" not in name:  # its core is contracted
        drawn = {} if getattr(asked, "save_projection", True) else {k: mine.pop(k) for k in set(mine) - set(theirs)}
        assert all(k.startswith("base_model.") and k.endswith(("_A", "_B")) for k in drawn)
        read = {
            k: t != 0 if "base_model.randlora" in k else ... for k, t in mine.items()
        }  # zeros where no module reads
        assert all(torch.equal(t[read[k]], theirs[k][read[k]]) for k, t in mine.items())

    handle.save(tmp_path / "ours")  # an ordinary adaptation from here on
    for folder in ("back", "ours"):
        again = rankloom.load(zoo.build(kind), tmp_path / folder)
        assert again.recipe == handle.recipe and same(again.state_dict(), handle.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{}, {"sparse": True}, {"very_sparse": True}, "vera"])
def test_banks_are_drawn_as_peft_draws_them(kind: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    config = partial(vera, projection_prng_key=5) if kind == "vera" else partial(randlora, **kind)
    stored = []
    for saved in (True, False):
        made = peft.get_peft_model(zoo.build("llama", dtype=dtype), config(save_projection=saved))
        made.save_pretrained(tmp_path / str(saved))
        state = rankloom.load(zoo.build("llama", dtype=dtype), tmp_path / str(saved)).state_dict()
        stored.append({k: t for k, t in state.items() if ".stored." in k})
    assert len(stored[0]) == 2 and all(t.any() for t in stored[0].values()) and same(*stored)


@pytest.mark.parametrize("config", [vera, randlora])
def test_stored_banks_are_in_the_file_once_and_follow_the_model(config: Any, tmp_path: Path) -> None:
    saved_by_peft(config(), "llama", tmp_path / "peft")
    handle = rankloom.load(zoo.build("llama"), tmp_path / "peft")
    stored = [name for name in handle.state_dict() if ".stored." in name]
    assert [name.split(".stored.")[1] for name in stored] == ["0.rows", "1.rows"]
    assert not any(name.endswith("digest") for name in handle.state_dict())
    zoo.train(handle, handle.optimizer(1e-3), zoo.batches("llama"), 2)
    assert {t.name.rsplit(".", 1)[1] for t in handle.trainables()} <= {"b", "d", "lam", "gam"}
    twin = copy.deepcopy(handle.model)
    narrow = handle.model.float()
    assert {b.adapter.state_dict()[k].dtype for b in handle.bindings for k in b.adapter.state_dict()} == {torch.float32}
    wide, small = (zoo.logits(model, zoo.batch("llama")) for model in (twin, narrow))
    assert wide.dtype == torch.float64 and small.dtype == torch.float32  # a copy has banks of its own
    torch.testing.assert_close(small.double(), wide, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["vera", "randlora"])
def test_a_fresh_start_on_banks_that_only_a_file_has(form: str) -> None:
    model = zoo.build("llama")
    recipe = zoo.recipe_of(form).with_({"adapter.basis": "stored"})
    with pytest.raises(rankloom.errors.RecipeError, match="takes its random tensors from a saved adapter: load one"):
        rankloom.adapt(model, recipe)
    assert not any("rankloom" in m._modules for m in model.modules())


# --- and back --------------------------------------------------------------------------------------------------------------


QKD, HEAD = Targets(("q_proj", "k_proj", "down_proj")), Targets(("q_proj", "down_proj"), train=("lm_head", "norm"))
FUSED, BIASED = Targets(("c_attn", "c_proj")), Targets(("c_attn", "c_fc"), train=("c_attn.bias", "ln_f"))
WIDE = Targets(("up_proj", "down_proj"))  # PEFT makes bases for 24 x 24, where 16 x 24 are read
QUERY = Targets(("query", "key"), train=("query.bias", "classifier"))
CONV = Targets(("stem", "body", "mix"))
OURS: dict[str, tuple[str, Targets, AdapterPart]] = {
    "lokr": ("llama", QKD, LoKr(rank=1, alpha=3, decompose_both=True, zero="w2")),
    "lokr, patterns": ("llama", HEAD, LoKr(rank=1, rank_pattern={"q_proj": 2}, alpha_pattern={"*.0.*": 3})),
    "lokr, convolution": ("convnet", CONV, LoKr(rank=1)),
    "lokr, whole convolution": ("convnet", CONV, LoKr(rank=9)),
    "loha": ("llama", HEAD, LoHa(rank=2, alpha=3)),
    "loha, patterns": ("llama", QKD, LoHa(rank=2, alpha=6, rank_pattern={"k_proj": 4}, alpha_pattern={"*.1.*": 3})),
    "loha, convolution": ("convnet", CONV, LoHa(rank=2, alpha=3)),
    "miss": ("llama", QKD, MiSS(rank=5)),
    "miss, mini": ("llama", HEAD, MiSS(rank=3, mini=4)),
    "bat": ("llama", HEAD, BAT(rank=4)),
    "lokr, biases": ("bert", QUERY, LoKr(rank=2)),
    "loha, biases": ("bert", QUERY, LoHa(rank=2, alpha=2)),
    "bat, biases": ("bert", QUERY, BAT(rank=4)),
    "fourierft": ("gpt2", BIASED, FourierFT(coefficients=12, scale=9.0, places="peft", seed=3)),
    "vera": ("llama", QKD, VeRA(rank=5, dropout=0.1)),
    "vera, Conv1D": ("gpt2", BIASED, VeRA(rank=3)),
    "randlora": ("llama", QKD, RandLoRA(rank=3, order="peft", scale=2.5)),
    "randlora, wide and tall": ("llama", WIDE, RandLoRA(rank=3, order="peft")),
    "randlora, matched, wide and tall": ("llama", WIDE, RandLoRA(rank=3)),
    "randlora, matched": ("gpt2", FUSED, RandLoRA(rank=3)),
    "randlora, Conv1D": ("gpt2", BIASED, RandLoRA(rank=5, order="peft")),
}
ROUNDED = ("vera", "randlora, matched")  # scales folded into a vector once; terms summed in another order


@pytest.mark.parametrize("name", OURS)
def test_what_we_export_peft_computes(name: str, tmp_path: Path) -> None:
    kind, targets, part = OURS[name]
    close = SINGLE if part.kind == "fourierft" else TOLERANCE
    handle = rankloom.adapt(zoo.build(kind), Recipe(targets=targets, adapter=part, init=OwnStart()))
    zoo.perturb(handle, 0.2)
    expected = zoo.logits(handle.model, zoo.batch(kind))
    report = handle.export(tmp_path / "first")
    assert (report["form"], report["exact"], report["reason"]) == (part.kind, True, None)
    assert torch.equal(zoo.logits(handle.model, zoo.batch(kind)), expected)  # exporting changed nothing here
    for logits in through_peft(tmp_path / "first", kind):
        torch.testing.assert_close(logits, expected, **close)
    again = rankloom.load(zoo.build(kind), tmp_path / "first")
    found = zoo.logits(again.model, zoo.batch(kind))
    if name.startswith(ROUNDED):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(found, expected)
        kept = {k: t for k, t in again.state_dict().items() if ".stored." not in k}
        assert same(kept, {k: t for k, t in handle.state_dict().items() if k in kept})
    again.export(tmp_path / "second")
    files = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("first", "second")]
    assert same(*files) and "form" in json.loads((tmp_path / "second" / "rankloom_export.json").read_text())


PLAIN: dict[str, tuple[str, Targets, AdapterPart, str]] = {
    "an embedding": (
        "llama",
        Targets(("embed_tokens", "q_proj")),
        MiSS(rank=4),
        "PEFT's MISS adapts no Embedding, as model.em",
    ),
    "Conv1D": ("gpt2", FUSED, LoKr(rank=1), "PEFT's LOKR adapts no Conv1D, as transformer.h.0.attn.c_attn"),
    "slices": (
        "gpt2",
        Targets(("c_attn[q]",)),
        VeRA(rank=3),
        "adapts no row slices, as transformer.h.0.attn.c_attn\\[0:16",
    ),
    "a convolution": ("convnet", CONV, VeRA(rank=3), "PEFT's VERA adapts no Conv2d, as stem"),
    "ragged blocks": ("llama", QKD, BAT(rank=3), r"sides that rank 3 divides, .*q_proj is \(16, 16\)"),
    "hashed places": ("llama", QKD, FourierFT(coefficients=12), "draws other places"),
    "unlike terms": ("llama", QKD, RandLoRA(rank=3), "modules of 3 and 6 terms otherwise"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_peft_cannot_hold_is_plain_lora_for_a_reason(name: str, tmp_path: Path) -> None:
    kind, targets, part, reason = PLAIN[name]
    handle = rankloom.adapt(zoo.build(kind), Recipe(targets=targets, adapter=part, init=OwnStart()))
    zoo.perturb(handle, 0.2)
    report = handle.export(tmp_path / "export", energy=1.0)
    assert report["form"] == "lora" and report["exact"] and re.search(reason, report["reason"])
    assert json.loads((tmp_path / "export" / "rankloom_export.json").read_text())["reason"] == report["reason"]
    for logits in through_peft(tmp_path / "export", kind):
        torch.testing.assert_close(logits, zoo.logits(handle.model, zoo.batch(kind)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("part", [LoKr(rank=1), LoHa(rank=2, alpha=2)])
def test_convolutions_that_only_these_forms_compute_alike_in_peft(part: AdapterPart, tmp_path: Path) -> None:
    def model(**settings: Any) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(8, 12, 3, padding=2, **settings)).double()

    dilated = {"groups": 2, "dilation": 2}
    recipe, x = Recipe(targets=Targets(("0",)), adapter=part, init=OwnStart()), torch.randn(2, 8, 6, 6).double()
    handle = rankloom.adapt(model(**dilated), recipe)
    zoo.perturb(handle, 0.2)
    assert handle.export(tmp_path / "own")["form"] == part.kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(model(**dilated), tmp_path / "own")
    torch.testing.assert_close(loaded(x), handle.model(x), **TOLERANCE)
    torch.testing.assert_close(
        rankloom.load(model(**dilated), tmp_path / "own").model(x), handle.model(x), rtol=0, atol=0
    )
    torch.testing.assert_close(loaded.merge_and_unload()(x), handle.model(x), **TOLERANCE)
    with pytest.raises(ArtifactError, match="PEFT's LoRA drops groups"):
        handle.export(tmp_path / "plain", form="lora")
    reflected = rankloom.adapt(model(padding_mode="reflect"), recipe)
    with pytest.raises(ArtifactError, match="PEFT's LoRA drops groups"):  # what remains, once its own form is out
        reflected.export(tmp_path / "plain")


def test_plain_lora_on_request(tmp_path: Path) -> None:
    handle = rankloom.adapt(zoo.build("llama"), Recipe(targets=QKD, adapter=MiSS(rank=4), init=OwnStart()))
    zoo.perturb(handle)
    for options in ({"form": "lora"}, {"rank": 4}):
        report = handle.export(tmp_path / "export", **options)  # type: ignore[arg-type]
        assert (report["form"], report["rank"], report["reason"]) == ("lora", 4, None)


# --- what does not fit ----------------------------------------------------------------------------------------------------

Spoil = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def setting(**changes: Any) -> Spoil:
    return lambda config, held: config.update(changes)


def without(*keys: str) -> Spoil:
    return lambda config, held: [config.pop(key) for key in keys]


def lost(part: str) -> Spoil:
    return lambda config, held: [held.pop(key) for key in [k for k in held if part in k][:1]]


def lost_module(config: dict[str, Any], held: dict[str, Tensor]) -> None:
    for key in [k for k in held if "layers.1.self_attn.q_proj" in k]:
        held.pop(key)


def stranger(config: dict[str, Any], held: dict[str, Tensor]) -> None:
    key = next(k for k in held if "q_proj" in k)
    held[key.replace("q_proj", "q_prj")] = held[key].clone()


def resized(part: str, *shape: int) -> Spoil:
    return lambda config, held: held.update({next(k for k in held if part in k): torch.ones(shape)})


def parted(config: dict[str, Any], held: dict[str, Tensor]) -> None:
    held[next(k for k in held if k.endswith("q_proj.randlora_A"))] += 1


LOKR, MISS = lambda: peft.LoKrConfig(r=1, **LLAMA), lambda: peft.MissConfig(r=4, **LLAMA)
FOURIER = lambda: peft.FourierFTConfig(n_frequency=20, **LLAMA)  # noqa: E731
BROKEN: dict[str, tuple[Callable[[], Any], Spoil, str]] = {
    "rank": (LOKR, setting(r=5), r"has lokr_w1 \(4, 4\), lokr_w2_a .*adapter_config.json and this model say"),
    "a lost tensor": (LOKR, lost("lokr_w1"), "down_proj has lokr_w2"),
    "a lost module": (LOKR, lost_module, r"1 of 6 modules that adapter_config.json targets have no tensors"),
    "a stranger": (
        LOKR,
        stranger,
        "q_prj, which this model does not have; did you mean .*q_proj.*: load the base it was",
    ),
    "a further tensor": (
        LOKR,
        lambda config, held: held.update({"base_model.model.other": torch.ones(2)}),
        "1 of 1 further tensors in .* have no place in this model",
    ),
    "a core of a linear": (LOKR, resized("lokr_w1", 1), r"has lokr_w1 \(1,\)"),
    "dropout": (LOKR, setting(rank_dropout=0.1), "sets rank_dropout, which rankloom does not have"),
    "next year's": (FOURIER, setting(ifft2_norm="ortho"), "sets ifft2_norm, which rankloom does not have"),
    "a frequency by module": (FOURIER, setting(n_frequency_pattern={"q_proj": 5}), "sets n_frequency_pattern"),
    "too many frequencies": (
        FOURIER,
        setting(n_frequency=500),
        "500 coefficients are more than the .*merge it in peft",
    ),
    "no seed": (FOURIER, setting(random_loc_seed=None), "has a setting that cannot be"),
    "no rank": (MISS, without("r"), "adapter_config.json lacks r: save the adapter again"),
    "a rank in words": (MISS, setting(r="four"), "has a setting that cannot be .*four.*: save"),
    "a negative rank": (MISS, setting(r=-1), "rank and mini must be at least 1"),
    "no rank at all": (randlora, setting(r=0), "has a setting that cannot be .*division by zero"),
    "pattern of a list": (LOKR, setting(rank_pattern=["q_proj"]), "has a setting that cannot be"),
    "another start": (MISS, setting(init_weights="maxi"), "sets init_weights to 'maxi', which rankloom does not have"),
    "a rank above a side": (randlora, setting(r=9), r"rank 9 is above min\(out, in\) = 8 of .*k_proj"),
    "another variant": (MISS, setting(init_weights="bat"), r"has miss_block \(4, 16\), .* say miss_block \(4, 4, 4\)"),
    "no projection": (vera, lost("base_model.vera_B"), "lacks vera_B, which save_projection promises"),
    "a flat projection": (vera, resized("base_model.vera_A", 5), r"the shared matrices have shapes \(5,\)"),
    "a narrow projection": (vera, resized("base_model.vera_A", 5, 20), r"vera_A has \(5, 20\) .* need \(5, 24\): load"),
    "another projection": (vera, resized("base_model.vera_A", 4, 24), "which do not fit r = 5 in adapter_config.json"),
    "parted projections": (randlora, parted, "has different randlora_A for different modules"),
    "nothing": (MISS, lambda config, held: held.clear(), "adapts no module: there is nothing to load"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    asked, spoil, message = BROKEN[case]
    saved_by_peft(asked(), "llama", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    held = load_file(tmp_path / "adapter_model.safetensors")
    spoil(config, held)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(held, tmp_path / "adapter_model.safetensors")
    model = zoo.build("llama")
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(ArtifactError, match=message) as caught:
        rankloom.load(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == before


@pytest.mark.parametrize("config", [vera, randlora, MISS, LOKR])
def test_another_base_is_refused(config: Any, tmp_path: Path) -> None:
    saved_by_peft(config(), "llama", tmp_path)
    with pytest.raises(ArtifactError, match="load the base it was made on"):
        rankloom.load(zoo.build("llama", hidden_size=32, intermediate_size=48), tmp_path)
