"""Forms with frozen random tensors that a seed gives back: files hold a hash of them instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from rankloom.adapters.base import Adapter, AdapterPart
from rankloom.errors import ArtifactError, RecipeError, TargetError
from rankloom.kernels.bank import Bank
from rankloom.kernels.generated import digest
from rankloom.targets import Target

__all__ = ["BankedPart", "SeededAdapter", "require_dropout", "require_rank", "require_room"]


class SeededAdapter(Adapter):
    """An adapter whose state holds the ``digest`` of its regenerated tensors in place of the tensors."""

    seeded: ClassVar[bool] = True
    digest: Tensor

    def prove(self, *tensors: Tensor, device: torch.device) -> None:
        """Keep the hash of the frozen tensors, or of their hashes."""
        self.register_buffer("digest", digest(*tensors).to(device))

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        if not torch.equal(state["digest"].cpu(), self.digest.cpu()):
            raise ArtifactError(
                "the adapter was trained on other random tensors than its seed gives here: load it with the rankloom "
                "version that wrote it (see its manifest), and export(format='merged') there to move on"
            )


class BankedPart(AdapterPart):
    """Settings of a form whose layers take their frozen tensors from banks that the whole model shares."""

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"own start"})

    def banks(self, targets: list[Target]) -> tuple[Bank, ...]:
        """Banks large enough for every target."""
        raise NotImplementedError

    def on_banks(self, target: Target, banks: tuple[Bank, ...]) -> Adapter:
        """A target's adapter."""
        raise NotImplementedError

    def build_all(self, targets: list[Target]) -> list[Adapter]:
        banks = self.banks(targets) if targets else ()
        return [self.on_banks(target, banks) for target in targets]

    def build(self, target: Target) -> Adapter:
        return self.build_all([target])[0]


def require_rank(rank: int, targets: list[Target]) -> None:
    """Raise :class:`TargetError` where a rank is above what a target has room for."""
    for target in targets:
        if rank > min(target.shape):
            raise TargetError(
                f"rank {rank} is above min(out, in) = {min(target.shape)} of {target.name} {target.shape}: lower adapter.rank "
                f"to at most {min(target.shape)}"
            )


def require_dropout(rate: float) -> None:
    """Raise :class:`RecipeError` where a dropout rate is none."""
    if not 0 <= rate < 1:
        raise RecipeError(f"adapter dropout must be in [0, 1), got {rate}")


def require_room(coefficients: int, targets: list[Target]) -> None:
    """Raise :class:`TargetError` where there are more coefficients than entries of a target's matrix."""
    for target in targets:
        entries = target.shape[0] * target.shape[1]
        if coefficients > entries:
            raise TargetError(
                f"{coefficients} coefficients are more than the {entries} entries of {target.name} {target.shape}: lower "
                f"adapter.coefficients or targets.exclude it"
            )
