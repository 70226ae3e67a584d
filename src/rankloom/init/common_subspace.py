"""CoRA's start (2409.02119): ``B`` spans the output subspace that related models have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from rankloom.adapters import LowRankAdapter
from rankloom.init.base import InitContext, InitPart
from rankloom.init.reference import Reference
from rankloom.linalg import leading_svd
from rankloom.parts import part

__all__ = ["CommonSubspace"]


@part("init", "common-subspace")
@dataclass(frozen=True)
class CommonSubspace(InitPart):
    """CoRA: ``B`` is the r leading left singular vectors of ``[W_1 W_2 ... W_M]`` (out, M in), ``A = 0``; a core starts at one.

    These are the leading eigenvectors of ``sum_m W_m W_m^T``: the order of the models and rotations of their inputs do not
    matter. ``references``: the safetensors files or folders of the M models; none for the base's own weight alone. How the
    paper extracts the basis is not published in detail: this is a reconstruction from its abstract.
    """

    references: tuple[str, ...] = ()

    evidence: ClassVar[Literal["none", "weight", "gradient", "activations"]] = "weight"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"trained A"})

    def apply(self, context: InitContext) -> None:
        others = [
            Reference(Path(path), "init.references to models of the base's architecture") for path in self.references
        ]
        for binding in context.bindings:
            adapter: LowRankAdapter = binding.adapter
            wide = torch.promote_types(binding.layer.dtype, torch.float32)
            weights = [other.matrix(binding) for other in others] or [binding.layer.weight()]
            beside = torch.cat([weight.to(wide) for weight in weights], 1)
            basis, _, _, _ = leading_svd(beside, adapter.rank, generator=context.generator(binding))
            adapter.write(basis, torch.zeros_like(adapter.A), torch.ones(adapter.rank))
