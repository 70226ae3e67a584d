"""SoKA (2506.15251): a sum of Kronecker products, or only the weights of its terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankloom.adapters.base import AdapterPart, Binding, Dtype, adapter_dtype
from rankloom.adapters.kronecker import KroneckerAdapter
from rankloom.adapters.patterned import last_match
from rankloom.errors import RecipeError, TargetError
from rankloom.events import Schedule, broadcast
from rankloom.kernels import Terms
from rankloom.layers import Layer
from rankloom.linalg import balanced_sides, energy_rank, recompressed
from rankloom.parts import part
from rankloom.targets import Target

__all__ = ["SoKA", "SoKAAdapter"]


class SoKAAdapter(KroneckerAdapter):
    """``delta = sum_k sigma_k U_k (x) V_k`` with ``U`` (r, m, n), ``V`` (r, p, q), out = m p, in = n q.

    Either the factors train and ``sigma`` is one and not held, or ``sigma`` (r,) trains between frozen factors. Where the
    start is subtracted, ``U0 (x) V0`` leaves ``(U - U0) (x) V + U0 (x) (V - V0)``, formed from what has moved: exactly zero at
    the start.
    """

    roles: ClassVar[dict[str, str]] = {"U": "kronecker", "V": "kronecker", "sigma": "core"}
    U: Tensor
    V: Tensor
    U0: Tensor
    V0: Tensor
    sigma: Tensor
    sigma0: Tensor

    def __init__(self, layer: Layer, rank: int, train: Literal["uv", "sigma"], dtype: torch.dtype) -> None:
        super().__init__()
        m, n = balanced_sides(layer.out_features, layer.in_features)
        shapes = {"U": (rank, m, n), "V": (rank, layer.out_features // m, layer.in_features // n), "sigma": (rank,)}
        self.rank, self.train_uv, self.offset = rank, train == "uv", False
        for name in ("U", "V") if self.train_uv else shapes:
            tensor = torch.zeros(shapes[name], dtype=dtype, device=layer.device)
            if self.train_uv or name == "sigma":
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def subtract_start(self) -> None:
        """Make room for the start: what :meth:`initialized` finds written is subtracted from then on."""
        self.offset = True
        for name, parameter in list(self.named_parameters()):
            self.register_buffer(f"{name}0", torch.zeros_like(parameter))

    @torch.no_grad()
    def initialized(self, base: Layer) -> None:
        if self.offset:
            for name, parameter in self.named_parameters():
                self.get_buffer(f"{name}0").copy_(parameter)

    @torch.no_grad()
    def start(self, left: Tensor, values: Tensor, right: Tensor) -> None:
        """Write ``sum_k values_k left_k (x) right_k``; factors that train take the root of the values each."""
        if self.train_uv:
            root = values.sqrt()[:, None, None]
            self.U.copy_(root * left)
            self.V.copy_(root * right)
        else:
            self.U.copy_(left)
            self.V.copy_(right)
            self.sigma.copy_(values)

    @torch.no_grad()
    def reset(self, base: Layer, generator: torch.Generator) -> None:
        """``V`` (or ``sigma``) at zero, factors normal with as much variance as keeps a term's at ``1 / in``."""
        for factor in (self.U, self.V):
            drawn = torch.randn(factor.shape, generator=generator, dtype=factor.dtype)
            factor.copy_(drawn * factor.shape[2] ** -0.5)
        (self.V if self.train_uv else self.sigma).zero_()

    def terms(self) -> Terms:
        if not self.train_uv:
            sigma = self.sigma - self.sigma0 if self.offset else self.sigma
            return Terms(sigma[:, None, None] * self.U, self.V)
        if not self.offset:
            return Terms(self.U, self.V)
        return Terms(torch.cat([self.U - self.U0, self.U0]), torch.cat([self.V, self.V - self.V0]))

    @torch.no_grad()
    def retruncate(self, energy: float) -> None:
        """Write the update anew as its own leading terms, the fewest with the share ``energy`` of ``||delta||_F^2``.

        Of an update with an offset there may be up to 2r: the first r train from then on, the others are frozen in place of
        the start. Terms beyond the kept ones are zero on both sides, where no gradient reaches them. An update of zero stays.
        """
        left, right, _ = self.terms()
        u, s, v = recompressed(left.double(), right.double())
        if not s.any():
            return
        kept = int(broadcast(torch.tensor(energy_rank(s, energy), device=s.device)))
        root = s[:kept].sqrt()[:, None, None]
        factors = {"U": (broadcast(root * u[:kept]), -1), "V": (broadcast(root * v[:kept]), 1)}
        for name, (terms, sign) in factors.items():
            _fill(self.get_parameter(name), terms[: self.rank])
            if self.offset:
                _fill(self.get_buffer(f"{name}0"), sign * terms[self.rank :])


