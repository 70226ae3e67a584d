"""Sparse GIN attention (2501.02393): a graph network on every decoder layer, over the layer's own strong attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.adapters.base import Binding, Dtype, adapter_dtype
from rankloom.adapters.layer import LayerAdapter, LayerAdapterPart
from rankloom.adapters.seeded import require_dropout
from rankloom.attended import Attention
from rankloom.blocks import Block
from rankloom.errors import RecipeError
from rankloom.events import Schedule
from rankloom.kernels.generated import uniform
from rankloom.kernels.graph import Edges, message_passing
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["DropoutMasks", "GINAttention", "GINAttentionAdapter"]

LAST_GAIN = 0.5  # of the deepest layer, where the paper's start is asked for
NORM_EPS = 1e-6


class GINAttentionAdapter(LayerAdapter):
    """``f(h) = gain * RMSNorm(W_out dropout(act(u)))`` with ``u = W_2 act(W_1 m) + m``, ``m_i = eps x_i + sum_j w_ij x_j``,
    ``x = W_in h``, and ``act`` one PReLU with a single trained ``slope``.

    Shapes: ``W_in`` (d', d), ``W_1`` (c d', d'), ``W_2`` (d', c d'), ``W_out`` (d, d'), each with its bias, ``norm`` (d,);
    ``eps``, ``slope`` and ``gain`` are scalars, ``heads`` (H,) is there where the aggregate is learned. ``w`` is made by
    :func:`rankloom.kernels.graph.message_passing`.
    """

    roles: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("W_in", "W_1", "W_2", "W_out"), "weight"),
        **dict.fromkeys(("b_in", "b_1", "b_2", "b_out"), "bias"),
        **dict.fromkeys(("norm", "eps", "slope", "gain", "heads"), "scale"),
    }

    def __init__(self, target: Target, settings: GINAttention) -> None:
        super().__init__()
        block: Any = target.layer
        self.settings, self.name, self.step = settings, target.name, 0
        self.edges = Edges(
            settings.sharpness,
            settings.threshold,
            settings.cutoff,
            mean=settings.aggregate == "mean",
            senders=settings.edges,
        )
        wide, hidden, inner = block.features, settings.hidden, settings.multiplier * settings.hidden
        like: dict[str, Any] = {"dtype": adapter_dtype(settings.dtype, target.layer), "device": block.device}
        for name, fan_in, fan_out in (
            ("in", wide, hidden),
            ("1", hidden, inner),
            ("2", inner, hidden),
            ("out", hidden, wide),
        ):
            self.register_parameter(f"W_{name}", nn.Parameter(torch.empty(fan_out, fan_in, **like)))
            self.register_parameter(f"b_{name}", nn.Parameter(torch.empty(fan_out, **like)))
        self.norm = nn.Parameter(torch.empty(wide, **like)) if settings.norm else None
        self.heads = nn.Parameter(torch.empty(block.heads, **like)) if settings.aggregate == "learned" else None
        self.eps, self.slope, self.gain = (nn.Parameter(torch.empty((), **like)) for _ in range(3))

    def reset(self, base: Block, generator: torch.Generator) -> None:
        """Linears as ``nn.Linear``, ``U(-1/sqrt(in), 1/sqrt(in))``; ``norm`` and ``heads`` 1, ``slope`` 1/4, ``eps`` 0, and
        ``gain`` 0, or ``depth / 2`` in the paper's start."""
        for name in ("in", "1", "2", "out"):
            weight = self.get_parameter(f"W_{name}")
            bound = weight.shape[1] ** -0.5
            for tensor in (weight, self.get_parameter(f"b_{name}")):
                drawn = torch.rand(
                    tensor.shape, generator=generator, dtype=torch.promote_types(tensor.dtype, torch.float32)
                )
                tensor.copy_((2 * drawn - 1) * bound)
        for ones in (self.norm, self.heads):
            if ones is not None:
                ones.fill_(1)
        self.slope.fill_(0.25)
        self.eps.zero_()
        self.gain.fill_(LAST_GAIN * base.depth if self.settings.start == "paper" else 0)

    def forward(self, h: Tensor, attention: Attention) -> Tensor:
        x = attention.of_keys(self._linear("in", h))
        query, key = attention.query, attention.key
        if self.settings.detach_adjacency:
            query, key = query.detach(), key.detach()
        mask, scale = attention.mask, attention.scale
        m = message_passing(x, query, key, self.eps, mask, scale=scale, edges=self.edges, heads=self.heads)
        u = self._act(self._linear("2", self._act(self._linear("1", m))) + m)
        z = self._linear("out", self._dropout(u))
        if self.norm is not None:
            z = F.rms_norm(z.to(self.norm.dtype), self.norm.shape, self.norm, NORM_EPS)
        return (self.gain * z).to(h.dtype)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.get_parameter(f"W_{name}").to(x.dtype), self.get_parameter(f"b_{name}").to(x.dtype))

    def _act(self, u: Tensor) -> Tensor:
        return F.prelu(u, self.slope.to(u.dtype))

    def _dropout(self, u: Tensor) -> Tensor:
        rate = self.settings.dropout
        if not (self.training and rate):
            return u
        stream = f"gin-attention.{self.name}.{self.step}"
        kept = uniform(self.settings.seed, stream, 0, u.numel(), u.device).view(u.shape) >= rate
        return u * kept / (1 - rate)


