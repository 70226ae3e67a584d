"""PEFT's forms, filled from ours: LoRA and rsLoRA, DoRA, AdaLoRA, and the plain LoRA that every reader takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rankloom.adapters import Binding, ChainAdapter, DoRAAdapter, LowRankAdapter
from rankloom.artifacts.handle import Handle, by_module
from rankloom.artifacts.lowrank import Cut, Factors, Held, compact, factorised, padded, product_norm
from rankloom.artifacts.peft_format import PREFIX, pattern_keys
from rankloom.layers import Conv1DLayer, Conv2dLayer, EmbeddingLayer, LinearLayer

__all__ = ["Kind", "PeftForm", "native_kind", "peft_form"]

Kind = Literal["lora", "dora", "adalora", "plain"]


@dataclass
class PeftForm:
    """One adapter for PEFT: what kind, which factors, the settings and tensors that hold them."""

    kind: str
    entries: Sequence[Factors | Held]
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def peft_form(kind: Kind, handle: Handle, cut: Cut) -> PeftForm:
    """Fill PEFT's form of a kind."""
    return {"lora": _lora, "dora": _dora, "adalora": _adalora, "plain": _plain}[kind](handle, cut)


def native_kind(bindings: list[Binding]) -> Kind:
    """The kind of PEFT adapter that holds these forms as they are; ``plain`` where there is none."""
    adapters = [b.adapter for b in bindings]
    linear = all(isinstance(b.layer, LinearLayer | Conv1DLayer) for b in bindings)
    if all(isinstance(a, DoRAAdapter) for a in adapters):
        # PEFT normalises an embedding's rows, one per token, instead of its output features.
        return "plain" if any(isinstance(b.layer, EmbeddingLayer) for b in bindings) else "dora"
    if not all(isinstance(a, LowRankAdapter) and not isinstance(a, DoRAAdapter | ChainAdapter) for a in adapters):
        return "plain"
    if all(a.E is not None and not a.offset for a in adapters) and linear and not any(b.layer.rows for b in bindings):
        return "adalora"
    return "lora"


def _lora(handle: Handle, cut: Cut) -> PeftForm:
    entries = []
    for name, group in by_module(handle.bindings).items():
        adapter = group[0].adapter
        if len(group) == 1 and group[0].layer.rows is None and adapter.E is None:
            a, b = compact(adapter)
            norm = adapter.scale * product_norm(b, a)
            alpha = _alpha(handle, adapter.scale, len(a))
            entries.append(Factors(name, group[0].layer, a, b, adapter.scale, alpha, norm=norm))
        else:
            entries.append(factorised(name, group, cut))
    return _with_factors("lora", _live(entries), handle)


def _dora(handle: Handle, cut: Cut) -> PeftForm:
    entries = []
    for name, group in by_module(handle.bindings).items():
        layer = type(group[0].layer)(group[0].layer.module)
        magnitude = torch.linalg.vector_norm(
            layer.weight().double(), dim=1
        )  # rows that are not adapted keep their norm
        a: list[Tensor] = []
        b: list[Tensor] = []
        for binding in group:
            rows = slice(*binding.layer.rows) if binding.layer.rows else slice(None)
            magnitude[rows] = binding.adapter.m.detach().double()
            piece_a, piece_b = compact(binding.adapter)
            block = piece_b.new_zeros(layer.out_features, piece_b.shape[1])
            block[rows] = piece_b if len(group) == 1 else binding.adapter.scale * piece_b
            a.append(piece_a)
            b.append(block)
        adapter, rank = group[0].adapter, sum(map(len, a))
        scale, alpha = (adapter.scale, _alpha(handle, adapter.scale, rank)) if len(group) == 1 else (1.0, None)
        made = Factors(name, layer, torch.cat(a), torch.cat(b, 1), scale, alpha, magnitude.to(adapter.m.dtype))
        entries.append(made if made.rank else padded(made, 1))  # the magnitude counts even without a low-rank part
    return _with_factors("dora", entries, handle)


def _plain(handle: Handle, cut: Cut) -> PeftForm:
    entries = _live([factorised(name, group, cut) for name, group in by_module(handle.bindings).items()])
    rank = max(entry.rank for entry in entries)
    return _with_factors("lora", [padded(entry, rank) for entry in entries], handle)


def _live(entries: list[Factors]) -> list[Factors]:
    """Rank 0 is no adapter; but PEFT has to adapt something, so one zero is kept where nothing else is."""
    return [entry for entry in entries if entry.rank] or [padded(entries[0], 1)]


