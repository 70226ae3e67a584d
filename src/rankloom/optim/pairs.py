"""The one view of (A, B) pairs that preconditioners work on: by module, never by the order of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rankloom.adapters import Trainable
from rankloom.errors import CompositionError

__all__ = ["Pair", "PairStack", "find_pairs", "stacked"]


class Pair(NamedTuple):
    """The trained factors of one update ``s B A``: ``a`` (r, in), ``b`` (out, r), ``scale`` s."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """``a`` and ``b``."""
        return self.a, self.b


class PairStack(NamedTuple):
    """n pairs of one shape: ``a``, ``grad_a`` (n, r, in), ``b``, ``grad_b`` (n, out, r), ``scale`` (n, 1, 1).

    With ``G`` (out, in) the gradient of the weight, ``grad_a = s B^T G`` and ``grad_b = s G A^T``.
    """

    a: Tensor
    b: Tensor
    grad_a: Tensor
    grad_b: Tensor
    scale: Tensor

    @property
    def gram_a(self) -> Tensor:
        """``A A^T`` (n, r, r)."""
        return self.a @ self.a.mT

    @property
    def gram_b(self) -> Tensor:
        """``B^T B`` (n, r, r)."""
        return self.b.mT @ self.b


def find_pairs(trainables: list[Trainable]) -> list[Pair]:
    """The pairs among the trainable tensors: targets of which both an ``A`` and a ``B`` are trained.

    Raises:
        CompositionError: there is none.
    """
    factors: dict[str, dict[str, Trainable]] = {}
    for t in trainables:
        if t.target is not None and t.role in ("A", "B"):
            factors.setdefault(t.target, {})[t.role] = t
    both = [(f["A"], f["B"]) for f in factors.values() if len(f) == 2]
    if not both:
        raise CompositionError(
            "nothing to precondition: no adapted weight trains both an A and a B; use optimizer='adamw', or adapt weights "
            "with adapter='lora'"
        )
    return [Pair(a.parameter, b.parameter, a.scale) for a, b in both]


def stacked(pairs: list[Pair], gradients: Mapping[Tensor, Tensor | None]) -> Iterator[tuple[list[Pair], PairStack]]:
    """Pairs of equal shape side by side, so that a handful of batched products serves a whole model.

    Tensors are in float32 at least: Gram matrices of half-precision factors have no accurate inverse. A pair without both
    gradients is left out.
    """
    groups: dict[tuple[object, ...], list[Pair]] = {}
    for pair in pairs:
        if gradients[pair.a] is not None and gradients[pair.b] is not None:
            groups.setdefault((pair.a.shape, pair.b.shape, pair.a.dtype, pair.a.device), []).append(pair)
    for members in groups.values():
        dtype = torch.promote_types(members[0].a.dtype, torch.float32)
        both = [[factor.detach() for factor in side] for side in zip(*(p.factors for p in members), strict=True)]
        grads = [[gradients[factor] for factor in side] for side in zip(*(p.factors for p in members), strict=True)]
        a, b, grad_a, grad_b = (torch.stack(tensors).to(dtype) for tensors in (*both, *grads))
        yield members, PairStack(a, b, grad_a, grad_b, a.new_tensor([p.scale for p in members])[:, None, None])
