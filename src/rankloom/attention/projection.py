"""From gradients in a head's queries, keys and values to those of the adapters that made them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Projection"]


@dataclass(frozen=True)
class Projection:
    """The adapter ``W' = W + scale * b a`` that makes the queries, the keys or the values from ``x``.

    ``x`` (L, D), ``a`` (r, D), ``b`` (heads * d, r) with ``heads = g`` for queries and 1 for keys and values. For ``dn`` the
    gradient in the projected rows, ``dA = scale (dn b)^T x`` (r, D) and ``dB = scale dn^T (x a^T)`` (heads * d, r).
    ``pull_back(dn, at)`` undoes what stands between projection and attention, such as rotary positions: it takes gradients
    (heads, n, d) at the positions ``at`` (n,) to those in the projection's own output.
    """

    x: Tensor
    a: Tensor
    b: Tensor
    scale: float
    pull_back: Callable[[Tensor, Tensor], Tensor] | None = None

    def gradients(self, grad: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """``dA`` and ``dB`` from ``grad`` (heads, n, d) at the positions ``at`` (n,)."""
        grad = grad if self.pull_back is None else self.pull_back(grad, at)
        x, a, b = (t.detach().to(grad.dtype) for t in (self.x[at], self.a, self.b))
        d_a = torch.einsum("hnd,hdr->rn", grad, b.view(*grad.shape[::2], -1)) @ x
        d_b = torch.einsum("hnd,nr->hdr", grad, x @ a.mT).flatten(0, 1)
        return self.scale * d_a, self.scale * d_b
