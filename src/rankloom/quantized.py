"""Quantised weights of frozen layers: reading them dense, and passing gradients through them.

torchao stores a weight as a tensor subclass inside an ordinary ``nn.Linear``. Left to autograd, some storages keep a dense
copy of the weight for the backward pass (every layer's at once, the memory that quantising was to save) and some, packed
int4 on a CPU among them, have no derivative at all. A frozen weight needs neither: ``dx = dy W`` with ``W`` dequantised for
that one product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rankloom.errors import TargetError

__all__ = ["dense", "differentiable", "frozen_linear", "is_quantized", "route", "unroute"]

_BLOCK = 1024  # rows of the identity at a time, when a weight is read through products with it


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is stored as anything but an ordinary floating tensor."""
    return type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point()


@torch.no_grad()
def dense(weight: Tensor) -> Tensor:
    """A weight as an ordinary tensor of the same shape, in the dtype it computes in; itself where it is one already.

    By its own ``dequantize()``; a packed storage without one is read column by column through its products with the
    identity, which are what its kernel multiplies with.

    Raises:
        TargetError: a storage that offers neither.
    """
    stored = weight.detach()
    if not is_quantized(stored):
        return stored
    # Bare integers could be cast or multiplied, but what they stand for is known to the module that scales them, not to us.
    if stored.is_floating_point() or stored.is_quantized:
        try:
            return stored.dequantize()
        except NotImplementedError:
            return _by_products(stored)
    raise _unreadable(stored)


def _by_products(stored: Tensor) -> Tensor:
    if stored.ndim != 2:
        raise _unreadable(stored)
    width = stored.shape[1]
    rows = torch.zeros(min(_BLOCK, width), width, dtype=stored.dtype, device=stored.device)
    columns = []
    for start in range(0, width, len(rows)):
        rows.zero_().diagonal(start).fill_(1)
        try:
            columns.append(F.linear(rows, stored)[: width - start])
        except NotImplementedError:
            raise _unreadable(stored) from None
    return torch.cat(columns).mT.contiguous()


def _unreadable(stored: Tensor) -> TargetError:
    return TargetError(
        f"cannot read a weight stored as {type(stored).__name__} ({stored.dtype}): it neither dequantises nor multiplies; load "
        f"the base in a floating dtype, or quantise it with torchao"
    )


class _FrozenLinear(torch.autograd.Function):
    """The layer's own product forward; backward through a dense weight that lives for one product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtypes = weight, (x.dtype, bias.dtype if bias is not None else None)
        # Detached: a 3-D linear's result is a view, which autograd would not let later code change in place.
        return F.linear(x, weight, bias).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ dense(ctx.weight).to(grad.dtype)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.dtypes[1])
        return grad_x, None, grad_bias


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)`` to the bit, for a frozen ``weight`` (out, in) in any storage.

    Differentiable once in ``x`` and ``bias``; nothing of the weight's dense size is kept for the backward pass. Where the
    storage also quantises activations, the gradient is the straight-through one.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return cast(Tensor, _FrozenLinear.apply(x, weight, bias))
    return F.linear(x, weight, bias)


class _Routed:
    """Mark of a quantised linear whose product goes through :func:`frozen_linear`."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


_CLASSES: dict[type[nn.Module], Any] = {}


def route(model: nn.Module) -> list[nn.Module]:
    """Let gradients pass every quantised linear of the model that runs ``nn.Linear``'s own forward.

    Only the modules' classes change. Returns them, for :func:`unroute`.
    """
    routed: list[nn.Module] = []
    for module in model.modules():
        cls = type(module)
        if isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward and is_quantized(module.weight):
            if cls not in _CLASSES:
                _CLASSES[cls] = type(f"Routed{cls.__name__}", (_Routed, cls), {"__module__": __name__})
            module.__class__ = _CLASSES[cls]
            routed.append(module)
    return routed


def unroute(routed: list[nn.Module]) -> None:
    """Undo :func:`route`."""
    for module in routed:
        module.__class__ = type(module).__mro__[2]


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients pass the model's quantised linears inside the block."""
    routed = route(model)
    try:
        yield
    finally:
        unroute(routed)
