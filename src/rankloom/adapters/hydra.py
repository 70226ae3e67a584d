"""Hydra (2309.06922): a low-rank head on the layer's input beside one on its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from rankloom.adapters.base import Adapter, AdapterPart, Dtype, adapter_dtype
from rankloom.adapters.factored import frozen_operands
from rankloom.errors import RecipeError, TargetError
from rankloom.kernels import Linear, lowrank_linears
from rankloom.layers import EmbeddingLayer, Layer
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["Hydra", "HydraAdapter"]


class HydraAdapter(Adapter):
    """``delta = s (B A + B_s A_s W)`` with ``A`` (r, in), ``B`` (out, r), ``A_s`` (r_s, out), ``B_s`` (out, r_s).

    That is one low-rank product with rows ``[A; A_s W]``. In training ``A_s W`` is formed once a step and both heads run
    as one kernel, which keeps no output for the gradient of ``A_s``; without gradients, or on few tokens, ``A_s`` reads the
    layer's output.

    With biases ``c_A`` (r,), ``c_B`` (out,), ``c_A_s`` (r_s,) and ``c_B_s`` (out,) in the heads, the layer's bias ``b`` moves by
    ``s (B c_A + c_B + B_s (A_s b + c_A_s) + c_B_s)``.
    """

    needs_base: ClassVar[Literal["never", "init", "merge", "every_step"]] = "merge"
    shares_input: ClassVar[bool] = True
    roles: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("A", "A_s"), "A"),
        **dict.fromkeys(("B", "B_s"), "B"),
        **dict.fromkeys(("c_A", "c_B", "c_A_s", "c_B_s"), "bias"),
    }
    A: Tensor
    B: Tensor
    A_s: Tensor
    B_s: Tensor
    c_A: Tensor
    c_B: Tensor
    c_A_s: Tensor
    c_B_s: Tensor

    def __init__(
        self, layer: Layer, rank: int, sequential: int, scale: float, dtype: torch.dtype, *, biases: bool = False
    ) -> None:
        super().__init__()
        self.scale, self.biases = scale, biases
        fan_out, fan_in = layer.out_features, layer.in_features
        shapes = {"A": (rank, fan_in), "B": (fan_out, rank), "A_s": (sequential, fan_out), "B_s": (fan_out, sequential)}
        vectors = {f"c_{name}": shape[:1] for name, shape in shapes.items()} if biases else {}
        for name, shape in (shapes | vectors).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype, device=layer.device)))

    @torch.no_grad()
    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """``A, A_s ~ U(-1/sqrt(n), 1/sqrt(n))`` for n inputs (``A`` normal on a look-up table), all else zero."""
        for a in (self.A, self.A_s):
            bound = a.shape[1] ** -0.5
            start = torch.empty(a.shape, dtype=a.dtype).uniform_(-bound, bound, generator=generator)
            if a is self.A and isinstance(base, EmbeddingLayer):
                start.normal_(generator=generator)
            a.copy_(start)
        for name, parameter in self.named_parameters():
            if name not in ("A", "A_s"):
                parameter.zero_()

    def over(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, B_s]`` and ``[A; A_s W]`` for the frozen ``W`` (out, in), differentiable."""
        through = self.A_s.to(weight.dtype) @ weight
        return torch.cat([self.B, self.B_s], 1), torch.cat([self.A, through.to(self.A.dtype)])

    def factors_on(self, base: Layer) -> tuple[Tensor, Tensor]:
        weight = base.weight()
        columns, rows = self.over(weight.to(torch.promote_types(weight.dtype, self.A.dtype)))
        return self.scale * columns, rows

    def delta(self, base: Layer) -> Tensor:
        columns, rows = self.factors_on(base)
        return columns @ rows

    def bias_delta(self, base: Layer) -> Tensor | None:
        if not self.biases:
            return None
        bias = cast(Tensor, base.bias())
        below = self.A_s @ bias.to(self.A_s.dtype) + self.c_A_s
        return self.scale * (self.B @ self.c_A + self.c_B + self.B_s @ below + self.c_B_s)

    def operands(self, x: Tensor, base: Layer) -> Any:
        """What :meth:`together` takes of this layer for this input; None where the heads run apart."""
        frozen = frozen_operands(x, base) if torch.is_grad_enabled() else None
        # One kernel passes over W twice more, the heads apart over the output some eight times.
        if frozen is None or 4 * x.numel() < base.in_features**2:
            return None
        columns, rows = self.over(frozen[0])
        return Linear(*frozen, rows, columns, self.scale), self.bias_delta(base)

    @classmethod
    def together(cls, x: Tensor, operands: Sequence[Any]) -> tuple[Tensor, ...]:
        """The outputs of several adapted linears on one input, in one kernel."""
        linears, shifts = zip(*operands, strict=True)
        outs = zip(lowrank_linears(x, linears), shifts, strict=True)
        return tuple(out if shift is None else out + shift.to(out.dtype) for out, shift in outs)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if (operands := self.operands(x, base)) is not None:
            return self.together(x, [operands])[0]
        y, bias, shift = base(x), base.bias(), self.bias_delta(base)
        down = self.A_s.to(y.dtype)
        hidden = base.up(y, down)
        if bias is not None:  # the head reads x W^T alone, so that the update is a matrix
            hidden = hidden - base.broadcast(down @ bias.to(y.dtype))
        beside = base.lowrank(x, self.A.to(y.dtype), (self.scale * self.B).to(y.dtype))
        out = y + beside.to(y.dtype) + base.up(hidden, (self.scale * self.B_s).to(y.dtype))
        return out if shift is None else out + base.broadcast(shift.to(y.dtype))


