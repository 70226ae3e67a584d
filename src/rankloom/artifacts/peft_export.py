"""Writing a PEFT adapter folder: PEFT's own form where it has one, else plain LoRA with its measured error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rankloom.adapters import Binding
from rankloom.artifacts.files import replacing, write_json, write_tensors
from rankloom.artifacts.handle import Handle, as_attached
from rankloom.artifacts.lowrank import Cut, Factors, overall_error
from rankloom.artifacts.merge import Drift, fold, measured, merged_biases, merged_weights
from rankloom.artifacts.peft_format import CARD, CONFIG, PREFIX, REPORT, WEIGHTS, model_card, target_patterns, task_type
from rankloom.artifacts.peft_forms import PeftForm, native_kind, peft_form
from rankloom.artifacts.peft_kinds import KINDS
from rankloom.artifacts.peft_native import held_form, obstacle
from rankloom.artifacts.probe import outputs
from rankloom.artifacts.store import versions
from rankloom.artifacts.whole import Whole, whole_entries
from rankloom.errors import ArtifactError
from rankloom.layers import Conv1DLayer, Conv2dLayer, EmbeddingLayer, LinearLayer

__all__ = ["export_peft"]


@torch.no_grad()
def export_peft(
    handle: Handle,
    path: Path,
    *,
    form: Literal["auto", "lora"] = "auto",
    rank: int | None = None,
    energy: float = 0.99,
    max_rank: int = 256,
    base_model: str | None = None,
    probe: Any = None,
) -> dict[str, Any]:
    """Write ``adapter_config.json``, ``adapter_model.safetensors``, a model card and ``rankloom_export.json``.

    ``form="auto"`` writes PEFT's LoRA, rsLoRA, DoRA or AdaLoRA where the adapter is one, with per-module ranks and alphas,
    and its LoHa, LoKr, MiSS (BAT), FourierFT, VeRA or RandLoRA where PEFT computes the form alike, frozen projections
    included; anything else becomes plain LoRA, and the report has the ``reason``. ``form="lora"`` always writes the form that
    every reader takes (vLLM, SGLang, llama.cpp): one rank (padded with zeros), one alpha, no patterns, no magnitude. Updates
    that have no low rank are cut to the best approximation, and the report has the relative error of every module, of all
    together, and the drift of the logits.

    Args:
        handle: the adaptation.
        path: the folder to write.
        form: ``auto`` or ``lora``.
        rank: cut every update to this rank (implies ``form="lora"``).
        energy: without ``rank``, keep this share of each update's squared norm.
        max_rank: the most that ``energy`` may ask for.
        base_model: name of the base to record; the one the model was loaded by, if not given.
        probe: inputs to measure the logit drift of an approximation on.

    Raises:
        ArtifactError: nothing to adapt with, a module PEFT cannot adapt, or a folder that holds other files.
    """
    if rank is not None and rank < 1:
        raise ArtifactError(f"rank must be at least 1, got {rank}")
    if form not in ("auto", "lora"):
        raise ArtifactError(f"unknown form {form!r} (known: auto, lora)")
    _refuse_unsupported(handle.bindings)
    with as_attached(handle):
        made, report, name = _made(handle, form, Cut(rank, energy, max_rank), base_model, probe)
    with replacing(path, (CONFIG, WEIGHTS, REPORT, CARD)) as staging:
        write_tensors(staging / WEIGHTS, made.tensors)
        write_json(staging / CONFIG, made.config)
        write_json(staging / REPORT, {**report, **_provenance(handle)})
        hub = name if name and not Path(name).exists() and not Path(name).is_absolute() else None
        (staging / CARD).write_text(model_card(hub, path.name, report), encoding="utf-8")
    return report


def _made(
    handle: Handle, form: str, cut: Cut, base_model: str | None, probe: Any
) -> tuple[PeftForm, dict[str, Any], str]:
    plain, known = form == "lora" or cut.rank is not None, handle.recipe.adapter.kind in KINDS
    reason = obstacle(handle) if known and not plain else None
    if known and not plain and reason is None:
        made = held_form(handle)
    else:
        _refuse_convolutions(handle.bindings)
        made = peft_form("plain" if plain else native_kind(handle.bindings), handle, cut)
    name = base_model if base_model is not None else handle.fingerprint().name
    whole = whole_entries(handle, {entry.name for entry in made.entries}, merged_biases(handle))
    made.tensors.update({PREFIX + key: tensor for key, tensor in whole.tensors.items()})
    made.config = {**_config(handle, made, whole, name), **made.config}
    return made, {**_report(handle, made, whole, probe), "reason": reason}, name


def _refuse_unsupported(bindings: list[Binding]) -> None:
    if not bindings:
        raise ArtifactError("the recipe adapts no weight, which PEFT cannot express: export(format='merged') instead")
    for binding in bindings:
        layer = binding.layer
        if not binding.adapter.linear_in_x:
            raise ArtifactError(
                f"{binding.name} carries an update that depends on the input and is no matrix: PEFT has no such form; save it "
                f"with handle.save()"
            )
        if not isinstance(layer, LinearLayer | Conv1DLayer | EmbeddingLayer | Conv2dLayer):
            raise ArtifactError(
                f"PEFT cannot adapt {binding.name} ({type(layer.module).__name__}): export merged instead"
            )


def _refuse_convolutions(bindings: list[Binding]) -> None:
    """Raise :class:`ArtifactError` for those that PEFT's LoRA would compute otherwise."""
    for binding in bindings:
        conv: Any = binding.layer.module
        if isinstance(binding.layer, Conv2dLayer) and (
            conv.groups > 1 or conv.dilation not in (1, (1, 1)) or conv.padding_mode != "zeros"
        ):
            raise ArtifactError(
                f"PEFT's LoRA drops groups, dilation and padding modes of a convolution, as {binding.name} has: leave it out of "
                f"targets, or export(format='merged')"
            )


