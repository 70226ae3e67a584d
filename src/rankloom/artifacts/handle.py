"""What merging and exporting need of an adaptation; a protocol, because the handle itself sits above this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from torch import nn

from rankloom.adapters import Binding
from rankloom.artifacts.identity import Fingerprint
from rankloom.recipe import Recipe

__all__ = ["Handle", "as_attached", "by_module"]


class Handle(Protocol):
    """A model with its adapters: :class:`rankloom.Adaptation` is one."""

    model: nn.Module
    recipe: Recipe
    bindings: list[Binding]
    attached: bool

    def attach(self) -> None:
        """Route the model through the adapters."""

    def detach(self) -> nn.Module:
        """Give the model back as it was."""

    def trained_whole(self) -> Mapping[str, tuple[nn.Parameter, nn.Parameter]]:
        """Parameters trained whole, by name: the base's own, and the trained one."""

    def fingerprint(self) -> Fingerprint:
        """The base model's fingerprint."""


def by_module(bindings: list[Binding]) -> dict[str, list[Binding]]:
    """Bindings grouped by the module they sit on: several only where row slices of one projection are adapted."""
    groups: dict[str, list[Binding]] = {}
    for binding in bindings:
        groups.setdefault(binding.target.module_name, []).append(binding)
    return groups


@contextmanager
def as_attached(handle: Handle) -> Iterator[None]:
    """The adapters attached inside the block, and as before after it."""
    before = handle.attached
    handle.attach()
    try:
        yield
    finally:
        if not before:
            handle.detach()
