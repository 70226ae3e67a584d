"""TLoRA (2501.08727): a tensor-ring transform of the weight's input, and a tensor-ring residual."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.adapters.base import Adapter, AdapterPart, Binding, Dtype, adapter_dtype
from rankloom.adapters.factored import frozen_operands
from rankloom.errors import RecipeError
from rankloom.events import Schedule
from rankloom.kernels import Update, kronecker_rows, kronecker_rows_macs, materialized_linear
from rankloom.layers import Conv2dLayer, EmbeddingLayer, Layer
from rankloom.linalg import (
    chain,
    mode_sizes,
    ring_change,
    ring_identity_penalty,
    ring_orthogonality_penalty,
    ring_terms,
)
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["RingPenalty", "TLoRA", "TLoRAAdapter"]

Bonds = Literal["random", "uniform"]
MOST_MODES = 8


class TLoRAAdapter(Adapter):
    """``W' = W T + Delta`` with a ring matrix ``T`` (in, in), of cores ``delta_ij M_d + T_d``, and a ring ``Delta`` (out, in).

    The trained ``T_d`` (I_d, I_d, R, R) are the deviation: they start at zero, and ``T - I`` is formed from them. ``Delta`` has
    cores ``B_d`` (O_d, R', R') for the output and ``C_d`` (J_d, R', R') for the input, ``B_0 = 0``: a product of factors of width
    ``R'^2``. ``W' x = W (x + (T - I) x) + Delta x``: ``T - I``, a sum of Kronecker products of the last mode and the others,
    meets the tokens, or the rows of ``W`` to form ``W'``, whichever is cheaper. On a convolution ``T`` mixes the channels (of
    each group), at every position of the kernel alike.
    """

    needs_base: ClassVar[Literal["never", "init", "merge", "every_step"]] = "merge"
    roles: ClassVar[dict[str, str]] = {f"{kind}{d}": "ring" for kind in "TBC" for d in range(MOST_MODES)}
    bonds: Tensor

    def __init__(
        self, layer: Layer, modes: int, transform_rank: int, rank: int, start: Bonds, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.modes, self.rank, self.start = modes, rank, start
        self.channels = layer.stored.shape[1] if isinstance(layer, Conv2dLayer) else layer.in_features
        self.sizes = mode_sizes(self.channels, modes)
        for kind, sizes in self._sides(layer).items():
            for d, size in enumerate(sizes):
                shape = (size, size, transform_rank, transform_rank) if kind == "T" else (size, rank, rank)
                tensor = torch.zeros(shape, dtype=dtype, device=layer.device)
                self.register_parameter(f"{kind}{d}", nn.Parameter(tensor))
        bonds = torch.zeros(modes, transform_rank, transform_rank, dtype=dtype, device=layer.device)
        self.register_buffer("bonds", bonds)

    def _sides(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        out, into = (mode_sizes(d, self.modes) for d in (layer.out_features, layer.in_features))
        return {"T": self.sizes, "B": out, "C": into}

    def cores(self, kind: str) -> list[Tensor]:
        """The cores of one side: ``T``, ``B`` or ``C``."""
        return [getattr(self, f"{kind}{d}") for d in range(self.modes)]

    @torch.no_grad()
    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """``T_d = 0`` and ``B_0 = 0``; every other core is normal, such that entries of the input side have variance ``1/in``
        and those of the output side's other cores together 1. ``M_d`` is ``1 / R`` throughout (``uniform``), or random."""
        count, rank = self.modes, len(self.bonds[0])
        into = math.prod(len(core) for core in self.cores("C"))
        inner = {"B": max(count - 1, 1), "C": count}
        for kind, variance in (("B", 1.0), ("C", 1 / into)):
            # An entry sums r^(n - 1) products of n normal numbers.
            std = (variance / self.rank ** (inner[kind] - 1)) ** (0.5 / inner[kind])
            for core in self.cores(kind):
                core.copy_(torch.randn(core.shape, generator=generator, dtype=core.dtype) * std)
        for core in (*self.cores("T"), self.cores("B")[0]):
            core.zero_()
        drawn = torch.randn(count, rank, rank, generator=generator, dtype=torch.float64) * (0.3 / rank**0.5)
        bonds = torch.eye(rank, dtype=torch.float64) + drawn
        if self.start == "uniform":
            bonds = torch.ones_like(bonds) / rank
        else:  # closed to tr(M_1 .. M_D) = 1
            before = chain([bond[None] for bond in bonds[:-1]])[0] if count > 1 else torch.eye(rank).double()
            bonds[-1] = torch.linalg.inv(before) / rank
        self.bonds.copy_(bonds)

    def residual(self, base: Layer) -> tuple[Tensor, Tensor]:
        """``Delta`` as factors (out, R'^2) and (R'^2, in); padded rows and columns are cut off."""
        left, right = chain(self.cores("B")), chain(self.cores("C"))
        return left[: base.out_features].flatten(1), right[: base.in_features].mT.flatten(1).mT

    def change(self) -> Tensor:
        """``T - I`` (in, in); of a convolution's channels."""
        return ring_change(self.cores("T"), self.bonds)[: self.channels, : self.channels]

    def delta(self, base: Layer) -> Tensor:
        left, right = self.residual(base)
        weight = base.weight().to(left.dtype).view(base.out_features, self.channels, -1)
        return torch.einsum("ocp,cd->odp", weight, self.change()).flatten(1) + left @ right

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if frozen_operands(x, base) is not None and self.forms(base, x.numel() // self.channels, x.dtype):
            return self._formed(x, base)
        left, right = self.residual(base)
        dtype = x.dtype if x.is_floating_point() else base.dtype
        update = base.lowrank(x, right.to(dtype), left.to(dtype))
        if isinstance(base, EmbeddingLayer):  # a row of the transform for every look-up
            moved = self._moved(F.one_hot(x, self.channels).to(dtype)) * getattr(base.module, "embed_scale", 1.0)
        else:
            last = x.movedim(1, -1) if isinstance(base, Conv2dLayer) else x
            moved = self._moved(last.unflatten(-1, (-1, self.channels))).flatten(-2)
            moved = moved.movedim(-1, 1) if isinstance(base, Conv2dLayer) else moved
        if isinstance(base, EmbeddingLayer) or base.rows is not None:
            y = base(x)  # which is there already, or takes no vectors
            transformed = y + F.linear(moved, base.weight()).to(y.dtype)
        else:
            transformed = base(x + moved)
        return transformed + update.to(transformed.dtype)

    def forms(self, base: Layer, tokens: int, dtype: torch.dtype) -> bool:
        """Whether ``W T + Delta`` takes fewer multiply-adds in a step of training than the tokens' way through both.

        Forward, backward, and for the gradient of what ``T`` and ``Delta`` are made of. In half precision neither way spares the
        last digits: ``x + (T - I) x`` is rounded as ``W T`` is.
        """
        out, into = base.out_features, base.in_features
        terms = len(self.bonds[0]) ** 2, math.prod(self.sizes[:-1]), self.sizes[-1], dtype
        by_weight = 3 * kronecker_rows_macs(out, *terms) + out * into * (4 * self.rank**2 + tokens)
        return by_weight < 3 * (kronecker_rows_macs(tokens, *terms) + tokens * self.rank**2 * (out + into))

    def _formed(self, x: Tensor, base: Layer) -> Tensor:
        def rows(weight: Tensor | None, span: slice, left: Tensor, right: Tensor, *terms: Tensor) -> Tensor:
            assert weight is not None
            # A row of W T is T^T times that of W.
            turned = kronecker_rows(weight, *(side.mT for side in terms), keep=True)
            return torch.addmm(turned, left[span], right)

        shape = base.out_features, base.in_features
        factors = [side.to(x.dtype) for side in self.residual(base)]
        tensors = [*factors, *ring_terms(self.cores("T"), self.bonds)]
        return materialized_linear(x, Update(shape, rows, base.weight), tensors, base.apply)

    def _moved(self, x: Tensor) -> Tensor:
        """``(T - I) x``; of what it takes only ``x`` is kept for the backward pass."""
        if torch.is_autocast_enabled(x.device.type):  # the kernel multiplies in the dtype it is given
            x = x.to(torch.get_autocast_dtype(x.device.type))
        terms = ring_terms(self.cores("T"), self.bonds)
        return kronecker_rows(x.reshape(-1, self.channels), *terms).view(x.shape)


class RingPenalty(Schedule):
    """``weight * mean over targets of ||T - I||_F^2`` (``identity``) or ``||T^T T - I||_F^2`` (``orthogonality``)."""

    def __init__(self, bindings: list[Binding], kind: str, weight: float) -> None:
        self.adapters: list[TLoRAAdapter] = [binding.adapter for binding in bindings]
        self.penalty = {"identity": ring_identity_penalty, "orthogonality": ring_orthogonality_penalty}[kind]
        self.weight = weight

    def extra_loss(self, step: int) -> Tensor | None:
        each = [self.penalty(adapter.cores("T"), adapter.bonds) for adapter in self.adapters]
        return self.weight * torch.stack(each).mean() if each else None


@part("adapter", "tlora")
@dataclass(frozen=True)
class TLoRA(AdapterPart):
    """``y = x (W T + Delta)^T + b`` with rings of ``modes`` cores: ``T`` of rank R = ``transform_rank``,
    ``Delta`` of R' = ``rank``.

    Dimensions are split near evenly, ``in = prod I_d``; one without such factors (a prime) is padded to the next that has
    them, and the ring cut to size. ``bonds``: at the start every ``M_d`` is ``1 / R`` (``"uniform"``, as published), with which
    all ``R^2`` slices of a core get the same gradient for ever and ``T`` stays one Kronecker product; or random with
    ``T = I`` all the same. ``penalty`` draws ``T`` towards the identity or towards orthogonality, of the padded ring, with
    ``penalty_weight``. Parameters per target: ``R^2 sum I_d^2 + R'^2 (sum O_d + sum I_d)``.
    """

    rank: int = 6
    transform_rank: int = 2
    modes: int = 3
    bonds: Bonds = "random"
    penalty: Literal["none", "identity", "orthogonality"] = "none"
    penalty_weight: float = 1e-3
    dtype: Dtype = "auto"

    def check(self) -> None:
        if min(self.rank, self.transform_rank) < 1:
            raise RecipeError(
                f"adapter rank and transform_rank must be at least 1, got {self.rank} and {self.transform_rank}"
            )
        if not 1 <= self.modes <= MOST_MODES:
            raise RecipeError(f"adapter modes must be from 1 to {MOST_MODES}, got {self.modes}")
        if self.penalty_weight < 0:
            raise RecipeError(f"adapter penalty_weight must not be negative, got {self.penalty_weight}")

    def schedule(self, bindings: list[Binding], total_steps: int | None) -> Schedule | None:
        return None if self.penalty == "none" else RingPenalty(bindings, self.penalty, self.penalty_weight)

    def build(self, target: Target) -> TLoRAAdapter:
        dtype = adapter_dtype(self.dtype, target.layer)
        return TLoRAAdapter(target.layer, self.modes, self.transform_rank, self.rank, self.bonds, dtype)
