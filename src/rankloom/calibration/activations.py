"""Statistics of every target's input activations, streamed over batches: leading components (EVA), covariances (CorDA)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rankloom.calibration.data import Calibration, all_reduce, batches_of, quiet
from rankloom.errors import DataError, TargetError
from rankloom.layers import Conv2dLayer, EmbeddingLayer, ExpertLayer
from rankloom.linalg import randomized_svd, truncated_svd
from rankloom.targets import Target

__all__ = ["ActivationComponents", "activation_components", "activation_covariances"]

T_co = TypeVar("T_co", covariant=True)


@dataclass
class ActivationComponents:
    """Principal directions of a target's inputs.

    ``V`` (in, k) orthonormal columns, ``S`` (k,) singular values of the (centred) data, ``ratio`` (k,) explained variance
    ratio of each, ``mean`` (in,), ``tokens`` how many rows were seen.
    """

    V: Tensor
    S: Tensor
    ratio: Tensor
    mean: Tensor
    tokens: int


class _IncrementalPCA:
    """Ross et al.'s incremental SVD with mean update: memory O(k * in), exact while the data has at most k directions."""

    def __init__(self, components: int, center: bool, generator: torch.Generator) -> None:
        self.components, self.center, self.generator = components, center, generator
        self.tokens = 0
        self.mean = self.square = self.sv = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Add rows (tokens, in)."""
        count, total = x.shape[0], self.tokens + x.shape[0]
        batch_mean = x.mean(0) if self.center else torch.zeros_like(x[0])
        rows = x - batch_mean
        if self.tokens == 0:
            self.mean, self.square = batch_mean, x.square().sum(0)
        else:
            shift = (self.tokens / total * count) ** 0.5 * (self.mean - batch_mean)
            rows = torch.cat([self.sv, rows, shift[None]])
            self.mean = (self.tokens * self.mean + count * batch_mean) / total
            self.square = self.square + x.square().sum(0)
        _, s, v = self._svd(rows)
        self.sv, self.tokens = s[:, None] * v.mT, total

    def _svd(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wanted = min(self.components, *rows.shape)
        if 3 * wanted >= min(rows.shape):
            return truncated_svd(rows, wanted)
        return randomized_svd(rows, wanted, oversample=wanted, power=4, generator=self.generator)

    def result(self) -> ActivationComponents:
        s = self.sv.norm(dim=1)
        v = (self.sv / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]).mT
        # The largest entry of each direction is positive: a convention, so that repeated fits agree in sign.
        sign = v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
        variance = (self.square - self.tokens * self.mean.square()).sum() if self.center else self.square.sum()
        ratio = s.square() / variance.clamp(min=torch.finfo(s.dtype).tiny)
        return ActivationComponents(v * sign, s, ratio, self.mean, self.tokens)


def default_mask(batch: Any) -> Tensor | None:
    """Tokens that count: attended, and labelled where labels align with tokens one to one."""
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    labels = batch.get("labels")
    ids = batch.get("input_ids")
    if labels is not None and ids is not None and labels.shape == ids.shape:
        labelled = labels != -100
        mask = labelled if mask is None else mask.bool() & labelled
    return None if mask is None else mask.bool()


class _Covariance:
    """``sum x x^T`` (in, in) and the number of rows."""

    def __init__(self, like: Tensor) -> None:
        self.total, self.tokens = like.new_zeros(like.shape[1], like.shape[1]), 0

    def add(self, x: Tensor) -> None:
        """Add rows (tokens, in)."""
        self.total.addmm_(x.mT, x)
        self.tokens += len(x)

    def result(self) -> Tensor:
        count = all_reduce(self.total.new_tensor(float(self.tokens)))
        return all_reduce(self.total) / count


class _Fit(Protocol[T_co]):
    def add(self, x: Tensor) -> None: ...

    def result(self) -> T_co: ...


def activation_components(
    model: nn.Module,
    targets: list[Target],
    calibration: Calibration,
    *,
    components: int,
    center: bool = True,
    seed: int = 0,
) -> dict[str, ActivationComponents]:
    """The leading ``components`` directions of every target's inputs over the calibration data; forward passes only.

    Targets that read one and the same tensor (q, k, v; gate, up) share one decomposition. Rows are cast to float32 or
    wider. ``center=True`` drops the mean direction (PCA, the released EVA); ``False`` is the plain SVD of the activations.

    Raises:
        DataError: no data, or no token that counts.
        TargetError: an embedding or a convolution, whose inputs are not rows of activations.
    """
    return _streamed(
        model,
        targets,
        calibration,
        lambda x: _IncrementalPCA(components, center, torch.Generator().manual_seed(seed)),
    )


def activation_covariances(model: nn.Module, targets: list[Target], calibration: Calibration) -> dict[str, Tensor]:
    """``C = mean x x^T`` (in, in) of every target's inputs, over the tokens that count and over all ranks; not centred.

    Memory: one (in, in) matrix for every distinct input. Sharing, dtype and errors as :func:`activation_components`.
    """
    return _streamed(model, targets, calibration, _Covariance)


@torch.no_grad()
def _streamed(
    model: nn.Module, targets: list[Target], calibration: Calibration, make: Callable[[Tensor], _Fit[T_co]]
) -> dict[str, T_co]:
    """Feed every distinct input, rows that count, to a fit of its own (``make(rows)``); its result for every target."""
    for target in targets:
        if isinstance(target.layer, EmbeddingLayer | Conv2dLayer | ExpertLayer):
            raise TargetError(
                f"{target.name} is no linear layer, so its inputs are no rows of activations: leave it out of targets, or "
                f"use an init that does not look at activations"
            )
    leaders: dict[str, str] = {}
    fits: dict[str, _Fit[T_co]] = {}
    seen: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # by identity: an address alone is reused within one forward
    mask: list[Tensor | None] = [None]

    def hook_for(target: Target) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            known, first = seen.get(id(x), (None, target.name))
            if known is None or known() is not x:
                seen[id(x)], first = (weakref.ref(x), target.name), target.name
            if leaders.setdefault(target.name, first) != target.name:
                return
            rows = x[mask[0]] if mask[0] is not None and mask[0].shape == x.shape[:-1] else x.reshape(-1, x.shape[-1])
            if len(rows) == 0:
                return
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            if target.name not in fits:
                fits[target.name] = make(rows)
            fits[target.name].add(rows)

        return hook

    handles = [model.get_submodule(t.module_name).register_forward_pre_hook(hook_for(t)) for t in targets]
    try:
        with quiet(model):
            for batch in batches_of(model, calibration):
                mask[0] = calibration.mask_fn(batch) if calibration.mask_fn else default_mask(batch)
                calibration.loss_fn(model, batch)
                seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name, leader in leaders.items() if leader not in fits]:
        raise DataError(f"no calibration token counts for {missing[0]}: every token is masked or unlabelled")
    results = {name: fit.result() for name, fit in fits.items()}
    return {name: results[leader] for name, leader in leaders.items()}
