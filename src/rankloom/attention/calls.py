"""One call of a layer's attention: its tensors, and the gradient of its output when that comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankloom.attention.budget import Place
from rankloom.attention.masks import Plain

__all__ = ["Tensors", "in_backward", "observe", "wide"]


@dataclass(frozen=True)
class Tensors:
    """One call: ``query`` (B, H, L, d), ``key`` (B, H / g, L, d), ``value`` (B, H / g, L, d_v), what they attend to."""

    query: Tensor
    key: Tensor
    value: Tensor
    plain: Plain
    scale: float

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def place(self) -> Place:
        """What decides about time, beside the lengths."""
        q = self.query
        return q.shape[-1], self.value.shape[-1], self.group, self.plain.causal, str(q.device), str(q.dtype)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the sequences."""
        return tuple(stop - start for start, stop in self.plain.ranges)

    def queries(self, head: int) -> slice:
        """The query heads of a key head."""
        return slice(head * self.group, (head + 1) * self.group)

    def sequence(self, head: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """``q`` (g, n, d), ``k`` (n, d), ``v`` (n, d_v) of a head in a batch row, without padding, in float32 at least."""
        at = slice(*self.plain.ranges[row])
        parts = self.query[row, self.queries(head), at], self.key[row, head, at], self.value[row, head, at]
        q, k, v = (wide(part) for part in parts)
        return q, k, v


def observe(out: Tensor, given: Tensors, measure: Callable[[Tensors, Tensor | None], None]) -> Tensor:
    """``out``, with ``measure(given, gradient of out)`` called when that gradient comes; at once where none will come."""
    if not out.requires_grad:
        measure(given, None)
        return out
    watched: Tensor = _Observe.apply(out, given.query, given.key, given.value, given.plain, given.scale, measure)
    return watched


class _Observe(torch.autograd.Function):
    """The identity on ``out``. Its saved tensors are those that attention saves; a checkpoint drops and recomputes both."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, query: Tensor, key: Tensor, value: Tensor, plain: Plain, scale: float, measure: Any
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rest = plain, scale, measure
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (query, key, value), (plain, scale, measure) = ctx.saved_tensors, ctx.rest
        measure(Tensors(query, key, value, plain, scale), grad)
        return grad, None, None, None, None, None, None


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_backward() -> bool:
    """Whether this is a forward pass that a checkpoint repeats inside a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)
