"""FourierFT (2405.03003): the update is the inverse Fourier transform of a few learned coefficients at random places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rankloom.adapters.base import AdapterPart, Dtype, adapter_dtype
from rankloom.adapters.materialized import MaterializedAdapter
from rankloom.adapters.seeded import SeededAdapter, require_room
from rankloom.errors import RecipeError
from rankloom.kernels.fourier import fourier_sum
from rankloom.kernels.generated import choice
from rankloom.layers import Layer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["FourierFT", "FourierFTAdapter"]


class FourierFTAdapter(MaterializedAdapter, SeededAdapter):
    """``delta = s * Re(ifft2(S))`` with ``S[i_k, j_k] = c_k``, ``c`` (n,) trained and the places (2, n) frozen.

    The update is formed as a whole, by one real transform.
    """

    roles: ClassVar[dict[str, str]] = {"c": "coefficients"}
    places: Tensor

    def __init__(self, layer: Layer, scale: float, places: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.shape = scale, (layer.out_features, layer.in_features)
        self.multiple = layer.out_features  # one block: a transform has all rows or none
        self.prove(places, device=layer.device)
        self.register_buffer("places", places.to(layer.device), persistent=False)
        self.c = nn.Parameter(torch.zeros(places.shape[1], dtype=dtype, device=layer.device))

    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """``c = 0``."""
        nn.init.zeros_(self.c)

    def rows(self, weight: Tensor | None, span: slice, *tensors: Tensor) -> Tensor:
        return fourier_sum(self.scale * tensors[0], self.places, self.shape)[span]


@part("adapter", "fourierft")
@dataclass(frozen=True)
class FourierFT(AdapterPart):
    """``y = x (W + s Re(ifft2(S)))^T + b``, ``S`` zero but for ``n = coefficients`` learned real entries at places from ``seed``.

    The transform divides by ``out * in``, which is why ``s = scale`` is large. Layers of one shape have the same places.
    ``places="peft"`` takes them from torch's generator as PEFT does, to read its checkpoints. Starts at zero. Parameters per
    target: ``n``.

    Raises:
        RecipeError: fewer than one coefficient.
        TargetError: more coefficients than a target has entries.
    """

    coefficients: int = 1000
    scale: float = 150.0
    places: Literal["hashed", "peft"] = "hashed"
    seed: int = 777
    dtype: Dtype = "auto"

    def check(self) -> None:
        if self.coefficients < 1:
            raise RecipeError(f"FourierFT needs adapter.coefficients >= 1, got {self.coefficients}")

    def check_on(self, targets: list[Target]) -> None:
        require_room(self.coefficients, targets)

    def build(self, target: Target) -> FourierFTAdapter:
        out, width = target.shape
        if self.places == "peft":
            generator = torch.Generator().manual_seed(self.seed)
            chosen = torch.randperm(out * width, generator=generator)[: self.coefficients]
        else:
            chosen = choice(self.seed, "fourierft", out * width, self.coefficients)
        places = torch.stack([chosen // width, chosen % width])
        return FourierFTAdapter(target.layer, self.scale, places, adapter_dtype(self.dtype, target.layer))
