"""The family ``delta = s * B C A``: LoRA (2106.09685), rsLoRA's scale (2312.03732), AdaLoRA's triplets (2303.10512), LoRA-XS's
square core (2405.17604), LoRA-FA's frozen ``A`` (2308.03303), CoRA's frozen ``B`` (2409.02119), LaMDA's ``A`` (2406.12832)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from rankloom.adapters.base import AdapterPart, Dtype, adapter_dtype
from rankloom.adapters.factored import FactoredAdapter
from rankloom.adapters.patterned import last_match, require_matches
from rankloom.errors import RecipeError, TargetError
from rankloom.layers import Layer, LinearLayer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["SCALINGS", "LoRA", "LowRankAdapter", "Rank"]

Scaling = Literal["standard", "rslora", "triplet", "constant"]
Rank = int | Literal["full"]
Core = Literal["identity", "diagonal", "sigmoid", "square"]
Train = Literal["all", "A", "B", "core", "B+core"]

TRAINED = {"all": "ABER", "A": "A", "B": "B", "core": "ER", "B+core": "BER"}

SCALINGS = {
    "standard": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / rank**0.5,
    # AdaLoRA divides by the initial rank for the whole run, so pruning does not rescale survivors; 1e-5 as released.
    "triplet": lambda alpha, rank: alpha / (rank + 1e-5),
    "constant": lambda alpha, rank: alpha,
}


class LowRankAdapter(FactoredAdapter):
    """``delta = s * B C A`` with ``A`` (r, in), ``B`` (out, r) and a core ``C``: none, ``diag(E)`` (r,), or ``R`` (r, r).

    What is not trained is a frozen buffer. Where the init keeps the pretrained function by subtracting its start
    (:meth:`subtract_start`), frozen copies ``A0``, ``B0``, ``E0``, ``R0`` of the trained tensors ride along and
    ``delta = s * (B C A - B0 C0 A0)``, computed so that it is exactly zero as long as nothing has moved.

    ``mask`` (r,) marks live components of a diagonal core: schedules switch components off in place, compaction happens at
    export, and the parameters never change shape.

    With ``normalized``, the entries of ``E`` are no gains themselves: see :func:`shared_out`.
    """

    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B", "E": "core", "R": "core"}
    A: Tensor
    B: Tensor
    E: Tensor | None
    R: Tensor | None
    mask: Tensor

    def __init__(
        self,
        layer: Layer,
        rank: int,
        scale: float,
        *,
        core: Core,
        train: Train,
        dropout: float,
        dtype: torch.dtype,
        fold: bool = False,
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.dropout, self.offset, self.fold = rank, scale, dropout, False, fold
        self.normalized = core == "sigmoid"
        self._folded: tuple[Any, Tensor] | None = None
        shapes = {
            "A": (rank, layer.in_features),
            "B": (layer.out_features, rank),
            "E": (rank,) if core in ("diagonal", "sigmoid") else None,
            "R": (rank, rank) if core == "square" else None,
        }
        for name, shape in shapes.items():
            tensor = None if shape is None else torch.zeros(shape, dtype=dtype, device=layer.device)
            if tensor is None or name not in TRAINED[train]:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))
        if self.E is not None:
            self.register_buffer("mask", torch.ones(rank, dtype=torch.bool, device=layer.device))

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors among ``A``, ``B``, ``E``, ``R``, without what a lifecycle has frozen for now."""
        return {
            name: p
            for name, p in self._parameters.items()
            if name in LowRankAdapter.roles and p is not None and p.requires_grad
        }

    @property
    def core(self) -> Tensor | None:
        """``E`` (r,), ``R`` (r, r), or None."""
        return self.R if self.E is None else self.E

    def subtract_start(self) -> None:
        """Make room for the start: what :meth:`initialized` finds written is subtracted from then on."""
        self.offset = True
        for name, parameter in self.trained().items():
            self.register_buffer(f"{name}0", torch.zeros_like(parameter))

    @torch.no_grad()
    def initialized(self, base: Layer) -> None:
        if self.offset:
            for name, parameter in self.trained().items():
                self.get_buffer(f"{name}0").copy_(parameter)

    @torch.no_grad()
    def write(self, b: Tensor, a: Tensor, core: Tensor) -> None:
        """Copy ``B`` (out, r), ``A`` (r, in) and the core's diagonal (r,) in; forms without a core have no use for it."""
        self.B.copy_(b)
        self.A.copy_(a)
        if self.E is not None:
            self.E.copy_(core)
        if self.R is not None:
            self.R.copy_(torch.diag(core))

    def start(self, left: Tensor, values: Tensor, right: Tensor) -> None:
        """Write ``delta = s * left diag(values) right`` for ``left`` (out, r), ``values >= 0`` (r,), ``right`` (r, in).

        Without a core, both factors take the square root of the values; with one, the core takes them and the factors are
        ``left`` and ``right`` themselves. A component of value zero must be able to learn, so only one of its parts is
        zero: its column of ``B``, or its core entry where ``B`` is frozen. Where ``A`` alone is trained, it takes the values.
        """
        left, values, right = (t.to(self.A.device) for t in (left, values, right))
        live, one = values > 0, torch.ones_like(values)
        if self.trained().keys() == {"A"}:
            self.write(left, values[:, None] * right, one)
        elif self.core is None:
            root = values.sqrt()
            self.write(left * root, torch.where(live, root, one)[:, None] * right, one)
        elif "B" in self.trained():
            self.write(left * live, right, torch.where(live, values, one))
        else:
            self.write(left, right, values)

    def effective(self) -> tuple[Tensor, Tensor]:
        """``(B, A)`` as kernels see them, cores and offset folded in, the scale not: (out, k) and (k, in).

        With an offset ``B C A - B0 C0 A0 = [L - L0, L0] [R; R - R0]`` for the sides ``L`` and ``R``, of rank ``k = 2r``; of
        rank r where only one side is trained. The differences are formed from the tensors that moved, without cancellation.
        """
        columns, rows = self.sides()
        if not self.offset:
            return columns, rows
        moved_columns, moved_rows = self._moved("B", "R", _columns), self._moved("A", "E", self._rows)
        if moved_rows is None:
            return cast(Tensor, moved_columns), rows
        if moved_columns is None:
            return columns, moved_rows
        first = _columns(self.get_buffer("B0"), self._start_of("R"))
        return torch.cat([moved_columns, first], 1), torch.cat([rows, moved_rows])

    def sides(self) -> tuple[Tensor, Tensor]:
        """``(B, A)`` with the core folded in and the offset left out."""
        return _columns(self.B, self.R), self._rows(self.A, self.E)

    def operands(self, x: Tensor, base: Layer) -> Any:
        linear = super().operands(x, base)
        if linear is None or not (self.fold and self.offset):
            return linear
        columns, rows = self.sides()
        return linear._replace(weight=self.folded(base), a=rows, b=columns)

    @torch.no_grad()
    def folded(self, base: Layer) -> Tensor:
        """``W - s B0 C0 A0`` (out, in) in the layer's dtype: a copy of the weight, made once, and anew when a start is loaded."""
        weight = base.weight()
        fixed = [tensor for name, tensor in self.named_buffers() if name != "mask"]
        made_of = [(t.data_ptr(), t._version, t.dtype) for t in (weight, *fixed)]
        if self._folded is None or self._folded[0] != made_of:
            columns = _columns(cast(Tensor, self._start_of("B")), self._start_of("R"))
            rows = self._rows(cast(Tensor, self._start_of("A")), self._start_of("E"))
            wide = torch.promote_types(weight.dtype, rows.dtype)
            start = (self.scale * columns.to(wide)) @ rows.to(wide)
            self._folded = made_of, (weight.to(wide) - start).to(weight.dtype)
        return self._folded[1]

    def gains(self, e: Tensor) -> Tensor:
        """What the entries (r,) of a diagonal core multiply their components by."""
        return shared_out(e, self.A) if self.normalized else e

    def _rows(self, a: Tensor, e: Tensor | None) -> Tensor:
        return a if e is None else (self.gains(e) * self.mask)[:, None] * a

    def _start_of(self, name: str) -> Tensor | None:
        return cast("Tensor | None", getattr(self, f"{name}0", getattr(self, name)))

    def _moved(self, factor: str, core: str, side: Callable[[Any, Any], Tensor]) -> Tensor | None:
        """``F C - F0 C0`` as ``(F - F0) C + F0 (C - C0)``; None where neither is trained."""
        now, start = (getattr(self, factor), getattr(self, core)), (self._start_of(factor), self._start_of(core))
        terms = []
        if now[0] is not start[0]:
            terms.append(side(now[0] - start[0], now[1]))
        if now[1] is not start[1]:
            terms.append(side(start[0], now[1] - start[1]))
        return sum(terms[1:], terms[0]) if terms else None


