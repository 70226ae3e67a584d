"""The random matrices that PEFT's VeRA and RandLoRA share among modules: their layout there, and how PEFT draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["drawn", "from_rows", "to_rows"]


def to_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's ``A`` (r, in) or (r, 1, d) and ``B`` (out, r) or (D, n, r) as our banks, (r, .) and (n r, .)."""
    return a.flatten(1), b.flatten(1).mT


def from_rows(a: Tensor, b: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """The reverse of :func:`to_rows`, contiguous, for ``A`` and ``B`` of two or three dimensions."""
    return (a, b.mT.contiguous()) if dims == 2 else (a[:, None], b.mT.unflatten(1, (-1, len(a))).contiguous())


def drawn(config: Mapping[str, Any], out: int, width: int) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` as PEFT draws them from ``projection_prng_key`` for modules up to (out, width), where it saves none.

    Bit for bit on the CPU generator of the same torch. RandLoRA's dense bases are drawn in bfloat16, as PEFT does on every
    machine that has it.
    """
    rank, generator = int(config["r"]), torch.Generator().manual_seed(int(config.get("projection_prng_key") or 0))
    if config["peft_type"] == "VERA":
        a = nn.init.kaiming_uniform_(torch.empty(rank, width), generator=generator)
        return a, nn.init.kaiming_uniform_(torch.empty(out, rank), generator=generator)
    small, large = sorted((out, width))
    terms = math.ceil(small / rank)
    if config.get("sparse") or config.get("very_sparse"):
        share = 1 / (2 * (math.sqrt(small) if config.get("very_sparse") else 3))
        shapes = (rank, 1, small), (large, terms, rank)
        a, b = (_ternary(torch.rand(shape, generator=generator), share) for shape in shapes)
    else:
        a = _thin(generator, rank, 1, small)
        b = torch.cat([_thin(generator, large, 1, rank) for _ in range(terms)], dim=1)
    return a / a.std(), b / b.std()


def _thin(generator: torch.Generator, *shape: int) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=5**0.5, generator=generator)


def _ternary(uniform: Tensor, share: float) -> Tensor:
    """-1 and +1, each with probability ``share``, else 0."""
    return (uniform > 1 - share).float() - (uniform < share).float()
