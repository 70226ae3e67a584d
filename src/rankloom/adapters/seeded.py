"""Forms with frozen random tensors that a seed gives back: files hold a hash of them instead."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankloom.adapters.base import Adapter, AdapterPart, Dtype, adapter_dtype
from rankloom.errors import ArtifactError, RecipeError, TargetError
from rankloom.kernels.bank import Bank, StoredBank
from rankloom.kernels.generated import digest
from rankloom.targets import Target

__all__ = [
    "BankedPart",
    "Basis",
    "SeededAdapter",
    "require_dropout",
    "require_rank",
    "require_room",
    "require_seed",
    "stored_banks",
]

Basis = Literal["seeded", "stored"]  # where frozen tensors come from: the seed, or the adapter's file


class SeededAdapter(Adapter):
    """An adapter whose state holds the ``digest`` of its regenerated tensors in place of the tensors.

    Where the tensors come from a file (:class:`StoredBank`), there is nothing to prove and no digest.
    """

    seeded: ClassVar[bool] = True
    digest: Tensor

    def prove(self, *tensors: Tensor, device: torch.device) -> None:
        """Keep the hash of the frozen tensors, or of their hashes."""
        self.register_buffer("digest", digest(*tensors).to(device))

    def prove_corners(self, *corners: tuple[Bank | StoredBank, int, int], device: torch.device) -> None:
        """:meth:`prove` for corners (bank, rows, columns) of generated banks."""
        made = [bank.digest(rows, columns) for bank, rows, columns in corners if isinstance(bank, Bank)]
        if made:
            self.prove(*made, device=device)

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        if "digest" in state and not torch.equal(state["digest"].cpu(), self.digest.cpu()):
            raise ArtifactError(
                "the adapter was trained on other random tensors than its seed gives here: load it with the rankloom "
                "version that wrote it (see its manifest), and export(format='merged') there to move on"
            )


class BankedPart(AdapterPart):
    """Settings of a form whose layers take their frozen tensors from banks that the whole model shares."""

    def banks(self, targets: list[Target]) -> tuple[Bank | StoredBank, ...]:
        """Banks large enough for every target."""
        raise NotImplementedError

    def on_banks(self, target: Target, banks: tuple[Any, ...]) -> Adapter:
        """A target's adapter."""
        raise NotImplementedError

    def build_all(self, targets: list[Target]) -> list[Adapter]:
        banks = self.banks(targets) if targets else ()
        adapters = [self.on_banks(target, banks) for target in targets]
        if stored := [bank.state for bank in banks if isinstance(bank, StoredBank)]:
            adapters[0].stored = nn.ModuleList(stored)  # in the model's state once, for all layers
        return adapters

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


def stored_banks(dtype: Dtype, targets: list[Target], *shapes: tuple[int, int]) -> tuple[StoredBank, ...]:
    """Banks (rows, columns) for a file to fill, as precise as the most precise target's adapter."""
    wide = reduce(torch.promote_types, (adapter_dtype(dtype, target.layer) for target in targets))
    return tuple(StoredBank(*shape, wide, targets[0].layer.device) for shape in shapes)


def require_seed(*banks: Bank | StoredBank) -> None:
    """Raise :class:`RecipeError` where a form would start on tensors that only a file has."""
    if any(isinstance(bank, StoredBank) for bank in banks):
        raise RecipeError(
            "adapter.basis='stored' takes its random tensors from a saved adapter: load one, or set adapter.basis='seeded'"
        )
