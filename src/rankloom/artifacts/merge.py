"""Folding the updates into the weights, measured; and taking them out again, exactly."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankloom.adapters import Binding
from rankloom.artifacts.handle import Handle, by_module
from rankloom.artifacts.probe import make_probe, outputs
from rankloom.errors import ArtifactError
from rankloom.layers import ExpertLayer

__all__ = [
    "Drift",
    "MergeReport",
    "MergeState",
    "fold",
    "measured",
    "merge",
    "merged_biases",
    "merged_weights",
    "unmerge",
    "wide_delta",
]


@dataclass(frozen=True)
class Drift:
    """How far a model's outputs moved: largest and mean absolute difference, and the largest over the largest output.

    ``effect`` is the mean absolute difference the adapter itself makes: a drift near it means the update was rounded away.
    """

    max: float
    mean: float
    relative: float
    effect: float

    @classmethod
    def between(cls, before: Tensor, after: Tensor, base: Tensor) -> Drift:
        """Drift from ``before`` to ``after``, beside the distance of ``before`` from the base model's outputs."""
        gap = (after - before).abs()
        scale = max(float(before.abs().max()), torch.finfo(torch.float64).tiny)
        return cls(float(gap.max()), float(gap.mean()), float(gap.max()) / scale, float((before - base).abs().mean()))

    def __str__(self) -> str:
        return (
            f"logit drift max {self.max:.1e}, mean {self.mean:.1e} (relative {self.relative:.1e}; the adapter itself moves "
            f"logits by {self.effect:.1e} on average)"
        )


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. ``str(report)`` is one line."""

    weights: int
    biases: int
    whole: int
    dequantized: int
    dtype: str
    drift: Drift | None
    probe: str
    untied: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        biases = f", {self.biases} biases" if self.biases else ""
        whole = f" and {self.whole} parameters trained whole" if self.whole else ""
        stored = (
            f" ({self.dequantized} of them dequantised: their storage cannot hold the sum)" if self.dequantized else ""
        )
        untied = f", untied {', '.join(self.untied)}" if self.untied else ""
        measured = str(self.drift) if self.drift else "drift not measured: pass probe=a batch"
        return f"merged {self.weights} weights{stored}{biases}{whole} into {self.dtype}{untied}: {measured}"


@dataclass
class MergeState:
    """What is not in place at the moment: the base's objects while merged, the merged ones otherwise."""

    parameters: list[tuple[nn.Module, str, nn.Parameter | None]]
    settings: list[tuple[Any, str, Any]]

    def swap(self) -> None:
        """Exchange what is in place with what is held. Objects move, values are never touched."""
        for index, (module, key, other) in enumerate(self.parameters):
            self.parameters[index] = (module, key, module._parameters[key])
            module._parameters[key] = other
        for index, (owner, key, value) in enumerate(self.settings):
            self.settings[index] = (owner, key, getattr(owner, key))
            setattr(owner, key, value)

    @contextmanager
    def base(self) -> Iterator[None]:
        """The base's own weights inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


@torch.no_grad()
def merge(handle: Handle, probe: Any = None) -> tuple[MergeReport, MergeState]:
    """Fold every update into its weight and detach the adapters.

    ``W' = W + delta`` is computed in float64 (float32 where the device has no float64, or where the form keeps statistics of
    ``W`` in float32) on the dequantised weight, and rounded once, to the weight's own dtype; where the form moves the bias, so
    is ``b' = b + bias_delta``. A module whose tied weight was
    adapted alone gets a weight of its own, and the configuration says so.

    Args:
        handle: the adaptation.
        probe: inputs to measure the drift on; random ones by default.

    Returns:
        The report, and the state that :func:`unmerge` needs.

    Raises:
        ArtifactError: a form that is not a matrix update, or a merged weight that is not finite in its dtype.
    """
    begin = time.perf_counter()
    handle.attach()
    inputs, adapted = measured(handle.model, probe)
    weights, biases = merged_weights(handle, wide_delta), merged_biases(handle)
    dequantized = len({b.target.module_name for b in handle.bindings if not b.layer.plain})
    handle.detach()
    state = fold(handle, weights, biases)
    base = None if adapted is None else outputs(handle.model, inputs)
    state.swap()
    drift = None
    if adapted is not None and base is not None:
        drift = Drift.between(adapted, outputs(handle.model, inputs), base)
    report = MergeReport(
        weights=len(weights),
        biases=len(biases),
        whole=len(handle.trained_whole()),
        dequantized=dequantized,
        dtype=", ".join(sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()})) or "nothing",
        drift=drift,
        probe="given" if probe is not None else "random" if drift else "none",
        untied=tuple(b.name for b in handle.bindings if b.target.tied_to),
        seconds=time.perf_counter() - begin,
    )
    return report, state


def fold(handle: Handle, weights: dict[str, Tensor], biases: dict[str, Tensor]) -> MergeState:
    """What to swap into the model, which is detached: merged tensors, parameters trained whole, untied settings."""
    places = {b.target.module_name: (b.layer.module, getattr(b.layer, "key", "weight")) for b in handle.bindings}
    merged = {places[name]: weight for name, weight in weights.items()}
    merged |= {(places[name][0], "bias"): bias for name, bias in biases.items()}
    state = MergeState([], _untied_settings(handle))
    for (module, key), tensor in merged.items():
        flag = module.get_parameter(key).requires_grad
        state.parameters.append((module, key, nn.Parameter(tensor, requires_grad=flag)))
    # A bias that is trained whole besides being moved is in the merged one.
    state.parameters.extend(entry for entry in _whole(handle) if entry[:2] not in merged)
    return state


def unmerge(handle: Handle, state: MergeState) -> None:
    """Put the very parameters back that :func:`merge` had set aside, and attach the adapters."""
    state.swap()
    handle.attach()


def measured(model: nn.Module, probe: Any) -> tuple[Any, Tensor | None]:
    """A probe (given, or made) and the model's outputs on it; nothing where none can be made."""
    if probe is not None:
        return probe, outputs(model, probe)
    made = make_probe(model)
    if made is None:
        return None, None
    try:
        return made, outputs(model, made)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError):
        return (
            None,
            None,
        )  # the model wants inputs that its configuration does not describe: only its user can make them


