"""Forms whose update has to be formed to be applied: ``delta`` (out, in) by blocks of rows, never kept for the backward pass."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rankloom.adapters.base import Adapter
from rankloom.kernels import Update, materialize, materialized_linear
from rankloom.layers import Conv1DLayer, Layer, LinearLayer

__all__ = ["MaterializedAdapter"]


class MaterializedAdapter(Adapter):
    """``delta`` by :meth:`rows`, a function of blocks of ``W`` (where ``needs_base`` says so) and of :meth:`tensors`.

    Linears run as one product with ``W + delta``; saved for the backward pass are the input and the tensors, and the update
    is formed again there, block by block. Convolutions and look-ups run under a checkpoint of their own, which keeps as
    little, at the price of a second forward product. Slices of fused projections, quantised layers and linears with a forward of
    their own keep their product, to the bit, and the update's is added to it.

    In half precision ``W + delta`` is rounded to the base's dtype before it multiplies, as it is when merged.
    """

    halves: ClassVar[bool] = False  # made of products, which half precision multiplies in half
    multiple: int = 1  # blocks of rows begin at multiples of it

    @abstractmethod
    def rows(self, weight: Tensor | None, span: slice, *tensors: Tensor) -> Tensor:
        """``delta[span]`` (n, in) from ``weight = W[span]`` (None for forms that do not read it) and :meth:`tensors`.

        Computes in ``weight``'s dtype where there is one.
        """

    def tensors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """What :meth:`rows` depends on: the parameters, by default; any tensors, with or without a graph.

        ``dtype``: that of the layer's products, in which a form that ``halves`` has its tensors; None asks for their own.
        """
        return tuple(p.to(dtype) if self.halves and dtype is not None else p for p in self.parameters())

    def update(self, base: Layer, *, added: bool) -> Update:
        """The update as kernels take it."""
        weight = base.weight if added or self.needs_base == "every_step" else None
        return Update((base.out_features, base.in_features), self._rows, weight, added, self.multiple)

    def _rows(self, weight: Tensor | None, span: slice, *tensors: Tensor) -> Tensor:
        return self.rows(weight if self.needs_base == "every_step" else None, span, *tensors)

    def delta(self, base: Layer) -> Tensor:
        tensors = self.tensors()
        weight = base.weight().to(self._wide()) if self.needs_base == "every_step" else None
        return self.rows(weight, slice(0, base.out_features), *tensors).to(self._wide())

    def _wide(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters())

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        linear = isinstance(base, (LinearLayer, Conv1DLayer)) and not torch.is_autocast_enabled(x.device.type)
        if not base.plain or base.rows is not None or (isinstance(base, LinearLayer) and not base.ordinary):
            y, update = base(x), self.update(base, added=False)
            if linear and x.dtype == y.dtype:
                return y + materialized_linear(x, update, self.tensors(x.dtype), base.down)
            return y + self._checkpointed(x, base, update)
        bias = base.bias()
        if linear and x.dtype == base.dtype and not (bias is not None and bias.requires_grad):
            return materialized_linear(x, self.update(base, added=True), self.tensors(x.dtype), base.apply)
        return self._checkpointed(x, base, self.update(base, added=True))

    def _checkpointed(self, x: Tensor, base: Layer, update: Update) -> Tensor:
        product = base.apply if update.added else base.down
        dtype = x.dtype if x.is_floating_point() else base.dtype

        def run(x: Tensor, *tensors: Tensor) -> Tensor:
            return product(x, materialize(update, tensors, dtype))

        out: Tensor = checkpoint(run, x, *self.tensors(dtype), use_reentrant=False, preserve_rng_state=False)
        return out