def _fill(held: Tensor, terms: Tensor) -> None:
    held.zero_()
    held[: len(terms)] = terms


class Retruncation(Schedule):
    """Every ``interval`` steps each target's update is written anew (:meth:`SoKAAdapter.retruncate`); the optimizer's moments,
    which are of the terms that were, are dropped."""

    def __init__(self, bindings: list[Binding], every: int, energy: float) -> None:
        self.bindings, self.interval, self.energy = bindings, every, energy
        self.optimizer: Optimizer | None = None

    def attached(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def on_interval(self, step: int) -> None:
        assert self.optimizer is not None
        for binding in self.bindings:
            binding.adapter.retruncate(self.energy)
            for parameter in binding.adapter.parameters():
                self.optimizer.state.pop(parameter, None)


@part("adapter", "soka")
@dataclass(frozen=True)
class SoKA(AdapterPart):
    """``y = x (W + sum_{k <= r} sigma_k U_k (x) V_k)^T + b``; a term has rank up to ``min(m, n) min(p, q)``.

    The factors' sides are the divisors of out and in with the fewest parameters, see
    :func:`rankloom.linalg.balanced_sides`; between primes that is a column by a row, and the form is LoRA without its scale.
    ``train="uv"``: the factors; ``"sigma"``: one weight a term, between frozen factors. ``rank_pattern`` overrides the number
    of terms for the targets a pattern matches (last match wins). Parameters per target: ``r (m n + p q)``, or ``r``.

    ``truncate_every``: after every so many steps the update is decomposed anew into its own Kronecker terms, and those that
    the share ``truncate_energy`` of its squared norm can do without are dropped for good; 0 for never. That moves the function
    by what is dropped, and ranks only fall.

    Raises:
        RecipeError: re-truncation of terms whose factors are frozen.
        TargetError: more terms than ``min(m n, p q)``, with which the sum is any matrix.
    """

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"train": "sigma"})

    rank: int = 8
    train: Literal["uv", "sigma"] = "uv"
    truncate_every: int = 0
    truncate_energy: float = 0.999
    dtype: Dtype = "auto"
    rank_pattern: dict[str, int] = field(default_factory=dict)

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {"kronecker terms"}

    def check(self) -> None:
        if min([self.rank, *self.rank_pattern.values()]) < 1:
            raise RecipeError(f"adapter rank must be at least 1, got {self.rank} with rank_pattern {self.rank_pattern}")
        if self.truncate_every < 0 or not 0 < self.truncate_energy <= 1:
            raise RecipeError(
                f"adapter.truncate_every is a number of steps (0: never) and adapter.truncate_energy a share in (0, 1], got "
                f"{self.truncate_every} and {self.truncate_energy}"
            )
        if self.truncate_every and self.train == "sigma":
            raise RecipeError(
                "re-truncation writes new factors, which train='sigma' freezes: set adapter.train to 'uv'"
            )

    def rank_of(self, target: str) -> int:
        """The number of terms for a target name."""
        return last_match(self.rank_pattern, target, self.rank)

    def check_on(self, targets: list[Target]) -> None:
        for target in targets:
            m, n = balanced_sides(*target.shape)
            most, rank = min(m * n, target.shape[0] * target.shape[1] // (m * n)), self.rank_of(target.name)
            if rank > most:
                raise TargetError(
                    f"{rank} Kronecker terms are more than {target.name} {target.shape} has, {most} of {m} x {n}: lower "
                    f"adapter.rank to at most {most}, or set adapter.rank_pattern for this module"
                )

    def schedule(self, bindings: list[Binding], total_steps: int | None) -> Schedule | None:
        return Retruncation(bindings, self.truncate_every, self.truncate_energy) if self.truncate_every else None

    def build(self, target: Target) -> SoKAAdapter:
        dtype = adapter_dtype(self.dtype, target.layer)
        return SoKAAdapter(target.layer, self.rank_of(target.name), self.train, dtype)
