"""Writing the merged model as an ordinary transformers folder; the adaptation stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankloom.artifacts.files import plain, replacing, write_json
from rankloom.artifacts.handle import Handle, as_attached
from rankloom.artifacts.merge import MergeState, merge, unmerge
from rankloom.artifacts.peft_format import REPORT
from rankloom.artifacts.store import versions
from rankloom.errors import ArtifactError
from rankloom.quantized import dense

__all__ = ["export_merged"]

# What a model's folder is made of, tokenizers and processors included: what replacing it may take away.
_OWNED = (
    *(
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        REPORT,
        "README.md",
    ),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("chat_template*", "preprocessor_config.json", "processor_config.json"),
)


@torch.no_grad()
def export_merged(
    handle: Handle, path: Path, *, probe: Any = None, max_shard_size: str | int = "5GB"
) -> dict[str, Any]:
    """Write the merged model with ``save_pretrained`` (safetensors) and ``rankloom_export.json``, all or nothing.

    A quantised base is written dense, in its compute dtype: no quantised format could hold the sum exactly.

    Args:
        handle: the adaptation; attached or detached as before when this returns.
        path: the folder to write.
        probe: inputs to measure the drift of merging on; random ones by default.
        max_shard_size: split the weights into files of at most this size.

    Raises:
        ArtifactError: a model that is not transformers', a form that cannot be merged, a folder that holds other files.
    """
    model: Any = handle.model
    if not callable(getattr(model, "save_pretrained", None)):
        raise ArtifactError(
            f"{type(model).__name__} has no save_pretrained: use handle.merge() and save model.state_dict() as safetensors"
        )
    with as_attached(handle), replacing(path, _OWNED) as staging:
        report, state = merge(handle, probe)
        try:
            with _dense(model):
                model.save_pretrained(staging, max_shard_size=max_shard_size)
        finally:
            unmerge(handle, state)
        told = {"format": "merged", **asdict(report), "summary": str(report)}
        base = asdict(handle.fingerprint())
        write_json(staging / REPORT, {**told, "recipe": handle.recipe.to_dict(), "base": base, "versions": versions()})
    return dict(plain(told))


@contextmanager
def _dense(model: nn.Module) -> Iterator[None]:
    """The model without quantised storage: weights that were not adapted dequantised, and the configuration silent on it."""
    state = MergeState([], [])
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and type(parameter.data) is not torch.Tensor:
                state.parameters.append((module, key, nn.Parameter(dense(parameter), requires_grad=False)))
    config: Any = getattr(model, "config", None)
    told = config.__dict__.pop("quantization_config", None)
    quantizer = model.__dict__.pop("hf_quantizer", None)
    try:
        with state.base():
            yield
    finally:
        if told is not None:
            config.quantization_config = told
        if quantizer is not None:
            model.__dict__["hf_quantizer"] = quantizer