def _columns(b: Tensor, r: Tensor | None) -> Tensor:
    return b if r is None else b @ r


def shared_out(logits: Tensor, rows: Tensor) -> Tensor:
    """``m_i / sum_j p_j m_j - 1`` (r,) for ``m = sigmoid(logits)`` and shares ``p_j`` of the rows' norms in their sum.

    Scaled by one more than these gains, the norms are as large in sum as before, wherever ``logits`` (r,) are. Equal logits
    leave every row alone, to the bit where they are zero.
    """
    sizes = torch.linalg.vector_norm(rows, dim=1) + torch.finfo(rows.dtype).tiny  # rows of zeros share alike
    shares = sizes / sizes.sum()
    half = torch.tanh(logits / 2) / 2  # the sigmoid but for its 1/2, which a difference would cancel
    return (half - shares @ half) / (shares @ torch.sigmoid(logits))


@part("adapter", "lora")
@dataclass(frozen=True)
class LoRA(AdapterPart):
    """``y = x (W + s B A)^T + b`` with ``s = alpha / r`` (``standard``), ``alpha / sqrt(r)`` (``rslora``) or ``alpha``
    (``constant``). ``rank="full"`` is ``min(out, in)`` of each target.

    ``core="diagonal"`` puts ``diag(E)`` between the factors, which makes components rankable (AdaLoRA); ``"square"`` puts
    ``R`` (r, r) there; ``"sigmoid"``, between frozen singular vectors, scales the singular values by sigmoids of ``E`` and then
    all of them so that their sum stays (SVF's released code). ``train`` says what learns: ``"all"``, ``"B"`` (LoRA-FA: ``A`` is
    frozen, so no activation of width ``in`` is needed for its gradient), ``"A"`` (CoRA: a frozen basis on the output side),
    ``"core"`` (LoRA-XS: both factors are frozen) or ``"B+core"`` (LaMDA). ``rank_pattern`` and ``alpha_pattern`` override
    rank and alpha for the targets a pattern matches (last match wins). ``fold``: where the start is subtracted, do it once,
    in a copy of the weight that the adapter holds, instead of a second low-rank term in every step; linear layers only, and
    the start is then exact to the weight's precision, not to the bit. Parameters per target: ``r in`` for ``A``, ``r out``
    for ``B``, ``r`` or ``r^2`` for the core, each where it is trained.
    """

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"core": "diagonal"},
        {"core": "square", "train": "core"},
        {"train": "B"},
        {"train": "A"},
        {"core": "square", "train": "B+core"},
        {"core": "sigmoid", "train": "core"},
    )

    rank: Rank = 8
    alpha: float = 16.0
    scaling: Scaling = "standard"
    core: Core = "identity"
    train: Train = "all"
    dropout: float = 0.0
    dtype: Dtype = "auto"
    fold: bool = False
    rank_pattern: dict[str, Rank] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        start = {"a start with an offset"} if self.fold else set[str]()
        return frozenset(start | ({"singular values in a factor"} if self.core == "sigmoid" else set()))

    @property
    def offers(self) -> frozenset[str]:
        own = {"factors", "links", *(f"trained {name}" for name in "AB" if name in TRAINED[self.train])}
        if self.train != "all":
            return frozenset(own)
        # Preconditioners rest on delta = s B A: with a core between the factors they would need other formulas.
        more = {"identity": {"trained pairs"}, "diagonal": {"ranked components"}, "square": set[str]()}
        return frozenset(own | more[self.core])

    def check(self) -> None:
        if min([rank for rank in (self.rank, *self.rank_pattern.values()) if rank != "full"], default=1) < 1:
            raise RecipeError(f"adapter rank must be at least 1, got {self.rank} with rank_pattern {self.rank_pattern}")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"adapter dropout must be in [0, 1), got {self.dropout}")
        if "core" in self.train and self.core == "identity":
            raise RecipeError(f"adapter train={self.train!r} has no core: set adapter.core to 'square' or 'diagonal'")
        if self.core == "sigmoid" and self.train != "core":
            raise RecipeError("adapter core='sigmoid' shares out what frozen factors hold: set adapter.train to 'core'")
        if self.train == "A" and self.core != "identity":
            raise RecipeError("adapter train='A' would freeze the core at its start: leave adapter.core at 'identity'")

    def rank_of(self, target: str) -> Rank:
        """The rank set for a target name."""
        return last_match(self.rank_pattern, target, self.rank)

    def rank_on(self, target: Target) -> int:
        """The rank on a target, as a number."""
        return min(target.shape) if (rank := self.rank_of(target.name)) == "full" else rank

    def alpha_of(self, target: str) -> float:
        """Alpha for a target name."""
        return last_match(self.alpha_pattern, target, self.alpha)

    def scale_on(self, target: Target) -> float:
        """``s`` on a target."""
        return SCALINGS[self.scaling](self.alpha_of(target.name), self.rank_on(target))

    def check_on(self, targets: list[Target]) -> None:
        require_matches((*self.rank_pattern, *self.alpha_pattern), targets)
        for target in targets:
            rank, limit = self.rank_on(target), min(target.shape)
            if rank > limit:
                raise TargetError(
                    f"rank {rank} is above min(out, in) = {limit} of {target.name} {target.shape}: lower adapter.rank to "
                    f"at most {limit}, or set adapter.rank_pattern for this module"
                )
            if self.fold and not (isinstance(target.layer, LinearLayer) and target.layer.plain):
                stored = type(target.layer.module).__name__ + ("" if target.layer.plain else ", quantised")
                raise TargetError(
                    f"adapter.fold keeps a copy of a plain linear weight, and {target.name} is none ({stored}): drop adapter.fold"
                )

    def build(self, target: Target) -> LowRankAdapter:
        return LowRankAdapter(target.layer, **self._arguments(target))

    def _arguments(self, target: Target) -> dict[str, Any]:
        dtype = adapter_dtype(self.dtype, target.layer)
        return {
            "rank": self.rank_on(target),
            "scale": self.scale_on(target),
            "core": self.core,
            "train": self.train,
            "dropout": self.dropout,
            "dtype": dtype,
            "fold": self.fold,
        }
