"""Which weights a recipe adapts, and one view of them: every weight is a matrix ``W`` (out, in), whatever stores it.

Orientation, layout and slicing are solved here once. Everything above works on :class:`Layer`.
"""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.errors import TargetError, near_names
from rankloom.parts import Part, part
from rankloom.quantized import dense, frozen_linear, is_quantized

__all__ = [
    "ExpertLayer",
    "Layer",
    "Target",
    "Targets",
    "exact_pattern",
    "find_targets",
    "layer_of",
    "matches",
    "select_names",
    "tied_weights",
    "whole_parameters",
]


class Layer:
    """A frozen layer seen as ``y = x W^T + b`` with ``W`` (out, in).

    Subclasses say how a module stores its weight and how a low-rank product runs on its input: ``down(x, A)`` takes ``x``
    to rank space, ``up(h, B)`` from there to the output, so ``up(down(x, A), B)`` is what the dense update ``B A`` does.
    """

    def __init__(self, module: nn.Module, rows: tuple[int, int] | None = None) -> None:
        self.module, self.rows = module, rows
        self._forward: Callable[..., Tensor] = type(module).forward  # the class's own, before anything is attached
        self.out_features, self.in_features = self._shape()
        if rows is not None:
            self.out_features = rows[1] - rows[0]
        self._output: Tensor | None = None
        self._matrix: Tensor | None = None

    def _shape(self) -> tuple[int, int]:
        return cast(tuple[int, int], tuple(self.stored.shape))

    @property
    def stored(self) -> Tensor:
        """The module's own weight tensor, in its own layout and storage."""
        return cast(Tensor, self.module.weight)

    @property
    def parameter(self) -> Tensor:
        """The module's parameter that the weight is, or is a part of."""
        return self.stored

    @property
    def plain(self) -> bool:
        """Whether the weight is an ordinary floating tensor that kernels may multiply with directly."""
        return self.replaced or not is_quantized(self.stored)

    @property
    def replaced(self) -> bool:
        """Whether this is the layer with another weight (:meth:`with_weight`) than the one its module stores."""
        return self._matrix is not None

    @property
    def ordinary(self) -> bool:
        """Whether the module computes exactly ``x W^T + b``, so that a fused kernel may stand in for its forward."""
        return self._output is None and self.plain and self._forward in _ORDINARY and not _is_hooked(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the layer computes in."""
        return self.stored.dtype if self.stored.is_floating_point() else torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Where the weight lives."""
        return self.stored.device

    def to_matrix(self, stored: Tensor) -> Tensor:
        """A tensor in the module's layout as a matrix (out, in)."""
        return stored

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the module's layout."""
        return matrix

    def weight(self) -> Tensor:
        """The frozen ``W`` (out, in), dense and detached, in the dtype the layer computes in.

        A view where the storage is plain. A quantised weight is dequantised for the caller: use it and let it go.

        Raises:
            TargetError: a storage that can be neither dequantised nor multiplied with.
        """
        if self._matrix is not None:
            return self._matrix
        matrix = self.to_matrix(dense(self.stored))
        return matrix if self.rows is None else matrix[slice(*self.rows)]

    def bias(self) -> Tensor | None:
        """The frozen bias (out,) or None."""
        bias = getattr(self.module, "bias", None)
        return bias if bias is None or self.rows is None else bias[slice(*self.rows)]

    def __call__(self, x: Tensor) -> Tensor:
        """The frozen layer's own output."""
        if self._output is not None:
            return self._output
        if self._matrix is not None:
            return self.apply(x, self._matrix)
        if self.rows is None:
            return self._run(x)
        if self.plain:
            return self.apply(x, self.weight())
        return self._run(x)[..., slice(*self.rows)]

    def _run(self, x: Tensor) -> Tensor:
        if not self.plain and self._forward in _ORDINARY:
            return frozen_linear(x, self.stored, cast(Tensor | None, self.module.bias))
        return self._forward(self.module, x)

    def with_output(self, y: Tensor) -> Layer:
        """The same layer with its output for the current input known already: slices of one projection share one product."""
        twin = copy.copy(self)
        twin._output = y
        return twin

    def with_weight(self, matrix: Tensor) -> Layer:
        """The same layer with a frozen ``matrix`` (out, in) in place of its weight, whatever the module stores."""
        twin = copy.copy(self)
        twin._matrix, twin._output = matrix, None
        return twin

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The layer's output with ``matrix`` (out, in) in place of its weight; differentiable in ``x`` and ``matrix``."""
        return F.linear(x, matrix, self.bias())

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """``x`` to rank space through ``A`` (r, in)."""
        return F.linear(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """From rank space to the output through ``B`` (out, r)."""
        return F.linear(h, b)

    def lowrank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The product of the dense update ``B A`` with the input, through rank space."""
        return self.up(self.down(x, a), b)

    def broadcast(self, vector: Tensor) -> Tensor:
        """A vector (out,) shaped to multiply the output."""
        return vector

    def tokens(self, y: Tensor) -> Tensor:
        """An output-like tensor as a matrix (tokens, features)."""
        return y.reshape(-1, y.shape[-1])


_ORDINARY = {nn.Linear.forward}


def _is_hooked(module: nn.Module) -> bool:
    """A forward replaced on the instance (offloading libraries do) has to run, not be bypassed."""
    return "forward" in module.__dict__


class LinearLayer(Layer):
    """``nn.Linear`` and everything that stores (out, in)."""


class Conv1DLayer(Layer):
    """The transposed linear of GPT-2, which stores (in, out)."""

    def _shape(self) -> tuple[int, int]:
        fan_in, fan_out = self.stored.shape
        return fan_out, fan_in

    def to_matrix(self, stored: Tensor) -> Tensor:
        return stored.mT

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        bias = cast(Tensor, self.bias())  # as the module does it, so that an unchanged matrix changes no bit
        out = torch.addmm(bias, x.reshape(-1, x.shape[-1]), matrix.mT)
        return out.view(*x.shape[:-1], self.out_features)


class EmbeddingLayer(Layer):
    """A look-up table (rows, dim), which is a linear map of one-hot rows: ``out = dim``, ``in = rows``."""

    def _shape(self) -> tuple[int, int]:
        rows, dim = self.stored.shape
        return dim, rows

    def to_matrix(self, stored: Tensor) -> Tensor:
        return stored.mT

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        module = cast(nn.Embedding, self.module)
        return F.embedding(x, matrix.mT, padding_idx=module.padding_idx) * getattr(module, "embed_scale", 1.0)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        # A scaled embedding (Gemma, BART) multiplies the look-up: its update must be multiplied too, or merging differs.
        return F.embedding(x, a.mT) * getattr(self.module, "embed_scale", 1.0)


class Conv2dLayer(Layer):
    """A 2-D convolution as a matrix (out channels, in channels / groups * kh * kw)."""

    def _shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.stored[0].numel()

    def to_matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, self.stored.shape[1:])

    def _convolve(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        kernel = matrix.unflatten(1, self.stored.shape[1:])
        return cast(Tensor, cast(nn.Conv2d, self.module)._conv_forward(x, kernel, bias))

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self._convolve(x, matrix, self.bias())

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self._convolve(x, a, None)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(h, b[:, :, None, None])

    def lowrank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if self.grouped:  # each group reads its own channels: no rank space is common to them
            return self._convolve(x, b @ a, None)
        return self.up(self.down(x, a), b)

    @property
    def grouped(self) -> bool:
        """Whether output channels see only part of the input channels."""
        return cast(nn.Conv2d, self.module).groups > 1

    def broadcast(self, vector: Tensor) -> Tensor:
        return vector[:, None, None]

    def tokens(self, y: Tensor) -> Tensor:
        return y.movedim(1, -1).reshape(-1, y.shape[1])


class ExpertLayer(Layer):
    """One expert of a mixture: a matrix of the 3-D parameter ``key`` that its module holds for all of them, as transformers'
    experts do: (experts, out, in), or (experts, in, out) where the module says ``is_transposed``."""

    def __init__(self, module: nn.Module, key: str, index: int) -> None:
        self.key, self.index, self.transposed = key, index, bool(module.is_transposed)
        super().__init__(module)

    @property
    def parameter(self) -> nn.Parameter:
        # Past the attribute, which is the adapted stack while the module runs.
        return cast(nn.Parameter, self.module._parameters[self.key])

    @property
    def stored(self) -> Tensor:
        return self.parameter[self.index]

    def _shape(self) -> tuple[int, int]:
        return cast(tuple[int, int], tuple(self.to_matrix(self.stored).shape))

    def to_matrix(self, stored: Tensor) -> Tensor:
        return stored.mT if self.transposed else stored

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix

    def bias(self) -> None:
        """None: it is the module that adds biases, after all experts' products."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.apply(x, self.weight())


def stacks_of(module: nn.Module) -> list[str]:
    """The 3-D weights of a module that follows transformers' interface of experts."""
    count = getattr(module, "num_experts", None)
    if not hasattr(module, "is_transposed") or count is None:
        return []
    return [key for key, p in module._parameters.items() if p is not None and p.ndim == 3 and len(p) == count]


def layer_of(module: nn.Module, rows: tuple[int, int] | None = None) -> Layer | None:
    """The view of a module, or None where it stores no weight we know how to adapt."""
    if isinstance(module, nn.Linear):
        return LinearLayer(module, rows)
    if isinstance(module, nn.Embedding):
        return EmbeddingLayer(module, rows)
    if isinstance(module, nn.Conv2d):
        return Conv2dLayer(module, rows)
    if type(module).__name__.endswith("Conv1D") and hasattr(module, "nf"):  # transformers', without importing it
        return Conv1DLayer(module, rows)
    return None


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