def merged_weights(handle: Handle, delta: Callable[[Binding], Tensor]) -> dict[str, Tensor]:
    """The merged weight of every adapted module, in the module's own layout and compute dtype."""
    for binding in handle.bindings:
        if not (binding.adapter.mergeable and binding.adapter.linear_in_x):
            raise ArtifactError(
                f"{binding.name} carries {handle.recipe.adapter.kind!r}, whose update depends on the input and is no matrix: "
                f"it cannot be merged; save it with handle.save() and serve it attached"
            )
    return {name: _merged_weight(group, delta) for name, group in by_module(handle.bindings).items()}


def merged_biases(handle: Handle) -> dict[str, Tensor]:
    """The merged bias of every module whose form moves it, in its own dtype. The adapters have to be attached: a bias that is
    trained whole is in its place then."""
    groups = by_module(handle.bindings)
    moving = {name: [b for b in group if b.adapter.bias_delta(b.layer) is not None] for name, group in groups.items()}
    return {name: _merged_bias(group) for name, group in moving.items() if group}


def _merged_bias(group: list[Binding]) -> Tensor:
    held = group[0].layer.module.get_parameter("bias").detach()
    merged = held.to(torch.promote_types(held.dtype, torch.float32), copy=True)
    for binding in group:
        adapter, dtype = _widened(binding)
        rows = slice(*binding.layer.rows) if binding.layer.rows else slice(None)
        merged = merged.to(dtype)
        merged[rows] += adapter.bias_delta(binding.layer).to(dtype)
    return _finite(merged.to(held.dtype), group)


def _merged_weight(group: list[Binding], delta: Callable[[Binding], Tensor]) -> Tensor:
    layer = group[0].layer
    if isinstance(layer, ExpertLayer):
        return _finite(_merged_experts(group, delta), group)
    whole = type(layer)(layer.module)
    matrix: Tensor | None = None
    for binding in group:
        update = delta(binding)
        if matrix is None:
            matrix = whole.weight().to(update.dtype, copy=True)
        rows = slice(*binding.layer.rows) if binding.layer.rows else slice(None)
        matrix[rows] += update
    assert matrix is not None
    return _finite(whole.from_matrix(matrix).to(layer.dtype).contiguous(), group)


def _merged_experts(group: list[Binding], delta: Callable[[Binding], Tensor]) -> Tensor:
    merged = group[0].layer.parameter.detach().clone()
    for binding in group:
        update = delta(binding)
        matrix = binding.layer.weight().to(update.dtype) + update
        merged[cast(ExpertLayer, binding.layer).index] = binding.layer.from_matrix(matrix).to(merged.dtype)
    return merged


def _finite(merged: Tensor, group: list[Binding]) -> Tensor:
    if not torch.isfinite(merged).all():
        raise ArtifactError(
            f"the merged weight of {group[0].target.module_name} is not finite in {merged.dtype}: load the base in bfloat16 "
            f"or float32, or check the adapter for NaN"
        )
    return merged


def wide_delta(binding: Binding) -> Tensor:
    """The dense update (out, in), computed in float64 where that agrees with what the adapter computes in training."""
    adapter, dtype = _widened(binding)
    return adapter.delta(binding.layer).detach().to(dtype)


def _widened(binding: Binding) -> tuple[Any, torch.dtype]:
    """The adapter, or a copy of it, in the precision that its update is formed in, and that of the update."""
    adapter = binding.adapter
    own = next((p.dtype for p in adapter.parameters()), torch.float32)
    dtype = torch.promote_types(own, torch.float32)
    # A form that keeps row norms of W beside it would disagree with them in another precision.
    if adapter.needs_base != "every_step" and binding.layer.device.type != "mps":
        dtype = torch.float64
    if dtype != own:
        adapter = copy.deepcopy(adapter).to(dtype)
    return adapter, torch.promote_types(dtype, binding.layer.dtype)


def _whole(handle: Handle) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Where each parameter trained whole goes; a copy, so that training the merged model leaves the handle's alone."""
    for original, trained in handle.trained_whole().values():
        merged = nn.Parameter(trained.detach().clone(), requires_grad=original.requires_grad)
        for module in handle.model.modules():
            for key, parameter in module._parameters.items():
                if parameter is original:
                    yield module, key, merged


def _untied_settings(handle: Handle) -> list[tuple[Any, str, Any]]:
    """Configuration that has to say the weights are no longer tied, or loading the merged model would tie them again."""
    if not any(binding.target.tied_to for binding in handle.bindings):
        return []
    config = getattr(handle.model, "config", None)
    getter = getattr(config, "get_text_config", None)
    owners = {id(c): c for c in (config, getter() if callable(getter) else None) if c is not None}
    return [(c, "tie_word_embeddings", False) for c in owners.values() if getattr(c, "tie_word_embeddings", False)]
