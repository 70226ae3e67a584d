"""Starts from the singular value decomposition of the weight: PiSSA, MiLoRA, and the subspaces of LoRA-XS, SVFit and SVF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from rankloom.adapters import LowRankAdapter
from rankloom.errors import RecipeError
from rankloom.init.base import InitContext, InitPart
from rankloom.linalg import leading_svd, truncated_svd
from rankloom.parts import part

__all__ = ["WeightSVD", "WeightSubspace"]


@part("init", "weight-svd")
@dataclass(frozen=True)
class WeightSVD(InitPart):
    """PiSSA (2404.02948) and MiLoRA (2406.09044): with ``W = U diag(S) V^T``,

    ``B0 = U_r diag(sqrt(S_r / s))``, ``A0 = diag(sqrt(S_r / s)) V_r^T``, and ``s B0 A0`` is subtracted, so what trains are
    the ``triplets="principal"`` (largest) or ``"minor"`` (smallest) singular components of the weight itself.

    With a core, ``B0 = U_r``, ``A0 = V_r^T`` and the core is ``S_r / s``. Principal triplets come from
    :func:`rankloom.linalg.leading_svd`: exact up to a smaller side of 2048, beyond it iterated until the captured energy is
    within ``tolerance`` of the best; the report has the lowest share. Minor ones take the full decomposition.
    """

    triplets: Literal["principal", "minor"] = "principal"
    tolerance: float = 1e-3

    evidence: ClassVar[Literal["none", "weight", "gradient", "activations"]] = "weight"
    offset: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"factors"})

    def check(self) -> None:
        if not 0 < self.tolerance < 1:
            raise RecipeError(f"init tolerance is a share of energy in (0, 1), got {self.tolerance}")

    def apply(self, context: InitContext) -> None:
        lowest = 1.0
        for binding in context.bindings:
            adapter: LowRankAdapter = binding.adapter
            weight = binding.layer.weight().to(torch.promote_types(binding.layer.dtype, torch.float32))
            if self.triplets == "minor":
                u, s, v = (t[..., -adapter.rank :] for t in truncated_svd(weight, min(weight.shape)))
            else:
                u, s, v, captured = leading_svd(
                    weight, adapter.rank, tolerance=self.tolerance, generator=context.generator(binding)
                )
                lowest = min(lowest, captured)
            adapter.start(u, s / adapter.scale, v.mT)
        context.report.update(captured=lowest)


@part("init", "weight-subspace")
@dataclass(frozen=True)
class WeightSubspace(InitPart):
    """LoRA-XS (2405.17604): ``A = diag(S_r) Q_r^T``, ``B = P_r`` from ``W = P diag(S) Q^T``, and a core near zero.

    The core is ``N(0, std^2)``; where ``B`` is trained, or ``A`` alone, that factor is (and a core starts at one). Nothing is
    subtracted: at ``std > 0`` the function moves by that little, as published.

    Between these factors a diagonal core moves singular values (SVFit, 2409.05926; SVF, 2501.06252), relatively:
    ``S_i (1 + e_i)``. With ``values=False`` the values stay out of ``A = Q_r^T`` and it moves them absolutely: ``S_i + e_i``.
    """

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"values": False})

    std: float = 1e-5
    values: bool = True

    evidence: ClassVar[Literal["none", "weight", "gradient", "activations"]] = "weight"

    @property
    def moves_output(self) -> bool:
        return self.std > 0

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | ({"singular values in a factor"} if self.values else set())

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"factors"})

    def check(self) -> None:
        if self.std < 0:
            raise RecipeError(f"init std must not be negative, got {self.std}")

    def apply(self, context: InitContext) -> None:
        for binding in context.bindings:
            adapter: LowRankAdapter = binding.adapter
            weight = binding.layer.weight().to(torch.promote_types(binding.layer.dtype, torch.float32))
            generator = context.generator(binding)
            p, s, q, _ = leading_svd(weight, adapter.rank, generator=generator)
            adapter.start(p, torch.zeros_like(s), s[:, None] * q.mT if self.values else q.mT)
            small = next(getattr(adapter, name) for name in "BERA" if name in adapter.trained())
            small += self.std * torch.randn(small.shape, generator=generator, dtype=small.dtype).to(small.device)