def _config(handle: Handle, made: PeftForm, whole: Whole, base: str) -> dict[str, Any]:
    names = [entry.name for entry in made.entries]
    # Only LoRA's kinds need the setting to load biases: PEFT's other forms take them with the rest.
    biases = {} if made.kind in KINDS else {"bias": "lora_only" if whole.biases else "none"}
    return {
        "base_model_name_or_path": base or None,
        "task_type": task_type(handle.model, whole.modules),
        "inference_mode": True,
        "target_modules": target_patterns(names, handle.model),
        "modules_to_save": list(whole.modules) or None,
        **biases,
    }


def _report(handle: Handle, made: PeftForm, whole: Whole, probe: Any) -> dict[str, Any]:
    exact = all(entry.exact for entry in made.entries)
    return {
        "format": "peft",
        "form": made.kind,
        "exact": exact,
        "relative_error": overall_error(made.entries),
        "rank": max((entry.rank for entry in made.entries if entry.rank), default=None),
        "targets": {e.name: {"rank": e.rank, "relative_error": e.error, "exact": e.exact} for e in made.entries},
        "modules_to_save": list(whole.modules),
        "loaded_in_place": list(whole.in_place),
        "drift": None if exact else _drift(handle, [e for e in made.entries if isinstance(e, Factors)], probe),
    }


def _provenance(handle: Handle) -> dict[str, Any]:
    return {"recipe": handle.recipe.to_dict(), "base": asdict(handle.fingerprint()), "versions": versions()}


def _drift(handle: Handle, entries: Sequence[Factors], probe: Any) -> dict[str, float] | None:
    """How far the approximated updates move the logits from the adapted model's, on a probe."""
    inputs, adapted = measured(handle.model, probe)
    if adapted is None:
        return None
    deltas = {entry.name: entry for entry in entries}

    def cut_delta(binding: Binding) -> Tensor:
        entry = deltas.get(binding.target.module_name)
        if entry is None:
            return torch.zeros(binding.target.shape, dtype=torch.float64, device=binding.layer.device)
        rows = slice(*binding.layer.rows) if binding.layer.rows else slice(None)
        return entry.delta()[rows]

    weights, biases = merged_weights(handle, cut_delta), merged_biases(handle)
    handle.detach()
    try:
        base = outputs(handle.model, inputs)
        with fold(handle, weights, biases).base():
            return asdict(Drift.between(adapted, outputs(handle.model, inputs), base))
    finally:
        handle.attach()
