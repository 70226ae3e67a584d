"""Which weights of a model are adapted and which are trained whole, by name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from rankloom.errors import TargetError, near_names
from rankloom.layers import Conv1DLayer, ExpertLayer, Layer, LinearLayer, layer_of, stacks_of
from rankloom.parts import Part, part
from rankloom.quantized import is_quantized

__all__ = [
    "Target",
    "Targets",
    "exact_pattern",
    "find_targets",
    "matches",
    "select_names",
    "tied_weights",
    "whole_parameters",
]


@dataclass(eq=False)
class Target:
    """One adapted weight: its name (module path, with ``[a:b]`` for a slice), its layer, and the names it is tied to."""

    name: str
    layer: Layer
    module_name: str
    tied_to: tuple[str, ...] = field(default=())

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.layer.out_features, self.layer.in_features


@part("targets", "targets")
@dataclass(frozen=True)
class Targets(Part):
    """Which weights are adapted and which are trained whole.

    ``modules``: ``"all-linear"`` (every linear except the output head and modules trained whole), or patterns; a form that sits
    on decoder layers takes them all by default, and patterns of their names or of their attention modules. A pattern
    is a full path, a trailing part of one (``q_proj``), a glob (``*.layers.0.*``) or ``re:`` and a regular expression that
    matches the full path. A trailing ``[q]``, ``[0:576]`` or ``[0/3]`` adapts those output rows of a fused projection.
    Experts that a mixture stores as one 3-D parameter are found by that parameter's name (``re:.*experts.gate_up_proj``,
    ``down_proj[3]`` for one expert), each expert a weight of its own; ``"all-linear"`` leaves them out, because adapting them
    forms ``W + delta`` of all experts in every step. ``exclude``: patterns taken out again. ``train``: patterns of modules or
    parameters trained whole and saved with the adapter (heads, norms; ``*`` for everything not adapted). Every pattern has to
    match something.
    ``ties``: what to do when an adapted weight is shared with a module that is not adapted: ``error``, or ``untie``
    (adapt this use only; merging separates the two weights).
    """

    modules: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    ties: Literal["error", "untie"] = "error"


_SLICE = re.compile(r"^(?P<path>.*)\[(?P<rows>[^\]]+)\]$")
_NAMED = {"q": (0, 3), "k": (1, 3), "v": (2, 3), "gate": (0, 2), "up": (1, 2)}


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (full path, trailing part, glob, or ``re:`` regular expression) selects a name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if any(c in pattern for c in "*?"):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def exact_pattern(name: str, names: Collection[str]) -> str:
    """A pattern that selects one name: the name itself, or a regular expression where it would match others too."""
    return name if sum(matches(name, other) for other in names) == 1 else f"re:{re.escape(name)}"


def select_names(pattern: str, names: list[str], what: str) -> list[str]:
    """The names that a pattern selects. Raises :class:`TargetError`, with near names, where it selects none."""
    found = [name for name in names if matches(pattern, name)]
    if not found:
        leaves = {name.rsplit(".", 1)[-1] for name in names}
        hint = near_names(pattern.rsplit(".", 1)[-1], leaves) or near_names(pattern, names)
        raise TargetError(f"{what} pattern {pattern!r} matches nothing in this model{hint}")
    return found


def _rows(spec: str, name: str, fan_out: int, config: Any) -> tuple[int, int]:
    """Resolve ``a:b``, ``i/n`` or a part's usual name (``q``, ``k``, ``v``, ``gate``, ``up``) to output rows."""
    if match := re.fullmatch(r"(\d+):(\d+)", spec):
        start, stop = int(match[1]), int(match[2])
    elif spec in "qkv" and (grouped := _grouped_heads(fan_out, config)):
        start, stop = grouped[spec]
    elif spec in _NAMED or re.fullmatch(r"\d+/\d+", spec):
        index, count = _NAMED[spec] if spec in _NAMED else tuple(int(s) for s in spec.split("/"))
        if count == 0 or fan_out % count:
            raise TargetError(
                f"{name} has {fan_out} outputs, not {count} equal parts: give rows, as in [0:{fan_out // 2}]"
            )
        start, stop = index * (fan_out // count), (index + 1) * (fan_out // count)
    else:
        raise TargetError(f"cannot read slice [{spec}] of {name}: use [a:b], [i/n], or one of {', '.join(_NAMED)}")
    if not 0 <= start < stop <= fan_out:
        raise TargetError(f"slice [{spec}] of {name} is outside its {fan_out} outputs")
    return start, stop


def _grouped_heads(fan_out: int, config: Any) -> dict[str, tuple[int, int]] | None:
    """Row ranges of a fused q, k, v projection whose keys and values have fewer heads than its queries."""
    heads, kv = (getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    if not heads or not kv or heads == kv or fan_out % (heads + 2 * kv):
        return None
    dim = fan_out // (heads + 2 * kv)
    q, k = heads * dim, (heads + kv) * dim
    return {"q": (0, q), "k": (q, k), "v": (k, fan_out)}


def tied_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names of every parameter that appears under more than one name, by tensor identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: found for key, found in names.items() if len(found) > 1}


def _heads(model: nn.Module) -> set[int]:
    """Modules ``all-linear`` leaves alone: the output head, and projections that are read without being called."""
    getter = getattr(model, "get_output_embeddings", None)
    skipped = {id(getter())} if callable(getter) else set()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            skipped.add(id(module.out_proj))
    return skipped


def find_targets(model: nn.Module, settings: Targets) -> list[Target]:
    """Resolve patterns on a model, in the model's own order.

    Raises:
        TargetError: a pattern that matches nothing (with near names), a module that cannot be adapted, overlapping
            slices, a tied weight without a declared policy, or nothing left to adapt.
    """
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if (layer := layer_of(module)) is not None:
            layers[name] = layer
        layers.update({f"{name}.{key}".lstrip("."): ExpertLayer(module, key, 0) for key in stacks_of(module)})
    chosen = _chosen_slices(model, settings, layers)
    for pattern in settings.exclude:
        for name in select_names(pattern, list(layers), "exclude"):
            chosen.pop(name, None)
    targets = [t for name in layers if name in chosen for t in _targets_of(name, layers[name], chosen[name], model)]
    _resolve_ties(model, targets, settings)
    return targets


def _chosen_slices(model: nn.Module, settings: Targets, layers: dict[str, Layer]) -> dict[str, list[str | None]]:
    """Chosen modules with the slices asked of each, None for the whole of it."""
    if settings.modules == "all-linear":
        skipped = _heads(model)
        whole = set() if "*" in settings.train else _trained_modules(model, settings.train)
        return {
            name: [None]
            for name, layer in layers.items()
            if isinstance(layer, LinearLayer | Conv1DLayer) and id(layer.module) not in skipped and name not in whole
        }
    patterns = (settings.modules,) if isinstance(settings.modules, str) else settings.modules
    chosen: dict[str, list[str | None]] = {}
    known = list(dict.fromkeys([*dict(model.named_modules()), *layers]))[1:]
    for pattern in patterns:
        sliced = None if pattern.startswith("re:") else _SLICE.match(pattern)
        found = select_names(sliced["path"] if sliced else pattern, known, "target")
        usable = [name for name in found if name in layers]
        if not usable:
            kind = type(model.get_submodule(found[0])).__name__
            raise TargetError(f"target pattern {pattern!r} matches {found[0]} ({kind}), which has no weight to adapt")
        for name in usable:
            chosen.setdefault(name, []).append(sliced["rows"] if sliced else None)
    return chosen


def _trained_modules(model: nn.Module, patterns: tuple[str, ...]) -> set[str]:
    names = [name for name, _ in model.named_modules() if name]
    return {name for pattern in patterns for name in names if matches(pattern, name)}


def _targets_of(name: str, whole: Layer, slices: list[str | None], model: nn.Module) -> Iterator[Target]:
    specs = [spec for spec in slices if spec is not None]
    if isinstance(whole, ExpertLayer):
        yield from _experts(name, whole, specs if len(specs) == len(slices) else [])
        return
    if not specs:
        yield Target(name, whole, name)
        return
    if len(specs) < len(slices):
        raise TargetError(f"{name} is chosen whole and by slice [{specs[0]}]: drop one of the two patterns")
    if not isinstance(whole, LinearLayer | Conv1DLayer):
        raise TargetError(f"{name} is a {type(whole.module).__name__}: only fused linear projections can be sliced")
    ranges = sorted({_rows(spec, name, whole.out_features, getattr(model, "config", None)) for spec in specs})
    for (_, stop), (start, _) in pairwise(ranges):
        if start < stop:
            raise TargetError(f"slices of {name} overlap: {ranges}")
    for start, stop in ranges:
        yield Target(f"{name}[{start}:{stop}]", type(whole)(whole.module, (start, stop)), name)


def _experts(name: str, one: ExpertLayer, specs: list[str]) -> Iterator[Target]:
    """The experts of a stack asked for by number, or all of them."""
    count = len(one.parameter)
    if is_quantized(one.parameter):
        raise TargetError(
            f"{name} is stored quantised, and stacks of experts are adapted in floating dtypes only: exclude it"
        )
    for spec in specs:
        if not spec.isdecimal() or int(spec) >= count:
            raise TargetError(f"cannot read [{spec}] of {name}: give the number of an expert, 0 to {count - 1}")
    for index in sorted({int(spec) for spec in specs}) or range(count):
        yield Target(f"{name}[{index}]", ExpertLayer(one.module, one.key, index), name)


def _resolve_ties(model: nn.Module, targets: list[Target], settings: Targets) -> None:
    ties = tied_weights(model)
    for target in targets:
        own = (target.module_name, f"{target.module_name}.weight")
        target.tied_to = tuple(name for name in ties.get(id(target.layer.parameter), []) if name not in own)
        if target.tied_to and settings.ties == "error":
            others = ", ".join(name.removesuffix(".weight") for name in target.tied_to)
            raise TargetError(
                f"{target.name} shares its weight with {others}: leave it out of `targets`, or set targets.ties='untie' "
                f"to adapt this use only (merging then separates the two weights)"
            )


def whole_parameters(model: nn.Module, settings: Targets, targets: list[Target]) -> dict[str, nn.Parameter]:
    """Parameters that ``settings.train`` asks to train whole, by their first name, without the adapted weights.

    Raises:
        TargetError: a pattern that matches no parameter and no module with parameters, or a quantised weight.
    """
    adapted = {id(target.layer.parameter) for target in targets if isinstance(target.layer, Layer)}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    everything = dict(model.named_parameters(remove_duplicate=False))  # a tied head is found by its own name too
    found: dict[str, nn.Parameter] = {}
    for pattern in settings.train:
        modules = _trained_modules(model, (pattern,))
        inside = [n for n in everything if matches(pattern, n) or any(n.startswith(f"{m}.") for m in modules)]
        if not inside:
            select_names(pattern, list(everything), "train")
        whole = [everything[name] for name in inside if id(everything[name]) not in adapted]
        found.update({first[id(parameter)]: parameter for parameter in whole})
    for name, parameter in found.items():
        if is_quantized(parameter):
            raise TargetError(
                f"{name} is stored as {type(parameter.data).__name__} and cannot be trained whole: keep it in a floating "
                f"dtype (base.exclude), or adapt it instead of training it"
            )
    return found
