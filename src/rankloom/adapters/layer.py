"""The contract of adapters that sit on a decoder layer instead of on a weight."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from rankloom.adapters.base import AdapterPart, Form
from rankloom.attended import Attention
from rankloom.blocks import find_blocks
from rankloom.targets import Target, Targets

__all__ = ["LayerAdapter", "LayerAdapterPart"]


class LayerAdapter(Form):
    """One adapted decoder layer: ``h + f(h, attention)`` goes on to the MLP in place of ``h``, the state after attention.

    ``f`` is no update of any weight: it cannot be merged or exported, only saved and attached.
    """

    linear_in_x: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    @abstractmethod
    def forward(self, h: Tensor, attention: Attention) -> Tensor:
        """What is added to ``h`` (B, n, d): a tensor like it. ``attention``: the call of attention that ``h`` has in it."""


class LayerAdapterPart(AdapterPart):
    """Settings that build one adapter per decoder layer; ``targets.layer`` is a :class:`rankloom.blocks.Block`.

    ``targets.modules`` names layers or their attention modules; the default means every layer.
    """

    def targets_on(self, model: nn.Module, settings: Targets) -> list[Target]:
        return find_blocks(model, settings)
