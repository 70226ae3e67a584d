"""The family ``delta = s * B diag(E) A``: LoRA (2106.09685), rsLoRA's scale (2312.03732), AdaLoRA's triplets (2303.10512)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from rankloom.adapters.base import Adapter, AdapterPart, Dtype, adapter_dtype
from rankloom.errors import RecipeError, TargetError, near_names
from rankloom.kernels import Linear, lowrank_linears
from rankloom.parts import part
from rankloom.targets import Layer, LinearLayer, Target, matches

__all__ = ["SCALINGS", "LoRA", "LowRankAdapter"]

T = TypeVar("T")
Scaling = Literal["standard", "rslora", "triplet"]

SCALINGS = {
    "standard": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / rank**0.5,
    # AdaLoRA divides by the initial rank for the whole run, so pruning does not rescale survivors; 1e-5 as released.
    "triplet": lambda alpha, rank: alpha / (rank + 1e-5),
}


class LowRankAdapter(Adapter):
    """``delta = s * B A``, or ``s * B diag(E) A`` with a diagonal core; ``A`` (r, in), ``B`` (out, r), ``E`` (r,).

    ``mask`` (r,) marks live components of a diagonal core: schedules switch components off in place, compaction happens at
    export, and the parameters never change shape.
    """

    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B", "E": "core"}
    shares_input: ClassVar[bool] = True
    mask: Tensor

    def __init__(
        self, layer: Layer, rank: int, scale: float, *, diagonal: bool, dropout: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.A = nn.Parameter(torch.empty(rank, layer.in_features, dtype=dtype, device=layer.device))
        self.B = nn.Parameter(torch.empty(layer.out_features, rank, dtype=dtype, device=layer.device))
        self.E: nn.Parameter | None = None
        if diagonal:
            self.E = nn.Parameter(torch.zeros(rank, dtype=dtype, device=layer.device))
            self.register_buffer("mask", torch.ones(rank, dtype=torch.bool, device=layer.device))

    def rows(self) -> Tensor:
        """``A`` with the core folded in: (r, in)."""
        return self.A if self.E is None else (self.E * self.mask)[:, None] * self.A

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return self.scale * self.B, self.rows()

    def delta(self, base: Layer) -> Tensor:
        return (self.scale * self.B) @ self.rows()

    def fuses(self, x: Tensor, base: Layer) -> bool:
        """Whether this call can run as a fused kernel."""
        return not (self.dropout > 0 and self.training) and fusable(x, base)

    def linear(self, base: Layer) -> Linear:
        """What the fused kernel needs."""
        return Linear(base.weight(), base.bias(), self.rows(), self.B, self.scale)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if self.fuses(x, base):
            return lowrank_linears(x, [self.linear(base)])[0]
        dtype = x.dtype if x.is_floating_point() else base.dtype
        y = base(x)
        inner = dropout(x, self.dropout) if self.training and self.dropout else x
        return y + base.lowrank(inner, self.rows().to(dtype), (self.scale * self.B).to(dtype)).to(y.dtype)


def dropout(x: Tensor, rate: float) -> Tensor:
    """Dropout on the low-rank path; the look-ups of an embedding (integers) have none."""
    return nn.functional.dropout(x, rate) if x.is_floating_point() else x


def fusable(x: Tensor, base: Layer) -> bool:
    """Whether the fused kernels apply: a plain frozen linear weight of the input's own dtype, and no autocast."""
    weight, bias = base.stored, base.bias()
    return (
        isinstance(base, LinearLayer)
        and base.ordinary
        and weight.dtype == x.dtype
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)  # a bias trained beside the adapter needs its own gradient
        and not torch.is_autocast_enabled(x.device.type)
    )


@part("adapter", "lora")
@dataclass(frozen=True)
class LoRA(AdapterPart):
    """``y = x (W + s B A)^T + b`` with ``s = alpha / r`` (``standard``) or ``alpha / sqrt(r)`` (``rslora``).

    ``core="diagonal"`` puts ``diag(E)`` between the factors, which makes components rankable (AdaLoRA).
    ``rank_pattern`` and ``alpha_pattern`` override rank and alpha for the targets a pattern matches (last match wins).
    Parameters per target: ``r (in + out)``, with a diagonal core ``r (in + out + 1)``.
    """

    rank: int = 8
    alpha: float = 16.0
    scaling: Scaling = "standard"
    core: Literal["identity", "diagonal"] = "identity"
    dropout: float = 0.0
    dtype: Dtype = "auto"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    @property
    def offers(self) -> frozenset[str]:
        # Preconditioners rest on delta = s B A: with a core between the factors they would need other formulas.
        return frozenset({"factors", "ranked components" if self.core == "diagonal" else "trained pairs"})

    def check(self) -> None:
        if min([self.rank, *self.rank_pattern.values()]) < 1:
            raise RecipeError(f"adapter rank must be at least 1, got {self.rank} with rank_pattern {self.rank_pattern}")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"adapter dropout must be in [0, 1), got {self.dropout}")

    def rank_of(self, target: str) -> int:
        """The rank for a target name."""
        return _last_match(self.rank_pattern, target, self.rank)

    def scale_of(self, target: str) -> float:
        """``s`` for a target name."""
        return SCALINGS[self.scaling](_last_match(self.alpha_pattern, target, self.alpha), self.rank_of(target))

    def check_on(self, targets: list[Target]) -> None:
        names = [target.name for target in targets]
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            if not any(_matches(pattern, name) for name in names):
                raise TargetError(
                    f"adapter pattern {pattern!r} matches none of the targets{near_names(pattern, names)}"
                )
        for target in targets:
            rank, limit = self.rank_of(target.name), min(target.shape)
            if rank > limit:
                raise TargetError(
                    f"rank {rank} is above min(out, in) = {limit} of {target.name} {target.shape}: lower adapter.rank to "
                    f"at most {limit}, or set adapter.rank_pattern for this module"
                )

    def build(self, target: Target) -> LowRankAdapter:
        return LowRankAdapter(target.layer, **self._arguments(target), diagonal=self.core == "diagonal")

    def _arguments(self, target: Target) -> dict[str, Any]:
        dtype = adapter_dtype(self.dtype, target.layer)
        return {
            "rank": self.rank_of(target.name),
            "scale": self.scale_of(target.name),
            "dropout": self.dropout,
            "dtype": dtype,
        }


def _last_match(patterns: dict[str, T], name: str, default: T) -> T:
    found = [value for pattern, value in patterns.items() if _matches(pattern, name)]
    return found[-1] if found else default


def _matches(pattern: str, name: str) -> bool:
    """A pattern for a fused module holds for its slices too."""
    return matches(pattern, name) or matches(pattern, name.partition("[")[0])
