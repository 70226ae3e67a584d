"""Calibration data, the token-weighted pass over it, and the tap that shows each layer's input and output gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.errors import DataError, GradientError, TargetError
from rankloom.layers import ExpertLayer
from rankloom.quantized import differentiable
from rankloom.targets import Target

__all__ = ["Calibration", "LossFn", "Sink", "all_reduce", "mean_loss", "quiet", "run_pass", "taps"]

LossFn = Callable[[nn.Module, Any], tuple[Tensor, float]]
"""A batch's mean loss and its weight: the number of tokens (or examples) the mean is over."""

Sink = Callable[[str, Tensor, Tensor, float], None]
"""Receives (target name, layer input, output gradient, batch weight) during the backward pass."""


def default_loss(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    """The model's own ``.loss`` on a batch of keyword arguments, weighted by the labels it averages over.

    Causal models shift labels by one, so the first label of each row carries no loss. Ignored labels (-100) do not count.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise DataError("calibration batches must be mappings with `labels`, or pass Calibration(batches, loss_fn=...)")
    labels = batch["labels"]
    causal = "causal" in type(model).__name__.lower() or type(model).__name__.endswith("LMHeadModel")
    counted = labels[..., 1:] if causal and labels.ndim > 1 else labels
    weight = float((counted != -100).sum()) if not counted.is_floating_point() else float(len(counted))
    return model(**batch).loss, weight


@dataclass(frozen=True)
class Calibration:
    """Data that inits and planners may look at before training: re-iterable ``batches`` and how to take a loss from one.

    ``loss_fn(model, batch) -> (mean loss, weight)``; by default the model's own loss on ``model(**batch)``, weighted by its
    number of labels, so that micro-batches of unequal length add up to the mean over all tokens. ``mask_fn(batch)`` may
    name the tokens whose activations count (default: attended, and labelled where labels align with tokens).
    """

    batches: Iterable[Any]
    loss_fn: LossFn = default_loss
    mask_fn: Callable[[Any], Tensor | None] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.batches, Iterator):
            raise DataError("calibration takes several passes: give a list or a DataLoader, not an iterator")


class _Tap(torch.autograd.Function):
    """Identity on a layer's output that shows ``(x, grad_y)`` to a sink in the backward pass.

    A zero that requires a gradient rides along, so the backward pass reaches the tap even under a fully frozen model.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, alive: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        return y.detach()  # shares y's memory, yet is no view: in-place activations may follow

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.receive(ctx.saved_tensors[0], grad)
        return grad, None, None, None


@contextmanager
def taps(model: nn.Module, targets: list[Target], sink: Sink, weight: Callable[[], float]) -> Iterator[None]:
    """Show every target's input and output gradient to ``sink`` during backward passes inside the block."""
    for target in targets:
        if isinstance(target.layer, ExpertLayer):
            raise TargetError(
                f"{target.name} is one expert of a stack, whose inputs no module sees: leave it out of targets, or use an init "
                f"that does not look at gradients"
            )
    alive = torch.zeros((), requires_grad=True)
    by_module: dict[str, list[Target]] = {}
    for target in targets:
        by_module.setdefault(target.module_name, []).append(target)

    def hook_for(group: list[Target]) -> Callable[..., Tensor]:
        def receive(x: Tensor, grad: Tensor) -> None:
            for target in group:
                rows = target.layer.rows
                sink(target.name, x, grad if rows is None else grad[..., slice(*rows)], weight())

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return _Tap.apply(output, args[0], alive, receive)

        return hook

    handles = [model.get_submodule(n).register_forward_hook(hook_for(g)) for n, g in by_module.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside the block; both exactly as before afterwards.

    Dropout off: the passes of a sketch must see one and the same gradient.
    """
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return batch


def batches_of(model: nn.Module, calibration: Calibration) -> Iterator[Any]:
    """The batches on the model's device. Raises :class:`DataError` when there are none."""
    device, empty = next(model.parameters()).device, True
    for batch in calibration.batches:
        empty = False
        yield _to_device(batch, device)
    if empty:
        raise DataError("the calibration data is empty: give at least one batch")


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over data-parallel ranks in place; a no-op in a single process. Sums of micro-batches are all there is to merge."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def run_pass(model: nn.Module, targets: list[Target], calibration: Calibration, sink: Sink) -> tuple[float, float]:
    """One forward and backward pass over the data with taps in place.

    Returns:
        (mean loss over tokens, total weight), over all ranks.

    Raises:
        GradientError: a loss that is not finite.
    """
    weight = 0.0
    totals = torch.zeros(2, dtype=torch.float64)
    with quiet(model), differentiable(model), taps(model, targets, sink, lambda: weight), torch.enable_grad():
        for index, batch in enumerate(batches_of(model, calibration)):
            loss, weight = calibration.loss_fn(model, batch)
            if weight == 0:
                continue  # nothing is labelled: a mean over no token is not a number, and counts for nothing
            if not torch.isfinite(loss):
                raise GradientError(
                    f"calibration batch {index} has loss {float(loss.detach())}: check the data and the model's dtype"
                )
            loss.backward()
            totals += torch.tensor([float(loss.detach()) * weight, weight], dtype=torch.float64)
    all_reduce(totals)
    if totals[1] == 0:
        raise DataError("no calibration batch has a label that counts: every label is -100")
    return float(totals[0] / totals[1]), float(totals[1])


@torch.no_grad()
def mean_loss(model: nn.Module, calibration: Calibration) -> float:
    """The token-weighted mean loss of the model as it stands, in evaluation mode."""
    totals = torch.zeros(2, dtype=torch.float64)
    with quiet(model):
        for batch in batches_of(model, calibration):
            loss, weight = calibration.loss_fn(model, batch)
            if weight:
                totals += torch.tensor([float(loss) * weight, weight], dtype=torch.float64)
    all_reduce(totals)
    return float(totals[0] / totals[1])
