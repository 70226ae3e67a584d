"""LoftQ (2310.08659): start with what quantising the weight has lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankloom.adapters import Binding, LowRankAdapter
from rankloom.errors import ArtifactError, CompositionError, near_names
from rankloom.init.base import InitContext, InitPart
from rankloom.linalg import leading_svd
from rankloom.parts import part
from rankloom.targets import ExpertLayer, Layer

__all__ = ["QuantizationResidual"]


class _Reference:
    """Weights by name from a safetensors file, or from all those in a folder."""

    def __init__(self, path: Path) -> None:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        self.files: dict[str, Path] = {}
        try:
            for file in files:
                with safe_open(file, "pt") as tensors:
                    self.files.update(dict.fromkeys(tensors.keys(), file))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"cannot read the reference weights in {file}: {error}") from None
        if not self.files:
            raise ArtifactError(f"{path} has no safetensors: set init.reference to the model before it was quantised")
        self.path = path

    def matrix(self, binding: Binding) -> Tensor:
        """The target's weight (out, in); a file of the bare body has names without the head model's prefix."""
        expert = binding.layer if isinstance(binding.layer, ExpertLayer) else None
        wanted = binding.target.module_name + ("" if expert else ".weight")
        found = [name for name in self.files if wanted == name or wanted.endswith(f".{name}")]
        if not found:
            raise ArtifactError(f"{self.path} has no {wanted}{near_names(wanted, self.files, 2)}")
        name, layer = max(found, key=len), binding.layer
        with safe_open(self.files[name], "pt") as tensors:
            stored = tensors.get_tensor(name)
        if stored.shape != layer.parameter.shape:
            raise ArtifactError(
                f"{name} in {self.path} has shape {tuple(stored.shape)}, the model {tuple(layer.parameter.shape)}: set "
                f"init.reference to the same model before it was quantised"
            )
        own = stored if expert is None else stored[expert.index]
        matrix = layer.to_matrix(own.to(layer.device))
        return matrix if layer.rows is None else matrix[slice(*layer.rows)]


def residual(layer: Layer, reference: Tensor) -> Tensor:
    """``W - deq(Q)`` (out, in) in float32 or wider."""
    dtype = torch.promote_types(torch.promote_types(reference.dtype, layer.dtype), torch.float32)
    return reference.to(dtype) - layer.weight().to(dtype)


@part("init", "quantization-residual")
@dataclass(frozen=True)
class QuantizationResidual(InitPart):
    """LoftQ's start: with ``Q`` the base's weight as stored and ``W`` the one it was quantised from,

    ``W - deq(Q) = U diag(S) V^T``, ``B = U_r diag(sqrt(S_r / s))``, ``A = diag(sqrt(S_r / s)) V_r^T``,

    so that ``deq(Q) + s B A`` is as close to ``W`` as rank r allows: the first of the paper's alternations, and the best one
    for a stored ``Q``, which is never edited here. A core takes ``S_r / s``.

    ``reference``: the safetensors file, or the folder of them, with the weights before quantisation. The report has, by
    target, how much of ``||W - deq(Q)||_F`` is left.
    """

    reference: str = ""

    evidence: ClassVar[Literal["none", "weight", "gradient", "activations"]] = "weight"

    @property
    def moves_output(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"factors"})

    def apply(self, context: InitContext) -> None:
        if not self.reference:
            raise CompositionError(
                "init 'quantization-residual' compares with the weights before quantisation: set init.reference to their "
                "safetensors file or folder, or use init='kaiming'"
            )
        reference, left = _Reference(Path(self.reference)), {}
        for binding in context.bindings:
            adapter: LowRankAdapter = binding.adapter
            lost = residual(binding.layer, reference.matrix(binding))
            u, s, v, _ = leading_svd(lost, adapter.rank, generator=context.generator(binding))
            adapter.start(u, s / adapter.scale, v.mT)
            energy = float(lost.double().square().sum())
            rest = max(0.0, 1 - float(s.double().square().sum()) / energy) if energy else 0.0
            left[binding.name] = rest**0.5
        context.report.update(residual=left)
