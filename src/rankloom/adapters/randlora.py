"""RandLoRA (2502.00987): an update of full rank, a sum of scaled products of random matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankloom.adapters.base import Dtype, adapter_dtype
from rankloom.adapters.factored import dropout
from rankloom.adapters.materialized import MaterializedAdapter
from rankloom.adapters.seeded import (
    BankedPart,
    Basis,
    SeededAdapter,
    require_dropout,
    require_rank,
    require_seed,
    stored_banks,
)
from rankloom.errors import RecipeError
from rankloom.kernels.bank import Bank, Entries, StoredBank
from rankloom.kernels.scaled import scaled_bases
from rankloom.layers import Conv1DLayer, Layer, LinearLayer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["RandLoRA", "RandLoRAAdapter"]

Order = Literal["matched", "peft"]


class RandLoRAAdapter(MaterializedAdapter, SeededAdapter):
    """``delta = s * sum_j B_j diag(lam_j) A diag(gam_j)``, or its mirror image where ``out < in``.

    ``A`` (r, d) and ``B_j`` (D, r) with ``d = min(out, in)``, ``D = max(out, in)`` are frozen, ``n = ceil(d / r)``; ``lam``
    (r, n) and ``gam`` (n, d) are trained. The factors are as wide as the weight: applied to the input, they multiply
    ``tokens * d * (d + D)``, to form the update takes ``d * d * D``. Whichever is less is done, nothing of it is kept for the
    backward pass.
    """

    halves: ClassVar[bool] = True
    roles: ClassVar[dict[str, str]] = {"lam": "scales", "gam": "scales"}

    def __init__(
        self,
        layer: Layer,
        rank: int,
        scale: float,
        dropout: float,
        order: Order,
        banks: tuple[Bank | StoredBank, ...],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.dropout, self.order = rank, scale, dropout, order
        self.small, self.large = banks
        self.tall = layer.out_features >= layer.in_features
        self.widths = sorted((layer.out_features, layer.in_features))
        d, width = self.widths
        n = math.ceil(d / rank)
        self.lam = nn.Parameter(torch.zeros(rank, n, dtype=dtype, device=layer.device))
        self.gam = nn.Parameter(torch.zeros(n, d, dtype=dtype, device=layer.device))
        self.prove_corners((self.small, rank, d), (self.large, n * rank, width), device=layer.device)

    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """``lam = 0`` and ``gam = 1 / max(n, d)``."""
        require_seed(self.small, self.large)
        nn.init.zeros_(self.lam)
        nn.init.constant_(self.gam, 1 / max(self.gam.shape))

    def scaled(self, lam: Tensor, gam: Tensor) -> tuple[Tensor, Tensor]:
        """``(L, R)`` (out, n r) and (n r, in) with ``delta = s L R``."""
        d, width = self.widths
        frozen = self.large.corner(lam.numel(), width, lam)
        made = scaled_bases(self.small.corner(self.rank, d, lam), lam, gam)
        made = (made if self.order == "matched" else made.transpose(0, 1)).reshape(-1, d)
        return (frozen.mT, made) if self.tall else (made.mT, frozen)

    def factors(self) -> tuple[Tensor, Tensor]:
        left, right = self.scaled(self.lam, self.gam)
        return self.scale * left, right

    def rows(self, weight: Tensor | None, span: slice, *tensors: Tensor) -> Tensor:
        left, right = self.scaled(*tensors)
        return self.scale * (left[span] @ right)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        thinned = self.training and self.dropout > 0
        many = 2 * x.numel() >= x.shape[-1] * self.widths[0]  # tokens >= d / 2: forming takes fewer multiply-adds
        if many and not thinned and isinstance(base, (LinearLayer, Conv1DLayer)):
            return super().forward(x, base)
        inner = dropout(x, self.dropout) if thinned else x
        dtype = x.dtype if x.is_floating_point() else base.dtype

        def applied(inner: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
            left, right = self.scaled(lam, gam)
            return base.lowrank(inner, right.to(dtype), (self.scale * left).to(dtype))

        y = base(x)
        update: Tensor = checkpoint(applied, inner, self.lam, self.gam, use_reentrant=False, preserve_rng_state=False)
        return y + update.to(y.dtype)


@part("adapter", "randlora")
@dataclass(frozen=True)
class RandLoRA(BankedPart):
    """``y = x (W + s sum_j B_j diag(lam_j) A diag(gam_j))^T + b`` with ``n = ceil(d / r)`` terms.

    ``rank(delta) = d = min(out, in)``. One ``A`` serves all terms, and all layers share the banks, from ``seed``: entries are
    uniform, or, for a ``density`` below 1, that share of them +1 or -1 and the rest zero (the paper's sparse variant has 1 / 3,
    its very sparse one ``1 / sqrt d``), of variance 1 in every case. ``basis="stored"``: the banks are in the adapter's file
    instead, as where it was PEFT's. ``order="peft"`` pairs the rows of the scaled ``A`` with the
    columns of ``B`` as PEFT does, by component first, where the equation has them by term; ``scale`` is PEFT's ``alpha / r``.
    Parameters per target: ``n (r + d)``: the smaller the rank, the more.

    Raises:
        RecipeError: a rank below 1, a density outside (0, 1], dropout outside [0, 1).
        TargetError: a rank above a target's shape.
    """

    rank: int = 32
    scale: float = 20.0
    density: float = 1.0
    order: Order = "matched"
    seed: int = 0
    basis: Basis = "seeded"
    dropout: float = 0.0
    dtype: Dtype = "auto"

    def check(self) -> None:
        require_dropout(self.dropout)
        if self.rank < 1 or not 0 < self.density <= 1:
            raise RecipeError(
                f"RandLoRA needs adapter.rank >= 1 and adapter.density in (0, 1], got {self.rank} and {self.density}"
            )

    def check_on(self, targets: list[Target]) -> None:
        require_rank(self.rank, targets)

    def banks(self, targets: list[Target]) -> tuple[Bank | StoredBank, ...]:
        d = max(min(target.shape) for target in targets)
        width = max(max(target.shape) for target in targets)
        rows = self.rank * math.ceil(d / self.rank)
        if self.basis == "stored":
            return stored_banks(self.dtype, targets, (self.rank, d), (rows, width))
        entries: Entries = "uniform" if self.density == 1 else "ternary"
        return (
            Bank(self.seed, "randlora.A", self.rank, d, entries, density=self.density),
            Bank(self.seed, "randlora.B", rows, width, entries, density=self.density),
        )

    def on_banks(self, target: Target, banks: tuple[Any, ...]) -> RandLoRAAdapter:
        dtype = adapter_dtype(self.dtype, target.layer)
        return RandLoRAAdapter(target.layer, self.rank, self.scale, self.dropout, self.order, banks, dtype)
