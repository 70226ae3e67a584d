"""FlyLoRA (2510.08396): a frozen sparse projection picks which of its own rank-one experts act on a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankloom.adapters.base import Adapter, AdapterPart, Binding, Dtype, adapter_dtype
from rankloom.adapters.seeded import SeededAdapter
from rankloom.errors import RankloomError, RecipeError, TargetError
from rankloom.events import Schedule
from rankloom.kernels.generated import normal, words
from rankloom.layers import Conv1DLayer, Conv2dLayer, Layer, LinearLayer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["FlyLoRA", "FlyLoRAAdapter", "LoadBalance"]

NOISE = 1e-6  # a token's gradient that is rounding only, relative to the largest
Score = Literal["signed", "abs"]


def sparse_rows(seed: int, stream: str, rows: int, columns: int, nonzero: int) -> Tensor:
    """A matrix (rows, columns) with ``nonzero`` entries ``N(0, 1)`` at random places in every row, float32."""
    places = (
        words(seed, f"{stream}.places", 0, rows * columns).view(rows, columns).argsort(dim=1, stable=True)[:, :nonzero]
    )
    values = normal(seed, f"{stream}.values", 0, rows * nonzero).view(rows, nonzero)
    return torch.zeros(rows, columns).scatter_(1, places, values)


class _Counted(torch.autograd.Function):
    """Identity on the output whose backward pass counts: once for every forward that learns, recomputed or not."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, chosen: Tensor, counts: Tensor, layer: Layer) -> Tensor:
        ctx.save_for_backward(chosen)
        ctx.counts, ctx.layer = counts, layer
        return y.detach()  # no view, which later code could not change in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (chosen,) = ctx.saved_tensors
        size = ctx.layer.tokens(grad).abs().amax(1)
        learned_from = size > NOISE * size.max()  # padding is not
        ctx.counts.add_(chosen[learned_from].sum(0))
        return grad, None, None, None


class FlyLoRAAdapter(SeededAdapter):
    """``y += s * B (m(A x) * A x)`` with a frozen sparse ``A`` (r, in), ``B`` (out, r) trained, and ``m`` (r,) one at the ``k``
    highest of ``A x + bias``, or of its absolute value, and zero elsewhere: no matrix, unless ``k = r``.

    Ties fall to the lower index. For the backward pass ``m`` and ``m * A x`` (tokens, r) are kept, not ``x``.
    """

    linear_in_x: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    roles: ClassVar[dict[str, str]] = {"B": "B"}
    A: Tensor
    bias: Tensor

    def __init__(self, target: Target, settings: FlyLoRA) -> None:
        super().__init__()
        layer, rank = target.layer, settings.rank
        self.active, self.score, self.detach_input = settings.active, settings.score, settings.detach_input
        self.scale = settings.alpha / rank
        dtype = adapter_dtype(settings.dtype, layer)
        nonzero = max(1, layer.in_features * settings.active // rank)
        rows = sparse_rows(settings.seed, f"flylora.{target.name}", rank, layer.in_features, nonzero)
        self.prove(rows, device=layer.device)
        self.register_buffer("A", (rows / rank).to(layer.device, dtype), persistent=False)
        self.register_buffer("bias", torch.zeros(rank, dtype=torch.float32, device=layer.device))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank, dtype=dtype, device=layer.device))
        self.counts = torch.zeros(rank, dtype=torch.int64)

    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """``B = 0``; ``A`` is the seed's."""
        nn.init.zeros_(self.B)

    def chosen(self, h: Tensor) -> Tensor:
        """The mask of the ``k`` experts of every token (tokens, r), from ``h = A x`` (tokens, r)."""
        scores = h.detach().to(torch.promote_types(h.dtype, torch.float32)) + self.bias
        if self.score == "abs":
            scores = scores.abs()
        best = scores.argsort(dim=-1, descending=True, stable=True)[:, : self.active]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)

    def delta(self, base: Layer) -> Tensor:
        raise RankloomError("FlyLoRA's update depends on the input and is no matrix, unless adapter.active is the rank")

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        inner = x.detach() if self.detach_input else x
        h = base.down(inner, self.A.to(x.dtype if x.is_floating_point() else base.dtype))
        tokens = base.tokens(h)
        chosen = self.chosen(tokens)
        kept = tokens * chosen
        b = self.B.to(h.dtype)
        if isinstance(base, (LinearLayer, Conv1DLayer)) and y.dtype == h.dtype:
            out = torch.addmm(base.tokens(y), kept, b.mT, alpha=self.scale).view(y.shape)
        else:
            kept = (
                kept.view(h.movedim(1, -1).shape).movedim(-1, 1)
                if isinstance(base, Conv2dLayer)
                else kept.view(h.shape)
            )
            out = y + base.up(kept, self.scale * b).to(y.dtype)
        if not (self.training and out.requires_grad):
            return out
        self.counts = self.counts.to(out.device)
        counted: Tensor = _Counted.apply(out, chosen, self.counts, base)
        return counted


