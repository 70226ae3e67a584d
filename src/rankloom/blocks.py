"""Decoder layers as places for adapters: which layers a recipe's targets mean, and what has to be known about one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankloom.errors import TargetError
from rankloom.targets import Target, Targets, select_names

__all__ = ["IMPLEMENTATIONS", "Block", "BlockTarget", "find_blocks"]

# Layers with h = h + attention(norm(h)), then h = h + mlp(norm(h)), by class: where the attention and the first norm are.
# By name, as nothing else tells them from layers that scale, norm or overlap their branches.
DECODERS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            "GemmaDecoderLayer",
            "LlamaDecoderLayer",
            "MistralDecoderLayer",
            "MixtralDecoderLayer",
            "Phi3DecoderLayer",
            "Qwen2DecoderLayer",
            "Qwen2MoeDecoderLayer",
            "Qwen3DecoderLayer",
            "Qwen3MoeDecoderLayer",
            "SmolLM3DecoderLayer",
        ),
        ("self_attn", "input_layernorm"),
    ),
    "GPT2Block": ("attn", "ln_1"),
}
IMPLEMENTATIONS = ("eager", "sdpa")  # whose masks are read: other attention functions have masks of their own kinds


class Block:
    """A pre-norm decoder layer: ``module``, its self-attention, and its place in the stack.

    ``features``: width of the hidden state. ``depth``: 0 at the model's first layer, 1 at its last.
    """

    def __init__(self, module: nn.Module, depth: float) -> None:
        attention, norm = DECODERS[type(module).__name__]
        self.module, self.depth = module, depth
        self.attention = module.get_submodule(attention)
        self.norm = module.get_submodule(norm)
        self.run: Callable[..., Any] = type(module).forward  # the classes' own, before anything is attached
        self.attend: Callable[..., Any] = type(self.attention).forward

    @property
    def features(self) -> int:
        """Width of the hidden state."""
        return self.norm.get_parameter("weight").numel()

    @property
    def heads(self) -> int:
        """Query heads of the attention."""
        loose: Any = self.attention
        return int(loose.config.num_attention_heads)

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in, however its matrices are stored."""
        return self.norm.get_parameter("weight").dtype

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""
        return self.norm.get_parameter("weight").device

    @property
    def eager(self) -> Callable[..., Any]:
        """The attention function that the layer's own file calls eager, which is in no registry."""
        found: Callable[..., Any] = inspect.unwrap(self.attend).__globals__["eager_attention_forward"]
        return found

    def check(self, name: str) -> None:
        """Raise :class:`TargetError` where the attention cannot be followed."""
        loose: Any = self.attention
        implementation = loose.config._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            raise TargetError(
                f"{name} attends by {implementation!r}, whose masks layer adapters do not read: call "
                f"model.set_attn_implementation('sdpa') first"
            )
        if hasattr(self.module, "crossattention"):
            raise TargetError(
                f"{name} also attends to an encoder, which layer adapters do not follow: targets.exclude it"
            )
        if getattr(loose, "reorder_and_upcast_attn", False) and implementation == "eager":
            raise TargetError(f"{name} attends in an order of its own: set config.reorder_and_upcast_attn=False")


@dataclass(eq=False)
class BlockTarget(Target):
    """A decoder layer that carries an adapter; no weight of it is adapted."""

    layer: Any  # a Block: parts that ask for a weight refuse the adapter before they are given one

    @property
    def shape(self) -> tuple[int, int]:
        """The hidden state's width, in and out."""
        return self.layer.features, self.layer.features


def find_blocks(model: nn.Module, settings: Targets) -> list[Target]:
    """Resolve patterns to decoder layers, in the model's own order; ``"all-linear"``, the default, means all of them.

    A pattern names layers (``*.layers.1?``) or their attention modules (``self_attn``).

    Raises:
        TargetError: a model without layers that adapters can sit on, a pattern that selects none, or attention that cannot be
            followed.
    """
    modules = {name: m for name, m in model.named_modules() if type(m).__name__ in DECODERS}
    if not modules:
        raise TargetError(
            f"{type(model).__name__} has no pre-norm decoder layer that an adapter could sit on (known: "
            f"{', '.join(DECODERS)}): choose a form that adapts weights"
        )
    last = max(len(modules) - 1, 1)
    blocks = {name: Block(module, index / last) for index, (name, module) in enumerate(modules.items())}
    names = {name: name for name in blocks}
    names.update({f"{name}.{DECODERS[type(block.module).__name__][0]}": name for name, block in blocks.items()})
    patterns = (settings.modules,) if isinstance(settings.modules, str) else settings.modules
    chosen = set(blocks)
    if settings.modules != "all-linear":
        chosen = {names[found] for pattern in patterns for found in select_names(pattern, list(names), "layer")}
    for pattern in settings.exclude:
        chosen -= {names[found] for found in select_names(pattern, list(names), "exclude")}
    targets = [BlockTarget(name, block, name) for name, block in blocks.items() if name in chosen]
    for target in targets:
        target.layer.check(target.name)
    return list(targets)
