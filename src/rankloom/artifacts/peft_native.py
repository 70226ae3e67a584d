"""Writing PEFT's forms beside LoRA: where the adapter is one that PEFT computes alike, number for number."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rankloom.adapters import Binding
from rankloom.artifacts.handle import Handle
from rankloom.artifacts.lowrank import Held
from rankloom.artifacts.peft_banks import from_rows
from rankloom.artifacts.peft_format import PREFIX
from rankloom.artifacts.peft_forms import PeftForm
from rankloom.artifacts.peft_kinds import KINDS, PeftKind
from rankloom.layers import Conv1DLayer, Conv2dLayer

__all__ = ["held_form", "obstacle"]


def obstacle(handle: Handle) -> str | None:
    """Why PEFT's own form cannot hold an adaptation of one of ``KINDS``; None where it can."""
    part, bindings = handle.recipe.adapter, handle.bindings
    kind = KINDS[part.kind]
    for binding in bindings:
        layer = binding.layer
        if layer.rows is not None:
            return f"PEFT's {kind.peft_type} adapts no row slices, as {binding.name}"
        if not isinstance(layer, kind.layers):
            return f"PEFT's {kind.peft_type} adapts no {type(layer).__name__.removesuffix('Layer')}, as {binding.name}"
        if isinstance(layer, Conv2dLayer) and layer.module.padding_mode != "zeros":
            return f"PEFT's {kind.peft_type} pads convolutions with zeros, unlike {binding.name}"
    return kind.limit(part, bindings)


def held_form(handle: Handle) -> PeftForm:
    """The settings and tensors of PEFT's own form, for an adaptation without an :func:`obstacle`."""
    part, bindings = handle.recipe.adapter, handle.bindings
    kind = KINDS[part.kind]
    entries = [Held(b.name, b.layer, getattr(b.adapter, "rank", None)) for b in bindings]
    config = {"peft_type": kind.peft_type, **kind.settings(part, [b.name for b in bindings])}
    if Conv1DLayer in kind.layers:
        config["fan_in_fan_out"] = any(isinstance(b.layer, Conv1DLayer) for b in bindings)
    tensors = {PREFIX + key: tensor for b in bindings for key, tensor in _tensors(b, kind).items()}
    return PeftForm(part.kind, entries, config, tensors | _banks(bindings, kind, part))


def _tensors(binding: Binding, kind: PeftKind) -> dict[str, Tensor]:
    made = {}
    for name, parameter in binding.adapter.named_parameters():
        tensor = parameter.detach()
        if name == kind.takes_scale:
            tensor = binding.adapter.scale * tensor
        if name == "w2" and isinstance(binding.layer, Conv2dLayer):  # a whole factor has the kernel's own dimensions
            tensor = tensor.unflatten(1, (-1, *binding.layer.stored.shape[2:]))
        made[f"{binding.name}.{kind.names[name]}"] = tensor
    return made


def _banks(bindings: list[Binding], kind: PeftKind, part: Any) -> dict[str, Tensor]:
    """What all modules share, as large as PEFT makes it: where that is more than any module reads, zeros."""
    if not kind.banks:
        return {}
    first, rank = bindings[0].adapter, part.rank
    like = next(first.parameters()).detach()
    a, b = (bank.corner(*bank.shape, like) for bank in (getattr(first, name) for name in kind.banks))
    if kind.dims == 3:
        if part.order == "matched":  # PEFT pairs by component, then by term; we the other way round
            b = b.unflatten(0, (-1, rank)).transpose(0, 1).flatten(0, 1)
        small = min(max(binding.target.shape[side] for binding in bindings) for side in (0, 1))
        a = F.pad(a, (0, small - a.shape[1]))
        b = F.pad(b, (0, 0, 0, rank * math.ceil(small / rank) - len(b)))
    return {f"base_model.{name}": t for name, t in zip(kind.banks.values(), from_rows(a, b, kind.dims), strict=True)}
