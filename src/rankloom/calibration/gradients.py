"""Every target's full gradient on calibration data: its leading singular triplets, streamed, or exactly as the oracle."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankloom.calibration.data import Calibration, all_reduce, run_pass
from rankloom.calibration.sketch import AlternatingSketch, GradientSVD, Sketch
from rankloom.errors import GradientError
from rankloom.layers import Layer
from rankloom.linalg import truncated_svd
from rankloom.targets import Target

__all__ = ["GradientReport", "exact_gradients", "full_gradients", "gradient_svd"]


@dataclass
class GradientReport:
    """What a sketch took: seconds, passes, the mean loss it saw, tokens, and the lowest ``captured`` of all targets."""

    seconds: float
    passes: int
    loss: float
    tokens: float
    captured: float
    svds: dict[str, GradientSVD] = field(repr=False)

    def summary(self) -> dict[str, float]:
        """Everything but the triplets."""
        return {key: value for key, value in vars(self).items() if key != "svds"}


def gradient_svd(
    model: nn.Module,
    targets: list[Target],
    calibration: Calibration,
    *,
    rank: int,
    oversample: int = 24,
    passes: int = 3,
    tolerance: float | None = None,
    max_passes: int = 9,
    lean: bool = False,
    seed: int = 0,
) -> GradientReport:
    """The leading ``rank`` singular triplets of every target's full gradient of the token-mean loss.

    Args:
        model: the model, adapters not yet attached; weights may be frozen or quantised, they only have to run.
        targets: the weights whose gradients are wanted.
        calibration: the data; ``passes`` passes are made over it.
        rank: triplets wanted. The sketch is ``rank + oversample`` wide, cut to ``min(out, in)``.
        oversample: extra width; more captures more per pass.
        passes: at least 2: range, (power steps,) projection; each multiplies the gradient from both sides.
        tolerance: if set, targets whose estimated ``captured`` is below it get further passes, up to ``max_passes``.
        max_passes: bound on the passes a tolerance may ask for.
        lean: multiply from one side a pass, in turn: half the memory and half the sketch's own work; four passes then find
            about what three find from both sides.
        seed: of the random start.

    Memory: ``2 (out + in) * width`` float32 per target, ``(out + in) * width`` where lean; the (out, in) gradient is never
    formed. Additive over micro-batches and ranks. Cost per pass: a frozen forward and backward pass plus
    ``2 * tokens * width * (in + out)`` multiply-adds per target, half of them where lean. The algorithm is in
    :mod:`rankloom.calibration.sketch`.
    """
    begin = time.perf_counter()
    kind = AlternatingSketch if lean else Sketch
    sketches = {t.name: kind(t, rank, rank + oversample, seed) for t in targets}
    by_name, open_ = {t.name: t for t in targets}, dict(sketches)
    done, loss, tokens = 0, float("nan"), 0.0
    while open_ and done < max(passes, 2 if tolerance is None else max_passes):
        for sketch in open_.values():
            sketch.start_pass()

        def sink(name: str, x: Tensor, grad: Tensor, weight: float, live: dict[str, Sketch] = open_) -> None:
            live[name].add(x, grad, weight)

        loss, tokens = run_pass(model, [by_name[name] for name in open_], calibration, sink)
        for sketch in open_.values():
            sketch.finish_pass(tokens)
        done += 1
        if done >= max(passes, 2):
            open_ = (
                {}
                if tolerance is None
                else {n: s for n, s in open_.items() if s.result and s.result.captured < tolerance}
            )
    svds = {name: sketch.result for name, sketch in sketches.items() if sketch.result is not None}
    captured = min((svd.captured for svd in svds.values()), default=1.0)
    return GradientReport(time.perf_counter() - begin, done, loss, tokens, captured, svds)


def full_gradients(
    model: nn.Module, targets: list[Target], calibration: Calibration
) -> tuple[dict[str, Tensor], float, float]:
    """The full gradients (out, in) of the token-mean loss in float32 or wider, the loss, and the tokens: one pass.

    Memory: one full gradient of every target.
    """
    sums = {
        t.name: torch.zeros(t.shape, dtype=torch.promote_types(t.layer.dtype, torch.float32), device=t.layer.device)
        for t in targets
    }
    layers = {t.name: t.layer for t in targets}

    def sink(name: str, x: Tensor, grad: Tensor, weight: float) -> None:
        sums[name].add_(_full_gradient(layers[name], x, grad), alpha=weight)

    loss, tokens = run_pass(model, targets, calibration, sink)
    for name, total in sums.items():
        if not torch.isfinite(all_reduce(total).div_(tokens)).all():
            raise GradientError(
                f"the calibration gradient of {name} is not finite: check the data and the model's dtype"
            )
    return sums, loss, tokens


def exact_gradients(
    model: nn.Module, targets: list[Target], calibration: Calibration, *, rank: int | None = None
) -> tuple[dict[str, Tensor], GradientReport]:
    """:func:`full_gradients` and their exact triplets: the sketch's oracle."""
    begin = time.perf_counter()
    gradients, loss, tokens = full_gradients(model, targets, calibration)
    svds = {}
    for name, gradient in gradients.items():
        u, s, v = truncated_svd(gradient, rank or min(gradient.shape))
        energy, total2 = float(s.square().sum()), float(gradient.square().sum())
        svds[name] = GradientSVD(u, s, v, 1.0, energy / total2 if total2 else 1.0, 1)
    return gradients, GradientReport(time.perf_counter() - begin, 1, loss, tokens, 1.0, svds)


def _full_gradient(layer: Layer, x: Tensor, grad: Tensor) -> Tensor:
    if x.is_floating_point() and x.shape[:-1] == grad.shape[:-1]:
        return layer.tokens(grad).mT @ x.reshape(-1, x.shape[-1])
    with torch.enable_grad():  # look-ups and convolutions: the adjoint in the layer's own matrix
        probe = torch.zeros(
            layer.out_features, layer.in_features, dtype=grad.dtype, device=grad.device, requires_grad=True
        )
        return torch.autograd.grad(layer.apply(x.detach(), probe), probe, grad)[0]
