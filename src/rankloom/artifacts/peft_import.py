"""Reading a PEFT adapter folder into a recipe and tensors, strictly: every tensor is accounted for, or it is an error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.adapters import DoRA, LoRA
from rankloom.artifacts.files import read_json, read_tensors
from rankloom.artifacts.identity import Fingerprint
from rankloom.artifacts.peft_format import CONFIG, PREFIX, REPORT, WEIGHTS, of_pattern
from rankloom.artifacts.peft_kinds import KINDS, of_type
from rankloom.artifacts.peft_read import form_recipe
from rankloom.artifacts.store import Stored
from rankloom.artifacts.targeting import require_targeted, targets_for
from rankloom.artifacts.whole import whole_tensors
from rankloom.errors import ArtifactError, near_names
from rankloom.layers import Conv2dLayer, EmbeddingLayer, Layer, layer_of
from rankloom.recipe import Recipe
from rankloom.targets import exact_pattern

__all__ = ["import_peft"]

_PARTS = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<part>A|B|E|magnitude_vector)(?:\.weight)?")
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # starts that leave the base weight alone
_SHARED = frozenset(("peft_type", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"))
_READ = frozenset(
    ("r", "init_r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights")
    + ("use_rslora", "use_dora", "lora_dropout")
)
_IRRELEVANT = frozenset(  # to what the adapter computes
    ("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version", "bias")
    + ("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
    + ("runtime_config", "qalora_group_size", "ensure_weight_tying", "layers_pattern", "fan_in_fan_out")
    + ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
)


@dataclass
class _Module:
    """One adapted module of the file: its layer here, its tensors by part, and the scale they are multiplied with."""

    layer: Layer
    parts: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0


def import_peft(folder: Path, model: nn.Module) -> Stored:
    """Read LoRA, rsLoRA, DoRA, AdaLoRA, LoKr, LoHa, MiSS, BAT, FourierFT, VeRA or RandLoRA as PEFT wrote it.

    Raises:
        ArtifactError: a method or setting we cannot represent, tensors missing, unknown or of another shape, a pickle.
    """
    config, tensors = read_json(folder / CONFIG), read_tensors(folder / WEIGHTS)
    _refuse_settings(folder, config)
    if of_type(config["peft_type"]):
        report, versions = _origin(config)
        stored = form_recipe(folder, config, tensors, model)
        return replace(stored, fingerprint=_recorded_base(folder), report=report, versions=versions)
    adapted, rest = _sorted_out(folder, config, tensors, model)
    _require_complete(folder, config, adapted, model)
    for name, module in adapted.items():
        _check_shapes(name, module, config)
        module.scale = _scale(name, config)
    adapted = {name: module for name, module in adapted.items() if len(module.parts["A"])}
    if not adapted:
        raise ArtifactError(f"{folder / WEIGHTS} adapts no module: there is nothing to load")
    whole = whole_tensors(rest, model, set(adapted), folder / WEIGHTS)
    for module in adapted.values():
        _fit_rank(module)
    recipe = Recipe(targets=targets_for(adapted, whole, model), adapter=_adapter_part(config, adapted))
    own = {f"{name}.{key}": t for name, module in adapted.items() for key, t in _own_tensors(module).items()}
    own |= {f"whole.{name}": tensor for name, tensor in whole.items()}
    return Stored(recipe, own, _recorded_base(folder), *_origin(config))


def _origin(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    report = {"imported": "peft", "peft_type": config["peft_type"], "base_model": config.get("base_model_name_or_path")}
    return report, {"peft": str(config.get("peft_version"))}


def _refuse_settings(folder: Path, config: Mapping[str, Any]) -> None:
    where, name = folder / CONFIG, str(config.get("peft_type"))
    known = ["LORA", "ADALORA", *dict.fromkeys(kind.peft_type for kind in KINDS.values())]
    if name not in known:
        raise ArtifactError(
            f"{where} holds the PEFT type {name}, rankloom loads {', '.join(known)}: merge it with peft's merge_and_unload() and "
            f"start from the merged model"
        )
    if (start := config.get("init_lora_weights", True)) not in _PLAIN_STARTS and not str(start).isdigit():
        raise ArtifactError(
            f"{where} was started by {start!r}, which changes the base weights: convert it in peft first, "
            f"save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    read = frozenset(kinds[0].reads.split()) if (kinds := of_type(name)) else _READ
    unknown = sorted(key for key, value in config.items() if value and key not in _SHARED | read | _IRRELEVANT)
    if unknown:
        raise ArtifactError(
            f"{where} sets {', '.join(unknown)}, which rankloom does not have: set it to null if the adapter works without, "
            f"or merge with peft's merge_and_unload()"
        )


def _sorted_out(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, _Module], dict[str, Tensor]]:
    """The tensors by adapted module, and all others by their name in the model."""
    modules = dict(model.named_modules())
    adapted: dict[str, _Module] = {}
    rest, strangers = {}, []
    for key, tensor in tensors.items():
        match = _PARTS.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            rest[key.removeprefix(PREFIX)] = tensor
            continue
        name, part = match["module"], match["part"]
        layer = layer_of(modules[name]) if name in modules else None
        if layer is None:
            strangers.append(name)
        else:
            adapted.setdefault(name, _Module(layer)).parts[part[0]] = tensor
    if strangers:
        base = config.get("base_model_name_or_path")
        raise ArtifactError(
            f"{len(strangers)} of {len(tensors)} tensors in {folder / WEIGHTS} are for modules this model does not have (as "
            f"{strangers[0]}{near_names(strangers[0], modules, 2)}): load the base it was made on"
            + (f", {base}" if base else "")
        )
    return adapted, rest


def _require_complete(
    folder: Path, config: Mapping[str, Any], adapted: Mapping[str, _Module], model: nn.Module
) -> None:
    """Every adapted module has all its parts, and every module the configuration targets is there."""
    needed = {"A", "B", *("m" if config.get("use_dora") else ""), *("E" if config["peft_type"] == "ADALORA" else "")}
    for name, module in adapted.items():
        if module.parts.keys() != needed:
            odd = ", ".join(sorted(f"lora_{p}" for p in needed ^ module.parts.keys())).replace(
                "_m", "_magnitude_vector"
            )
            raise ArtifactError(
                f"{folder / WEIGHTS}: {name} lacks or does not expect {odd}: save the adapter again in peft"
            )
    require_targeted(folder, config, adapted, model)


def _check_shapes(name: str, module: _Module, config: Mapping[str, Any]) -> None:
    layer, parts = module.layer, module.parts
    if isinstance(layer, EmbeddingLayer) and config.get("use_dora"):
        raise ArtifactError(
            f"{name}: PEFT's DoRA normalises an embedding by token, which rankloom has not: merge it in peft"
        )
    if isinstance(layer, Conv2dLayer):
        if layer.grouped:
            raise ArtifactError(
                f"{name}: PEFT's LoRA of a grouped convolution is no update of its weight: leave it out"
            )
        parts["A"], parts["B"] = parts["A"].flatten(1), parts["B"].flatten(1)
    rank = _rank(name, config)
    shapes: dict[str, tuple[int, ...]] = {
        "A": (rank, layer.in_features),
        "B": (layer.out_features, rank),
        "E": (rank, 1),
    }
    if "m" in parts:
        parts["m"] = parts["m"].flatten()
        shapes["m"] = (layer.out_features,)
    for part, tensor in parts.items():
        if tuple(tensor.shape) != shapes[part]:
            raise ArtifactError(
                f"{name}: lora_{part} has shape {tuple(tensor.shape)}, the configuration and this model say {shapes[part]}: "
                f"load the base model it was made on"
            )


def _rank(name: str, config: Mapping[str, Any]) -> int:
    pattern = config.get("rank_pattern") or {}
    if config["peft_type"] == "ADALORA":
        live = pattern.get(f"{name}.lora_E")
        return int(config["init_r"]) if live is None else sum(live)
    key = of_pattern(pattern, name)
    return int(config["r"] if key is None else pattern[key])


def _scale(name: str, config: Mapping[str, Any]) -> float:
    if config["peft_type"] == "ADALORA":
        first, alpha = config["init_r"], config["lora_alpha"]
        return float(
            (alpha if alpha > 0 else first) / (first + 1e-5)
        )  # PEFT's: the initial rank, whatever is left of it
    pattern = config.get("alpha_pattern") or {}
    key, rank = of_pattern(pattern, name), _rank(name, config)
    alpha = config["lora_alpha"] if key is None else pattern[key]
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _fit_rank(module: _Module) -> None:
    """A rank above min(out, in) is more factors than the update has room for: the same update at the full rank."""
    a, b = module.parts["A"], module.parts["B"]
    fan_out, fan_in = len(b), a.shape[1]
    full = min(fan_out, fan_in)
    if len(a) <= full:
        return
    core = module.parts.pop("E", None)
    product = b @ (a if core is None else core * a)
    eye = torch.eye(full, dtype=product.dtype)
    module.parts["A"], module.parts["B"] = (product, eye) if fan_out == full else (eye, product)
    if core is not None:
        module.parts["E"] = torch.ones(full, 1, dtype=product.dtype)


def _adapter_part(config: Mapping[str, Any], adapted: Mapping[str, _Module]) -> LoRA:
    """Settings from which we compute the very scales that PEFT did."""
    rslora, triplet = bool(config.get("use_rslora")), config["peft_type"] == "ADALORA"
    ranks = {name: len(module.parts["A"]) for name, module in adapted.items()}
    units = {n: r + 1e-5 if triplet else r**0.5 if rslora else float(r) for n, r in ranks.items()}
    alphas = {name: _rounded(adapted[name].scale * units[name]) for name in adapted}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return (DoRA if config.get("use_dora") else LoRA)(
        rank=rank,
        alpha=alpha,
        scaling="triplet" if triplet else "rslora" if rslora else "standard",
        core="diagonal" if triplet else "identity",
        dropout=float(config.get("lora_dropout") or 0.0),
        rank_pattern={exact_pattern(n, ranks): r for n, r in ranks.items() if r != rank},
        alpha_pattern={exact_pattern(n, ranks): a for n, a in alphas.items() if a != alpha},
    )


def _rounded(alpha: float) -> float:
    return float(round(alpha)) if abs(alpha - round(alpha)) < 1e-12 * max(1.0, abs(alpha)) else alpha


def _own_tensors(module: _Module) -> dict[str, Tensor]:
    found = {key: tensor for key, tensor in module.parts.items() if key != "E"}
    if "E" in module.parts:
        found["E"] = module.parts["E"].flatten()
        found["mask"] = torch.ones(len(found["E"]), dtype=torch.bool)
    return found


def _recorded_base(folder: Path) -> Fingerprint | None:
    """The base's fingerprint, where we wrote the folder; PEFT itself records a name only."""
    if not (folder / REPORT).is_file():
        return None
    base = read_json(folder / REPORT).get("base")
    return Fingerprint.from_dict(base) if isinstance(base, dict) and "digest" in base else None