def _alpha(handle: Handle, scale: float, rank: int) -> float:
    """The alpha from which PEFT computes our scale, for the rank in the file (an offset's is twice the recipe's)."""
    rslora = getattr(handle.recipe.adapter, "scaling", None) == "rslora"
    return _tidy(scale * (math.sqrt(rank) if rslora else rank or 1.0))


def _tidy(alpha: float) -> float:
    """``16.000000000000004`` is 16."""
    return float(round(alpha)) if abs(alpha - round(alpha)) < 1e-12 * max(1.0, abs(alpha)) else alpha


def _with_factors(kind: Kind, entries: list[Factors], handle: Handle) -> PeftForm:
    """Tensors and the rank and alpha settings of LoRA and DoRA."""
    made = PeftForm(kind, entries, _lora_settings(handle, entries))
    rslora = getattr(handle.recipe.adapter, "scaling", None) == "rslora" and any(e.alpha is not None for e in entries)
    alphas = {}
    for entry in entries:
        for key, tensor in _tensors_of(entry).items():
            made.tensors[f"{PREFIX}{entry.name}.{key}"] = tensor
        unit = entry.rank**0.5 if rslora else float(entry.rank)
        alphas[entry.name] = entry.alpha if entry.alpha is not None else unit
    ranks = {entry.name: entry.rank for entry in entries}
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    made.config |= {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": pattern_keys({n: r for n, r in ranks.items() if r != rank}, ranks),
        "alpha_pattern": pattern_keys({n: a for n, a in alphas.items() if a != alpha}, ranks),
        "use_rslora": rslora,
        "use_dora": kind == "dora",
    }
    return made


def _lora_settings(handle: Handle, entries: list[Factors]) -> dict[str, Any]:
    """What PEFT's LoRA, DoRA and AdaLoRA have in common."""
    return {
        "init_lora_weights": True,
        "fan_in_fan_out": any(isinstance(entry.layer, Conv1DLayer) for entry in entries),
        "lora_dropout": float(getattr(handle.recipe.adapter, "dropout", 0.0)),
    }


def _tensors_of(entry: Factors) -> dict[str, Tensor]:
    a, b, m = entry.A, entry.B, entry.magnitude
    if isinstance(entry.layer, EmbeddingLayer):
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    if isinstance(entry.layer, Conv2dLayer):
        a, b = entry.layer.from_matrix(a), b[:, :, None, None]
        m = None if m is None else m[None, :, None, None]
    found = {"lora_A.weight": a, "lora_B.weight": b}
    return found if m is None else {**found, "lora_magnitude_vector": m}


def _adalora(handle: Handle, cut: Cut) -> PeftForm:
    """Masked components leave the file; ``rank_pattern`` says which of the initial ranks they were."""
    first = max(binding.adapter.rank for binding in handle.bindings)
    scale = Counter(binding.adapter.scale for binding in handle.bindings).most_common(1)[0][0]
    entries: list[Factors] = []
    tensors: dict[str, Tensor] = {}
    patterns = {}
    for binding in handle.bindings:
        adapter: LowRankAdapter = binding.adapter
        assert adapter.E is not None
        live = adapter.mask
        if not live.any():
            continue
        a, b = adapter.A.detach()[live], adapter.B.detach()[:, live]
        core = adapter.gains(adapter.E).detach()[live] * (adapter.scale / scale)
        norm = scale * product_norm(b, core[:, None] * a)
        entries.append(Factors(binding.name, binding.layer, a, b, scale, norm=norm))
        parts = {"lora_A": a, "lora_B": b, "lora_E": core[:, None]}
        tensors |= {f"{PREFIX}{binding.name}.{key}": tensor for key, tensor in parts.items()}
        if len(core) != first:
            patterns[f"{binding.name}.lora_E"] = [*live.tolist(), *[False] * (first - len(live))]
    if not entries:
        return _lora(handle, cut)
    config = {
        **_lora_settings(handle, entries),
        "peft_type": "ADALORA",
        "init_r": first,
        "target_r": max(1, round(sum(e.rank for e in entries) / len(handle.bindings))),
        "lora_alpha": _tidy(scale * (first + 1e-5)),  # PEFT divides by the initial rank + 1e-5, whatever is left of it
        "rank_pattern": patterns or None,
        "total_step": 1,  # PEFT insists on one; the allocation is over
    }
    return PeftForm("adalora", entries, config, tensors)
