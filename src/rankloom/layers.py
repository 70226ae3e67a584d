"""Views of the layers that can be adapted. Orientation, layout and slicing are solved here once: weights are (out, in)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.quantized import dense, frozen_linear, is_quantized

__all__ = [
    "Conv1DLayer",
    "Conv2dLayer",
    "EmbeddingLayer",
    "ExpertLayer",
    "Layer",
    "LinearLayer",
    "layer_of",
    "stacks_of",
]


class Layer:
    """A frozen layer seen as ``y = x W^T + b`` with ``W`` (out, in).

    Subclasses say how a module stores its weight and how a low-rank product runs on its input: ``down(x, A)`` takes ``x``
    to rank space, ``up(h, B)`` from there to the output, so ``up(down(x, A), B)`` is what the dense update ``B A`` does.
    """

    def __init__(self, module: nn.Module, rows: tuple[int, int] | None = None) -> None:
        self.module, self.rows = module, rows
        self._forward: Callable[..., Tensor] = type(module).forward  # the class's own, before anything is attached
        self.out_features, self.in_features = self._shape()
        if rows is not None:
            self.out_features = rows[1] - rows[0]
        self._output: Tensor | None = None
        self._matrix: Tensor | None = None

    def _shape(self) -> tuple[int, int]:
        return cast(tuple[int, int], tuple(self.stored.shape))

    @property
    def stored(self) -> Tensor:
        """The module's own weight tensor, in its own layout and storage."""
        return cast(Tensor, self.module.weight)

    @property
    def parameter(self) -> Tensor:
        """The module's parameter that the weight is, or is a part of."""
        return self.stored

    @property
    def plain(self) -> bool:
        """Whether the weight is an ordinary floating tensor that kernels may multiply with directly."""
        return self.replaced or not is_quantized(self.stored)

    @property
    def replaced(self) -> bool:
        """Whether this is the layer with another weight (:meth:`with_weight`) than the one its module stores."""
        return self._matrix is not None

    @property
    def ordinary(self) -> bool:
        """Whether the module computes exactly ``x W^T + b``, so that a fused kernel may stand in for its forward."""
        return self._output is None and self.plain and self._forward in _ORDINARY and not _is_hooked(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the layer computes in."""
        return self.stored.dtype if self.stored.is_floating_point() else torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Where the weight lives."""
        return self.stored.device

    def to_matrix(self, stored: Tensor) -> Tensor:
        """A tensor in the module's layout as a matrix (out, in)."""
        return stored

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the module's layout."""
        return matrix

    def weight(self) -> Tensor:
        """The frozen ``W`` (out, in), dense and detached, in the dtype the layer computes in.

        A view where the storage is plain. A quantised weight is dequantised for the caller: use it and let it go.

        Raises:
            TargetError: a storage that can be neither dequantised nor multiplied with.
        """
        if self._matrix is not None:
            return self._matrix
        matrix = self.to_matrix(dense(self.stored))
        return matrix if self.rows is None else matrix[slice(*self.rows)]

    def bias(self) -> Tensor | None:
        """The frozen bias (out,) or None."""
        bias = getattr(self.module, "bias", None)
        return bias if bias is None or self.rows is None else bias[slice(*self.rows)]

    def __call__(self, x: Tensor) -> Tensor:
        """The frozen layer's own output."""
        if self._output is not None:
            return self._output
        if self._matrix is not None:
            return self.apply(x, self._matrix)
        if self.rows is None:
            return self._run(x)
        if self.plain:
            return self.apply(x, self.weight())
        return self._run(x)[..., slice(*self.rows)]

    def _run(self, x: Tensor) -> Tensor:
        if not self.plain and self._forward in _ORDINARY:
            return frozen_linear(x, self.stored, cast(Tensor | None, self.module.bias))
        return self._forward(self.module, x)

    def with_output(self, y: Tensor) -> Layer:
        """The same layer with its output for the current input known already: slices of one projection share one product."""
        twin = copy.copy(self)
        twin._output = y
        return twin

    def with_weight(self, matrix: Tensor) -> Layer:
        """The same layer with a frozen ``matrix`` (out, in) in place of its weight, whatever the module stores."""
        twin = copy.copy(self)
        twin._matrix, twin._output = matrix, None
        return twin

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The layer's output with ``matrix`` (out, in) in place of its weight; differentiable in ``x`` and ``matrix``."""
        return F.linear(x, matrix, self.bias())

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """``x`` to rank space through ``A`` (r, in)."""
        return F.linear(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """From rank space to the output through ``B`` (out, r)."""
        return F.linear(h, b)

    def lowrank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The product of the dense update ``B A`` with the input, through rank space."""
        return self.up(self.down(x, a), b)

    def broadcast(self, vector: Tensor) -> Tensor:
        """A vector (out,) shaped to multiply the output."""
        return vector

    def tokens(self, y: Tensor) -> Tensor:
        """An output-like tensor as a matrix (tokens, features)."""
        return y.reshape(-1, y.shape[-1])


_ORDINARY = {nn.Linear.forward}


def _is_hooked(module: nn.Module) -> bool:
    """A forward replaced on the instance (offloading libraries do) has to run, not be bypassed."""
    return "forward" in module.__dict__


class LinearLayer(Layer):
    """``nn.Linear`` and everything that stores (out, in)."""


class Conv1DLayer(Layer):
    """The transposed linear of GPT-2, which stores (in, out)."""

    def _shape(self) -> tuple[int, int]:
        fan_in, fan_out = self.stored.shape
        return fan_out, fan_in

    def to_matrix(self, stored: Tensor) -> Tensor:
        return stored.mT

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        bias = cast(Tensor, self.bias())  # as the module does it, so that an unchanged matrix changes no bit
        out = torch.addmm(bias, x.reshape(-1, x.shape[-1]), matrix.mT)
        return out.view(*x.shape[:-1], self.out_features)


class EmbeddingLayer(Layer):
    """A look-up table (rows, dim), which is a linear map of one-hot rows: ``out = dim``, ``in = rows``."""

    def _shape(self) -> tuple[int, int]:
        rows, dim = self.stored.shape
        return dim, rows

    def to_matrix(self, stored: Tensor) -> Tensor:
        return stored.mT

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        module = cast(nn.Embedding, self.module)
        return F.embedding(x, matrix.mT, padding_idx=module.padding_idx) * getattr(module, "embed_scale", 1.0)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        # A scaled embedding (Gemma, BART) multiplies the look-up: its update must be multiplied too, or merging differs.
        return F.embedding(x, a.mT) * getattr(self.module, "embed_scale", 1.0)


class Conv2dLayer(Layer):
    """A 2-D convolution as a matrix (out channels, in channels / groups * kh * kw)."""

    def _shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.stored[0].numel()

    def to_matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, self.stored.shape[1:])

    def _convolve(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        kernel = matrix.unflatten(1, self.stored.shape[1:])
        return cast(Tensor, cast(nn.Conv2d, self.module)._conv_forward(x, kernel, bias))

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self._convolve(x, matrix, self.bias())

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self._convolve(x, a, None)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(h, b[:, :, None, None])

    def lowrank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if self.grouped:  # each group reads its own channels: no rank space is common to them
            return self._convolve(x, b @ a, None)
        return self.up(self.down(x, a), b)

    @property
    def grouped(self) -> bool:
        """Whether output channels see only part of the input channels."""
        return cast(nn.Conv2d, self.module).groups > 1

    def broadcast(self, vector: Tensor) -> Tensor:
        return vector[:, None, None]

    def tokens(self, y: Tensor) -> Tensor:
        return y.movedim(1, -1).reshape(-1, y.shape[1])


class ExpertLayer(Layer):
    """One expert of a mixture: a matrix of the 3-D parameter ``key`` that its module holds for all of them, as transformers'
    experts do: (experts, out, in), or (experts, in, out) where the module says ``is_transposed``."""

    def __init__(self, module: nn.Module, key: str, index: int) -> None:
        self.key, self.index, self.transposed = key, index, bool(module.is_transposed)
        super().__init__(module)

    @property
    def parameter(self) -> nn.Parameter:
        # Past the attribute, which is the adapted stack while the module runs.
        return cast(nn.Parameter, self.module._parameters[self.key])

    @property
    def stored(self) -> Tensor:
        return self.parameter[self.index]

    def _shape(self) -> tuple[int, int]:
        return cast(tuple[int, int], tuple(self.to_matrix(self.stored).shape))

    def to_matrix(self, stored: Tensor) -> Tensor:
        return stored.mT if self.transposed else stored

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix

    def bias(self) -> None:
        """None: it is the module that adds biases, after all experts' products."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.apply(x, self.weight())


def stacks_of(module: nn.Module) -> list[str]:
    """The 3-D weights of a module that follows transformers' interface of experts."""
    count = getattr(module, "num_experts", None)
    if not hasattr(module, "is_transposed") or count is None:
        return []
    return [key for key, p in module._parameters.items() if p is not None and p.ndim == 3 and len(p) == count]


def layer_of(module: nn.Module, rows: tuple[int, int] | None = None) -> Layer | None:
    """The view of a module, or None where it stores no weight we know how to adapt."""
    if isinstance(module, nn.Linear):
        return LinearLayer(module, rows)
    if isinstance(module, nn.Embedding):
        return EmbeddingLayer(module, rows)
    if isinstance(module, nn.Conv2d):
        return Conv2dLayer(module, rows)
    if type(module).__name__.endswith("Conv1D") and hasattr(module, "nf"):  # transformers', without importing it
        return Conv1DLayer(module, rows)
    return None
