"""Rewiring modules, and putting them back: the mechanics under :mod:`rankloom.adapt`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankloom.adapters import Binding
from rankloom.attended import AttentionSite, BlockSite, follow, unfollow
from rankloom.blocks import Block
from rankloom.errors import TargetError
from rankloom.experts import Experts
from rankloom.layers import ExpertLayer

__all__ = ["Attached", "attach_modules", "detach_modules", "refuse_attached", "swap_parameters"]


class Attached:
    """Mark of a module whose forward goes through adapters; ``rankloom`` holds them as ordinary submodules."""

    _rankloom_forward: Callable[..., Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted output."""
        return self.__dict__["_rankloom_forward"](*args, **kwargs)


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


class _Sibling(_Whole):
    """One of several modules that usually read the same input one after the other (q, k, v; gate, up).

    The first one called computes for all and leaves the others' outputs with them. A sibling takes what was left only if
    its own input is that very tensor, unchanged; whatever else a model does with its modules, each output is its own.
    The grouping depends on names alone, never on earlier calls, so runs stay reproducible to the bit.
    """

    def __init__(self, binding: Binding) -> None:
        super().__init__(binding)
        self.others: list[_Sibling] = []
        self.left: tuple[Tensor, int, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        left, self.left = self.left, None
        if left is not None and left[0] is x and left[1] == x._version:
            return left[2]
        if not self.others or torch.compiler.is_compiling() or x.is_inference():
            return super().__call__(x)
        operands = [member.adapter.operands(x, member.layer) for member in (self, *self.others)]
        if any(own is None for own in operands):
            return super().__call__(x)
        outs = self.adapter.together(x, operands)
        for other, out in zip(self.others, outs[1:], strict=True):
            other.left = (x, x._version, out)
        return outs[0]


SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
)


def _siblings(model: nn.Module, by_name: dict[str, _Whole]) -> None:
    """Introduce siblings to each other: modules of one parent whose usual names say that they read one input.

    Cross attention is left alone: its queries read another input than its keys and values.
    """
    for name in [name for name in by_name if name.endswith(tuple(f".{names[0]}" for names in SIBLINGS))]:
        parent, leaf = name.rsplit(".", 1)
        if "cross" in parent.lower() or "encoder_attn" in parent:
            continue
        names = next(names for names in SIBLINGS if names[0] == leaf)
        group = [by_name.get(f"{parent}.{other}") for other in names]
        members = [member for member in group if isinstance(member, _Sibling)]
        if len(members) == len(names) and len({member.layer.in_features for member in members}) == 1:
            members[0].others = members[1:]


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
    experts: dict[nn.Module, list[Binding]] = {}
    for binding in bindings:
        place: Any = binding.layer
        if isinstance(place, Block):
            _route_block(place, binding.adapter)
        elif isinstance(binding.layer, ExpertLayer):
            experts.setdefault(binding.layer.module, []).append(binding)
        else:
            groups.setdefault(binding.target.module_name, []).append(binding)
    for module, group in experts.items():
        _route(module, nn.ModuleList([b.adapter for b in group]), Experts(group))
    wholes: dict[str, _Whole] = {}
    for name, group in groups.items():
        module, whole = group[0].layer.module, group[0].layer.rows is None
        if whole:
            wholes[name] = _Sibling(group[0]) if group[0].adapter.shares_input else _Whole(group[0])
            _route(module, group[0].adapter, wholes[name])
        else:
            _route(module, nn.ModuleList([b.adapter for b in group]), _Sliced(module, group))
    _siblings(model, wholes)


def _route(module: nn.Module, adapters: nn.Module, forward: Callable[..., Tensor]) -> None:
    module.add_module("rankloom", adapters.train(module.training))
    module.__dict__["_rankloom_forward"] = forward
    module.__class__ = _attached_class(type(module))


def _route_block(block: Block, adapter: nn.Module) -> None:
    """Two modules of a decoder layer know of its adapter: the layer has the residual, its attention everything else."""
    site = AttentionSite(block, adapter)
    _route(block.module, adapter, BlockSite(block, site))
    _route(block.attention, nn.ModuleList(), site)
    follow(block)


def detach_modules(bindings: list[Binding]) -> None:
    """Undo :func:`attach_modules`."""
    modules = {id(b.layer.module): b.layer.module for b in bindings}
    for binding in bindings:
        place: Any = binding.layer
        if isinstance(place, Block):
            unfollow(place)
            modules[id(place.attention)] = place.attention
    for module in modules.values():
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