class DropoutMasks(Schedule):
    """Which optimizer step's mask is drawn: recomputed and resumed forward passes find theirs again."""

    def __init__(self, bindings: list[Binding]) -> None:
        self.bindings = bindings

    def before_forward(self, step: int) -> None:
        for binding in self.bindings:
            binding.adapter.step = step


@part("adapter", "gin-attention")
@dataclass(frozen=True)
class GINAttention(LayerAdapterPart):
    """``h + gain * RMSNorm(W_out GIN(W_in h))`` between attention and MLP, on the graph of strong attention.

    An edge from token j to i >= j weighs ``w_ij = sigmoid(sharpness (a_ij - threshold))`` where that is above ``cutoff``, else
    nothing; ``a`` is the sum of all heads' probabilities, at most 1 (``aggregate="mean"``: their mean; ``"learned"``: their sum
    under one trained weight a head, all 1 at the start). ``edges="past"`` has no loops, j < i only, so that a token's own state
    counts by ``eps`` alone; ``"self"`` keeps i = j only, which is what the released code computes. ``detach_adjacency``: no
    gradient through ``w`` to the attention below. ``norm=False`` leaves the RMSNorm out. ``dropout`` masks are a function of
    ``seed``, the layer's name, the optimizer step and the place in the batch: micro-batches of one step share them, recomputed
    and resumed passes repeat them. ``start="identity"`` has ``gain = 0``, so step 0 leaves every bit; ``"paper"`` has it grow
    linearly from 0 at the first layer to 0.5 at the last, which moves the function.

    Parameters per layer of width d: ``2 d d' + 2 c d'^2 + 2 d + (c + 2) d' + 3`` with ``d' = hidden``, ``c = multiplier``, and
    one a head where the aggregate is learned.
    Decoding keeps ``W_in h`` of every token in the key-value cache, ``d'`` numbers a layer and token. Composes with every
    storage of the base, gradient checkpointing and every optimizer that wants no factors. Excludes merging, export, ranks over
    time, static caches, and attention other than eager and SDPA.

    Raises:
        RecipeError: sizes below 1, a ``sharpness`` that is not positive, ``cutoff`` or ``dropout`` outside [0, 1).
        TargetError: a model without pre-norm decoder layers that are known.
        AttentionError: while running, a key-value cache or masks that cannot be followed.
    """

    hidden: int = 155
    multiplier: int = 1
    sharpness: float = 10.0
    threshold: float = 0.1
    cutoff: float = 0.6
    aggregate: Literal["sum", "mean", "learned"] = "sum"
    edges: Literal["causal", "past", "self"] = "causal"
    detach_adjacency: bool = True
    norm: bool = True
    dropout: float = 0.1
    start: Literal["identity", "paper"] = "identity"
    seed: int = 0
    dtype: Dtype = "auto"

    def check(self) -> None:
        require_dropout(self.dropout)
        if min(self.hidden, self.multiplier) < 1 or self.sharpness <= 0 or not 0 <= self.cutoff < 1:
            raise RecipeError(
                f"GIN attention needs adapter.hidden and adapter.multiplier >= 1, adapter.sharpness > 0 and 0 <= "
                f"adapter.cutoff < 1, got {self.hidden}, {self.multiplier}, {self.sharpness} and {self.cutoff}"
            )

    def schedule(self, bindings: list[Binding], total_steps: int | None) -> Schedule | None:
        return DropoutMasks(bindings) if self.dropout else None

    def build(self, target: Target) -> GINAttentionAdapter:
        return GINAttentionAdapter(target, self)