class _EveryExpert(FlyLoRAAdapter):
    """``k = r``: nothing is chosen, and ``delta = s * B A`` (LoRA-FA with a sparse ``A``)."""

    linear_in_x: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.B, self.A

    def delta(self, base: Layer) -> Tensor:
        return (self.scale * self.B) @ self.A


class LoadBalance(Schedule):
    """Selection without an auxiliary loss: after every step, ``bias_i += rate * sign(mean(c) - c_i)``.

    ``c_i`` counts how often expert i was chosen since the last step, over all micro-batches and ranks.
    """

    def __init__(self, bindings: list[Binding], rate: float) -> None:
        self.adapters: list[FlyLoRAAdapter] = [binding.adapter for binding in bindings]
        self.rate = rate

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for adapter in self.adapters:
            counts = adapter.counts.to(adapter.bias.device)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            # The mean is a fraction of counts: compared as a multiple of it, nothing is rounded.
            adapter.bias.add_(self.rate * torch.sign(counts.sum() - len(counts) * counts))
            adapter.counts = torch.zeros_like(adapter.counts)


@part("adapter", "flylora")
@dataclass(frozen=True)
class FlyLoRA(AdapterPart):
    """``y = W x + (alpha / r) sum_{i in I(x)} b_i (A x)_i`` over the ``k = active`` experts that ``A x`` itself picks.

    ``A`` is frozen, from ``seed`` and the target's name: ``in k / r`` entries ``N(0, 1) / r`` a row; ``B`` starts at zero.
    ``score="signed"`` picks the highest of ``A x + bias`` (the released training code), ``"abs"`` the largest in size. ``bias``
    is not trained: it moves by ``balance_rate`` a step against experts chosen more often than the mean, and acts on the choice
    only. ``detach_input``: no gradient reaches earlier layers through the adapter, as in the released code. Parameters per
    target: ``r out``, of which ``k out`` act on a token. Cannot be merged or exported unless ``k = r``.

    Raises:
        RecipeError: ``active`` outside 1 .. rank, or a negative ``balance_rate``.
        TargetError: a grouped convolution, whose channels have no projection in common.
    """

    rank: int = 32
    active: int = 8
    alpha: float = 64.0
    score: Score = "signed"
    balance_rate: float = 1e-3
    detach_input: bool = False
    seed: int = 0
    dtype: Dtype = "auto"

    def check(self) -> None:
        if not 1 <= self.active <= self.rank or self.balance_rate < 0:
            raise RecipeError(
                f"FlyLoRA needs 1 <= adapter.active <= adapter.rank and adapter.balance_rate >= 0, got {self.active}, "
                f"{self.rank} and {self.balance_rate}"
            )

    def check_on(self, targets: list[Target]) -> None:
        for target in targets:
            if isinstance(target.layer, Conv2dLayer) and target.layer.grouped:
                raise TargetError(
                    f"{target.name} is a grouped convolution, which FlyLoRA cannot project: targets.exclude it"
                )

    def schedule(self, bindings: list[Binding], total_steps: int | None) -> Schedule | None:
        return LoadBalance(bindings, self.balance_rate) if self.active < self.rank and self.balance_rate else None

    def build(self, target: Target) -> Adapter:
        return (_EveryExpert if self.active == self.rank else FlyLoRAAdapter)(target, self)
