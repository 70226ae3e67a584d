"""Banks of frozen random rows that the layers of a model share: regenerated from a seed, or as a file gave them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankloom.kernels.generated import digest, normal, signs, uniform

__all__ = ["Bank", "Entries", "StoredBank"]

Entries = Literal["uniform", "normal", "ternary"]

STRIDE = 1 << 40  # numbers between the beginnings of two rows: no row is longer
PIECE = 1 << 20  # numbers at a time, where a bank is gone through without being kept


class Bank:
    """A matrix (rows, columns) of independent numbers of mean 0 and variance 1; layers take corners of it.

    Entry (i, j) depends on seed, stream, i and j alone: whatever else is adapted, and however large the bank is, a layer has
    the same corner. ``uniform`` is on ``[-sqrt 3, sqrt 3)``; ``ternary`` has entries other than 0 with probability
    ``density``. Made in float32 when first read, once per device, unless ``kept`` is false: then every reading makes it anew.
    """

    def __init__(
        self,
        seed: int,
        stream: str,
        rows: int,
        columns: int,
        entries: Entries = "uniform",
        *,
        density: float = 1.0,
        kept: bool = True,
    ) -> None:
        self.seed, self.stream, self.shape = seed, stream, (rows, columns)
        self.entries, self.density, self.kept = entries, density, kept
        self._held: dict[torch.device, Tensor] = {}
        self._digests: dict[tuple[int, int], Tensor] = {}

    def __deepcopy__(self, memo: Any) -> Bank:
        return self  # frozen: copies of a model share it as its layers do

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}  # pickled with a model, it stays a seed

    def row(self, index: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
        """The first numbers of a row, float32, made anew."""
        where = (self.seed, self.stream, index * STRIDE, columns)
        if self.entries == "normal":
            return normal(*where, device=device)
        if self.entries == "ternary":
            return signs(*where, self.density, device).mul_(self.density**-0.5)
        return uniform(*where, device=device).mul_(2).sub_(1).mul_(3**0.5)

    def rows(self, start: int, stop: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Rows ``start .. stop`` (stop - start, columns): in float32 a view of what is kept, or made anew."""
        if not self.kept:
            return torch.stack([self.row(i, columns, device) for i in range(start, stop)]).to(dtype)
        if device not in self._held:
            whole = torch.empty(self.shape, device=device, dtype=torch.float32)
            for i, row in enumerate(whole):
                row.copy_(self.row(i, self.shape[1], device))
            self._held[device] = whole
        return self._held[device][start:stop, :columns].to(dtype)

    def corner(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """The first rows and columns, on the device and in the dtype of another tensor."""
        return self.rows(0, rows, columns, like.device, like.dtype)

    def digest(self, rows: int, columns: int) -> Tensor:
        """The hash of a corner's float32 values, uint8 (16,)."""
        if (rows, columns) not in self._digests:
            self._digests[rows, columns] = digest(*self._pieces(rows, columns))
        return self._digests[rows, columns]

    def _pieces(self, rows: int, columns: int) -> Iterator[Tensor]:
        """Hashes of the corner's rows, some at a time."""
        step = max(1, PIECE // columns)
        for start in range(0, rows, step):
            yield digest(torch.stack([self.row(i, columns) for i in range(start, min(start + step, rows))]))


class StoredBank:
    """A bank (rows, columns) of numbers that no seed gives back: zeros until a file fills ``state``, a module of one buffer.

    One adapter of the model takes ``state`` for its own, so that it is saved once and moves with the model; all read it here.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = rows, columns
        self.state = nn.Module()
        self.state.register_buffer("rows", torch.zeros(rows, columns, dtype=dtype, device=device))

    def corner(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """The first rows and columns, on the device and in the dtype of another tensor."""
        return self.state.get_buffer("rows")[:rows, :columns].to(like)
