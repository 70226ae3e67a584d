"""Which base model this is: a fingerprint of names, shapes and sampled values, cheap enough to take every time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.attach import Attached
from rankloom.errors import FingerprintError
from rankloom.quantized import dense

__all__ = ["Fingerprint", "fingerprint", "require_fingerprint"]

SAMPLES = 64  # values looked at per tensor; a fine-tuned copy of a model differs almost everywhere


@dataclass(frozen=True)
class Fingerprint:
    """What the base model under an adapter is.

    ``digest`` covers every parameter's name, shape and sampled values, except the values of parameters in ``carried``:
    those are trained whole, so the adapter brings its own. That is what lets an adapter with a classification head load
    into a new process, where the head of the base is another random draw, while a base that differs in any weight the
    adapter does *not* bring is refused. ``tensors`` has a short digest per parameter, so a refusal can name the ones
    that differ.
    """

    digest: str
    name: str = ""
    architecture: str = ""
    parameters: int = 0
    carried: tuple[str, ...] = ()
    tensors: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        size = f"{self.parameters / 1e6:.1f}M" if self.parameters >= 1e5 else str(self.parameters)
        label = f"{self.name} " if self.name else ""
        return f"{label}({self.architecture}, {size} parameters, {self.digest[:12]})"

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Fingerprint:
        """Rebuild from the manifest."""
        return cls(**{**plain, "carried": tuple(plain.get("carried", ()))})


@torch.no_grad()
def fingerprint(model: nn.Module, carried: Collection[str] = ()) -> Fingerprint:
    """Fingerprint the base model, with or without adapters attached.

    Values are rounded to bfloat16 before they are hashed, so a model loaded in float32 and in bfloat16 is the same model;
    quantised weights are dequantised (a quantised base is another function, and another fingerprint). Tied weights count
    once, under their first name. Buffers do not count: running statistics move while the base stays.

    Args:
        model: the model, attached or bare (not merged: its weights are then another model's).
        carried: names of parameters whose values the adapter brings itself.
    """
    skip = {id(p) for m in model.modules() if isinstance(m, Attached) for p in m.get_submodule("rankloom").parameters()}
    base = {name: p for name, p in model.named_parameters() if id(p) not in skip}
    tensors = {name: _digest(p, name not in carried) for name, p in base.items()}
    config = getattr(model, "config", None)
    return Fingerprint(
        digest=hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest(),
        name=str(getattr(config, "_name_or_path", "") or ""),
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in base.values()),
        carried=tuple(name for name in base if name in carried),
        tensors=tensors,
    )


def _digest(tensor: Tensor, values: bool) -> str:
    shape = "x".join(map(str, tensor.shape))
    if not values or tensor.is_meta:
        return shape
    return f"{shape}:{hashlib.sha256(_sample(tensor.detach())).hexdigest()[:12]}"


def _sample(tensor: Tensor) -> bytes:
    if type(tensor) not in (Tensor, nn.Parameter):
        tensor = dense(tensor)
    flat, count = tensor.reshape(-1), min(SAMPLES, tensor.numel())
    index = torch.arange(count, device=flat.device) * max(len(flat) - 1, 0) // max(count - 1, 1)
    picked = flat[index].cpu()
    # Integers (some quantised layouts) are hashed as they are; adding zero makes -0.0 and 0.0 one.
    exact = picked.to(torch.bfloat16).add(0.0).view(torch.int16) if picked.is_floating_point() else picked
    return exact.contiguous().view(torch.uint8).numpy().tobytes()


def require_fingerprint(stored: Fingerprint, model: Fingerprint) -> None:
    """Refuse a base model other than the one the adapter was made on.

    Raises:
        FingerprintError: names both models, how many tensors differ, and how to force.
    """
    if stored.digest == model.digest:
        return
    names = [*stored.tensors, *(n for n in model.tensors if n not in stored.tensors)]
    differ = [n for n in names if stored.tensors.get(n) != model.tensors.get(n)]
    hint = ""
    if 0 < len(differ) <= 2:  # a lone layer that differs is usually a head initialised at random
        hint = "; if it is a new head, train it whole (targets.train) or seed its initialisation"
    raise FingerprintError(
        f"the adapter was made on {stored}, this model is {model}: {len(differ)} of {len(names)} tensors differ (as "
        f"{', '.join(differ[:2])}){hint}. Load the model it was made on, or pass force=True"
    )
