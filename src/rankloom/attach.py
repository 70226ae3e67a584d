"""Rewiring modules, and putting them back: the mechanics under :mod:`rankloom.adapt`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankloom.adapters import Binding
from rankloom.errors import TargetError
from rankloom.targets import Layer

__all__ = ["Attached", "attach_modules", "detach_modules", "put_parameters", "swap_parameters"]


class Attached:
    """Mark of a module whose forward goes through adapters; ``rankloom`` holds them as ordinary submodules."""

    _rankloom_forward: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """The adapted output."""
        return self.__dict__["_rankloom_forward"](x)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _attached_class(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Adapted{cls.__name__}", (Attached, cls), {"__module__": __name__})
    return _CLASSES[cls]


class _Whole:
    """Forward of a module with one adapter over its whole weight."""

    def __init__(self, binding: Binding) -> None:
        self.adapter, self.layer = binding.adapter, binding.layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.adapter.forward(x, self.layer)


class _Sliced:
    """Forward of a fused projection: its own product once, then adapted row ranges and frozen ones side by side.

    One product for all rows costs no more than one a range, and keeps the frozen rows' bits (a product over fewer rows
    may be summed in another order).
    """

    def __init__(self, module: nn.Module, bindings: list[Binding]) -> None:
        self.whole, self.bindings = type(bindings[0].layer)(module), bindings

    def __call__(self, x: Tensor) -> Tensor:
        full, pieces, at = self.whole(x), [], 0
        for binding in self.bindings:
            start, stop = cast(tuple[int, int], binding.layer.rows)
            pieces += [
                full[..., at:start],
                binding.adapter.forward(x, binding.layer.with_output(full[..., start:stop])),
            ]
            at = stop
        return torch.cat([*pieces, full[..., at:]], dim=-1)


def attach_modules(model: nn.Module, bindings: list[Binding]) -> None:
    """Route every target's module through its adapters. Nothing but the modules' classes changes."""
    groups: dict[str, list[Binding]] = {}
    for binding in bindings:
        groups.setdefault(binding.target.module_name, []).append(binding)
    for group in groups.values():
        module, whole = group[0].layer.module, group[0].layer.rows is None
        module.add_module("rankloom", group[0].adapter if whole else nn.ModuleList([b.adapter for b in group]))
        module.__dict__["_rankloom_forward"] = _Whole(group[0]) if whole else _Sliced(module, group)
        module.__class__ = _attached_class(type(module))


def detach_modules(bindings: list[Binding]) -> None:
    """Undo :func:`attach_modules`."""
    for module in {id(b.layer.module): b.layer.module for b in bindings}.values():
        module.__class__ = type(module).__mro__[2]
        del module._modules["rankloom"], module.__dict__["_rankloom_forward"]


def refuse_attached(model: nn.Module) -> None:
    """Raise where a model already carries an adaptation: a second one would silently train on top of the first."""
    for name, module in model.named_modules():
        if isinstance(module, Attached):
            raise TargetError(
                f"{name} already carries an adapter: call detach() or merge() on the earlier adaptation first"
            )


def swap_parameters(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put ``new`` wherever a module holds ``old``, so tied uses stay tied."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[key] = new


def put_parameters(layer: Layer, weight: Tensor) -> Any:
    """Give a layer's module its own weight parameter; returns the one it had."""
    old = layer.module._parameters["weight"]
    layer.module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return old