@part("adapter", "hydra")
@dataclass(frozen=True)
class Hydra(AdapterPart):
    """``y = z + s B A x + s B_s A_s (z - b)`` with the frozen layer's ``z = x W^T + b`` and ``s = alpha / r``.

    ``sequential_rank``: the rank of the head on the output, ``rank`` where None. Own start: ``A`` and ``A_s`` random, ``B``
    and ``B_s`` zero. Parameters per target: ``r (in + out) + 2 r_s out``.

    ``biases``: ``y = z + s (B (A x + c_A) + c_B) + s (B_s (A_s z + c_A_s) + c_B_s)``, all biases zero at the start: ``r + r_s +
    2 out`` more parameters. They are merged into the layer's own bias, which every target has to have.
    """

    rank: int = 4
    sequential_rank: int | None = None
    alpha: float = 4.0
    biases: bool = False
    dtype: Dtype = "auto"

    @property
    def ranks(self) -> tuple[int, int]:
        """Of the head on the input and of the one on the output."""
        return self.rank, self.rank if self.sequential_rank is None else self.sequential_rank

    def check(self) -> None:
        if min(self.ranks) < 1:
            raise RecipeError(f"adapter.rank and adapter.sequential_rank must be at least 1, got {self.ranks}")

    def check_on(self, targets: list[Target]) -> None:
        for target in targets:
            if self.rank > (limit := min(target.shape)) or max(self.ranks) > (limit := target.shape[0]):
                raise TargetError(
                    f"ranks {self.ranks} are above {limit}, the most {target.name} {target.shape} has use for: lower "
                    f"adapter.rank or adapter.sequential_rank, or exclude this module"
                )
            if self.biases and target.layer.bias() is None:
                raise TargetError(
                    f"adapter.biases are merged into the layer's bias, and {target.name} has none: set adapter.biases to false, "
                    f"or exclude this module"
                )

    def build(self, target: Target) -> HydraAdapter:
        dtype = adapter_dtype(self.dtype, target.layer)
        return HydraAdapter(target.layer, *self.ranks, self.alpha / self.rank, dtype, biases=self.biases)
