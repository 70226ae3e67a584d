"""A batch to look at a model's outputs with, and how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.errors import ArtifactError

__all__ = ["make_probe", "outputs"]

LENGTH = 32


def make_probe(model: nn.Module, seed: int = 0) -> dict[str, Tensor] | None:
    """Random seeded inputs from the model's configuration: token ids or pixels. None where the model does not say."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(seed)
    if main == "input_ids" and (vocabulary := _text(config, "vocab_size")):
        length = min(LENGTH, _text(config, "max_position_embeddings") or LENGTH, _text(config, "n_positions") or LENGTH)
        # One row: a classifier without a padding token takes no more.
        ids = torch.randint(vocabulary, (1, length), generator=generator)
        return {
            "input_ids": ids,
            **({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}),
        }
    if main == "pixel_values" and (size := getattr(config, "image_size", None)):
        height, width = size if isinstance(size, Sequence) else (size, size)
        pixels = torch.randn(1, getattr(config, "num_channels", 3), height, width, generator=generator)
        return {"pixel_values": pixels.to(next(p for p in model.parameters() if p.is_floating_point()).dtype)}
    return None


def _text(config: Any, key: str) -> int | None:
    getter = getattr(config, "get_text_config", None)
    return getattr(getter() if callable(getter) else config, key, None)


@torch.no_grad()
def outputs(model: nn.Module, probe: Any) -> Tensor:
    """The model's logits (or its first output) on a probe, in evaluation mode, in float64.

    Args:
        model: any module.
        probe: keyword arguments as a mapping, positional ones as a tuple, or one tensor.
    """
    device = next(model.parameters()).device
    with _evaluating(model):
        if isinstance(probe, Mapping):
            made = model(**{k: _moved(v, device) for k, v in probe.items()})
        elif isinstance(probe, tuple):
            made = model(*(_moved(v, device) for v in probe))
        else:
            made = model(_moved(probe, device))
    return _first(made).double()


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:  # each its own: parts of a model may have been put in another mode on purpose
            module.training = mode


def _first(made: Any) -> Tensor:
    logits = getattr(made, "logits", None)
    candidates = [
        logits,
        made,
        *(made.values() if isinstance(made, Mapping) else made if isinstance(made, tuple) else ()),
    ]
    for value in candidates:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ArtifactError(f"cannot measure on a model that returns {type(made).__name__}: no floating-point tensor in it")
