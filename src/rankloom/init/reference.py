"""Weights of other models, by name, as evidence for a start."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankloom.adapters import Binding
from rankloom.errors import ArtifactError, near_names
from rankloom.layers import ExpertLayer

__all__ = ["Reference"]


class Reference:
    """Weights by name from a safetensors file, or from all those in a folder. ``fix`` is what messages tell to set."""

    def __init__(self, path: Path, fix: str) -> None:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        self.files: dict[str, Path] = {}
        try:
            for file in files:
                with safe_open(file, "pt") as tensors:
                    self.files.update(dict.fromkeys(tensors.keys(), file))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"cannot read the reference weights in {file}: {error}") from None
        if not self.files:
            raise ArtifactError(f"{path} has no safetensors: set {fix}")
        self.path, self.fix = path, fix

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
                f"{name} in {self.path} has shape {tuple(stored.shape)}, the model {tuple(layer.parameter.shape)}: set {self.fix}"
            )
        own = stored if expert is None else stored[expert.index]
        matrix = layer.to_matrix(own.to(layer.device))
        return matrix if layer.rows is None else matrix[slice(*layer.rows)]
