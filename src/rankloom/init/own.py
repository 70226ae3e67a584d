"""The start that belongs to a form: what its paper fixes together with the parameterisation."""

from __future__ import annotations

from dataclasses import dataclass

from rankloom.init.base import InitContext, InitPart
from rankloom.parts import part

__all__ = ["OwnStart"]


@part("init", "own")
@dataclass(frozen=True)
class OwnStart(InitPart):
    """The form's own start, which leaves the pretrained function as it is (or says so): each form's docstring gives it."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"own start"})

    def apply(self, context: InitContext) -> None:
        for binding in context.bindings:
            binding.adapter.reset(binding.layer, context.generator(binding))
