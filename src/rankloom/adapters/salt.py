"""SALT (2503.16055): the top singular values scaled and shifted, a low-rank matrix among the other singular vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rankloom.adapters.base import AdapterPart, Binding, Dtype, adapter_dtype
from rankloom.adapters.factored import FactoredAdapter
from rankloom.errors import RecipeError, TargetError
from rankloom.events import Schedule
from rankloom.layers import Layer
from rankloom.linalg import truncated_svd
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["SALT", "SALTAdapter"]

Clamp = Literal["none", "diag", "official"]
Start = Literal["identity", "paper"]


class SALTAdapter(FactoredAdapter):
    """``delta = U1 diag(gain * s1 + shift) V1^T + (U2 X)(Y V2^T)`` in the frozen basis of ``W = U diag(sigma) V^T``.

    ``gain`` and ``shift`` (r,) move the r leading values to ``s1 (1 + gain) + shift``, ``X`` (k - r, q) and ``Y`` (q, k - r)
    act among the other k - r directions, k = min(out, in). ``U`` (out, k), ``sigma`` (k,) and ``V`` (k, in) are frozen buffers.

    ``clamp="diag"`` keeps the leading values at zero or above. ``"official"`` does so to every entry of the block
    ``diag(s2) + X Y``, off the diagonal too, as the released code: the update then has rank k.
    """

    needs_base: ClassVar[Literal["never", "init", "merge", "every_step"]] = "init"
    roles: ClassVar[dict[str, str]] = {"gain": "core", "shift": "core", "X": "B", "Y": "A"}
    gain: Tensor
    shift: Tensor
    X: Tensor
    Y: Tensor
    U: Tensor
    sigma: Tensor
    V: Tensor

    def __init__(self, layer: Layer, rank: int, inner: int, clamp: Clamp, start: Start, dtype: torch.dtype) -> None:
        super().__init__()
        self.rank, self.clamp, self.start = rank, clamp, start
        size = min(layer.out_features, layer.in_features)
        shapes = {"gain": (rank,), "shift": (rank,), "X": (size - rank, inner), "Y": (inner, size - rank)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype, device=layer.device)))
        frozen = {"U": (layer.out_features, size), "sigma": (size,), "V": (size, layer.in_features)}
        for name, shape in frozen.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=layer.device))

    @torch.no_grad()
    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """The weight's singular value decomposition; ``gain``, ``shift`` and ``Y`` at zero, ``X ~ N(0, 0.01^2)``, and so
        ``Y`` in the paper's start."""
        u, s, v = truncated_svd(base.weight(), len(self.sigma))
        self.U.copy_(u)
        self.sigma.copy_(s)
        self.V.copy_(v.mT)
        for parameter in (self.gain, self.shift, self.Y):
            parameter.zero_()
        for factor in (self.X, self.Y) if self.start == "paper" else (self.X,):
            factor.copy_(0.01 * torch.randn(factor.shape, generator=generator, dtype=factor.dtype))

    def moved(self) -> Tensor:
        """How far the leading singular values are from where they were (r,)."""
        leading = self.sigma[: self.rank]
        step = self.gain * leading + self.shift
        return (
            step if self.clamp == "none" else torch.maximum(step, -leading)
        )  # relu(s + d) - s, zero to the bit at d = 0

    def effective(self) -> tuple[Tensor, Tensor]:
        first, others = self.U[:, : self.rank] * self.moved(), self.U[:, self.rank :]
        if self.clamp == "official":
            block = torch.maximum(self.X @ self.Y, -torch.diag(self.sigma[self.rank :]))
            return torch.cat([first, others @ block], 1), self.V
        rows = torch.cat([self.V[: self.rank], self.Y @ self.V[self.rank :]])
        # From the left: products with a few rows run several times as fast as those with a few columns. Contiguous: or else
        # the gradient's product has a few columns.
        return torch.cat([first, (self.X.mT.contiguous() @ others.mT).mT], 1), rows

    def size(self) -> Tensor:
        """``||moved||_2 + ||X Y||_F``, the released code's regulariser; from Gram matrices, without forming ``X Y``."""
        inner = (self.X.mT @ self.X) * (self.Y @ self.Y.mT)
        squares = torch.stack([self.moved().square().sum(), inner.sum().clamp_min(0)])
        # A norm has no gradient at zero, where both start: the smallest normal number makes it zero there.
        return (squares + torch.finfo(squares.dtype).tiny).sqrt().sum()


class _Penalty(Schedule):
    """``weight * sum of sizes`` beside the task's loss."""

    def __init__(self, bindings: list[Binding], weight: float) -> None:
        self.bindings, self.weight = bindings, weight

    def extra_loss(self, step: int) -> Tensor:
        return self.weight * torch.stack([binding.adapter.size() for binding in self.bindings]).sum()


@part("adapter", "salt")
@dataclass(frozen=True)
class SALT(AdapterPart):
    """``W = U blockdiag(diag(s1 (1 + gain) + shift), diag(s2) + X Y) V^T`` on the singular vectors of ``W`` (out, in).

    ``rank``: how many leading values are scaled and shifted; ``lora_rank``: q, of the matrix among the other directions.
    ``clamp``: which entries are kept from falling below zero (``none``, ``diag``, ``official``). ``penalty`` weighs ``||s1' -
    s1||_2 + ||X Y||_F`` in the loss. Own start: exactly the pretrained weight (``Y = 0``), or, as published, with ``X`` and
    ``Y`` both ``N(0, 0.01^2)`` (``start="paper"``), which moves the function. Parameters per target: ``2 r + 2 (k - r) q``, k
    = min(out, in); ``k (in + out + 1)`` frozen numbers are stored beside.
    """

    rank: int = 8
    lora_rank: int = 4
    clamp: Clamp = "none"
    penalty: float = 0.0
    start: Start = "identity"
    dtype: Dtype = "auto"

    def check(self) -> None:
        if self.rank < 0 or self.lora_rank < 1:
            raise RecipeError(
                f"SALT needs adapter.rank >= 0 and adapter.lora_rank >= 1, got {self.rank}, {self.lora_rank}"
            )
        if self.penalty < 0:
            raise RecipeError(f"adapter penalty must not be negative, got {self.penalty}")

    def check_on(self, targets: list[Target]) -> None:
        for target in targets:
            if self.rank > (limit := min(target.shape)):
                raise TargetError(
                    f"adapter.rank {self.rank} is above the {limit} singular values of {target.name} {target.shape}: lower it "
                    f"to at most {limit}, or exclude this module"
                )

    def schedule(self, bindings: list[Binding], total_steps: int | None) -> Schedule | None:
        return _Penalty(bindings, self.penalty) if self.penalty else None

    def build(self, target: Target) -> SALTAdapter:
        dtype = adapter_dtype(self.dtype, target.layer)
        return SALTAdapter(target.layer, self.rank, self.lora_rank, self.clamp, self.start, dtype)
