"""The leading singular triplets of every target's full gradient, without ever forming a gradient.

``G = sum grad_y^T x`` (out, in), so ``G Omega = sum grad_y^T (x Omega)`` and ``G^T Q = sum x^T (grad_y Q)``: each pass over
the data multiplies ``G`` or its transpose with a thin matrix. Range, power step, projection: subspace iteration
(Halko, Martinsson, Tropp, arXiv 0909.4061), streamed.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankloom.calibration.data import Calibration, all_reduce, run_pass
from rankloom.errors import GradientError, TargetError
from rankloom.linalg import orthonormal, truncated_svd
from rankloom.targets import Conv2dLayer, Layer, LinearLayer, Target

__all__ = ["GradientSVD", "exact_gradients", "gradient_svd", "target_generator"]


@dataclass
class GradientSVD:
    """``G ~ U diag(S) V^T`` of one target: ``U`` (out, k), ``S`` (k,), ``V`` (in, k), of the mean-loss gradient.

    ``captured``: estimated share of the best rank-r energy that the leading r triplets capture (1 in exact mode).
    ``explained``: estimated share of ``||G||_F^2`` they hold. ``passes``: passes over the data this target took.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    captured: float
    explained: float
    passes: int

    def top(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The leading ``rank`` triplets."""
        return self.U[:, :rank], self.S[:rank], self.V[:, :rank]


@dataclass
class GradientReport:
    """What a sketch took: seconds, passes, the mean loss it saw, tokens, and the lowest ``captured`` of all targets."""

    seconds: float
    passes: int
    loss: float
    tokens: float
    captured: float
    svds: dict[str, GradientSVD] = field(repr=False)


def target_generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for every target, so results do not depend on the order or number of other targets."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class _Sketch:
    """The state of one target: a thin basis, the accumulator of the current pass, and the energies of earlier passes."""

    def __init__(self, target: Target, rank: int, width: int, seed: int) -> None:
        if isinstance(target.layer, Conv2dLayer) and target.layer.grouped:
            raise TargetError(f"{target.name} is a grouped convolution: its gradient needs exact mode (method='exact')")
        self.layer, self.rank = target.layer, min(rank, *target.shape)
        self.width = min(width, *target.shape)
        fan_in = target.shape[1]
        generator = target_generator(seed, target.name)
        self.dtype = torch.promote_types(self.layer.dtype, torch.float32)
        basis = torch.randn(fan_in, self.width, generator=generator, dtype=self.dtype).to(self.layer.device)
        self.basis, self.passes, self.frobenius2 = basis, 0, 0.0
        self.energies: list[float] = []
        self.result: GradientSVD | None = None

    @property
    def _from_input(self) -> bool:  # odd passes multiply G from the right with an (in, k) basis
        return self.passes % 2 == 0

    def start_pass(self) -> None:
        """Clear the accumulator and bring the basis to the dtype the model computes in."""
        rows = self.layer.out_features if self._from_input else self.layer.in_features
        self.sum = torch.zeros(rows, self.width, dtype=self.dtype, device=self.layer.device)
        self._cast = self.basis.to(self.layer.dtype)

    def add(self, x: Tensor, grad: Tensor, weight: float) -> None:
        """Add one micro-batch: ``weight * grad^T (x basis)`` or ``weight * x^T (grad basis)``."""
        basis = self._cast
        flat = self.layer.tokens(grad)
        if self._from_input:
            thin = self.layer.tokens(self.layer.down(x, basis.mT))
            product = flat.mT @ thin
        else:
            product = _transposed(self.layer, x, flat @ basis, grad)
        self.sum.add_(product, alpha=weight)

    def finish_pass(self, tokens: float) -> None:
        """Turn the sum into the next basis and the current triplets."""
        total = all_reduce(self.sum) / tokens
        if not torch.isfinite(total).all():
            raise GradientError(
                "a calibration gradient is not finite: check the data, or calibrate in float32 or bfloat16"
            )
        if self.passes == 0:
            # E ||G Omega||_F^2 = k ||G||_F^2 for a standard normal Omega.
            self.frobenius2 = float(total.square().sum()) / self.width
        else:
            self._triplets(total)
        self.passes += 1
        self.basis = orthonormal(total)
        self.sum = self._cast = torch.empty(0)

    def _triplets(self, total: Tensor) -> None:
        left, s, right = truncated_svd(total, self.width)
        across = self.basis @ right
        u, v = (left, across) if self._from_input else (across, left)
        energy = float(s[: self.rank].square().sum())
        self.energies.append(energy)
        explained = min(1.0, energy / self.frobenius2) if self.frobenius2 else 1.0
        self.result = GradientSVD(u, s, v, self._captured(s), explained, self.passes + 1)

    def _captured(self, s: Tensor) -> float:
        """Energy found over energy expected at convergence.

        Each pass contracts a Ritz value's error by about ``(s_k / s_i)^2`` (k the width), so what is still missing is the
        last gain continued as a geometric series. One energy gives no gain to continue: not known yet, reported as 0.
        """
        if self.width == min(self.layer.out_features, self.layer.in_features):
            return 1.0  # the basis spans the whole space
        if len(self.energies) < 2 or self.energies[-1] == 0:
            return 0.0 if self.energies[-1] else 1.0
        gain = max(0.0, self.energies[-1] - self.energies[-2])
        ratio = min(0.95, float(s[-1] / s[self.rank - 1]) ** 2)
        return self.energies[-1] / (self.energies[-1] + gain * ratio / (1 - ratio))


def _transposed(layer: Layer, x: Tensor, thin: Tensor, grad: Tensor) -> Tensor:
    """``x^T thin`` (in, k) for any kind of layer: the adjoint of ``down`` in its matrix."""
    if isinstance(layer, LinearLayer) or (x.is_floating_point() and x.shape[:-1] == grad.shape[:-1]):
        return x.reshape(-1, x.shape[-1]).mT @ thin
    with torch.enable_grad():
        probe = torch.zeros(thin.shape[1], layer.in_features, dtype=thin.dtype, device=thin.device, requires_grad=True)
        return torch.autograd.grad(layer.tokens(layer.down(x.detach(), probe)), probe, thin)[0].mT


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
    seed: int = 0,
) -> GradientReport:
    """The leading ``rank`` singular triplets of every target's full gradient of the token-mean loss.

    Args:
        model: the model, adapters not yet attached; weights may be frozen or quantised, they only have to run.
        targets: the weights whose gradients are wanted.
        calibration: the data; ``passes`` passes are made over it.
        rank: triplets wanted. The sketch is ``rank + oversample`` wide, cut to ``min(out, in)``.
        oversample: extra width; more captures more per pass.
        passes: at least 2: range, (power steps,) projection.
        tolerance: if set, targets whose estimated ``captured`` is below it get further passes, up to ``max_passes``.
        max_passes: bound on the passes a tolerance may ask for.
        seed: of the random start.

    Memory: ``(out + in) * width`` float32 per target; the (out, in) gradient is never formed. Additive over micro-batches
    and ranks. Cost per pass: a frozen forward and backward pass plus ``2 * tokens * width * (in + out)`` multiply-adds
    per target.
    """
    begin = time.perf_counter()
    sketches = {t.name: _Sketch(t, rank, rank + oversample, seed) for t in targets}
    by_name, open_ = {t.name: t for t in targets}, dict(sketches)
    done, loss, tokens = 0, float("nan"), 0.0
    while open_ and done < max(passes, 2 if tolerance is None else max_passes):
        for sketch in open_.values():
            sketch.start_pass()

        def sink(name: str, x: Tensor, grad: Tensor, weight: float, live: dict[str, _Sketch] = open_) -> None:
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


def exact_gradients(
    model: nn.Module, targets: list[Target], calibration: Calibration, *, rank: int | None = None
) -> tuple[dict[str, Tensor], GradientReport]:
    """The full gradients (out, in) themselves in float32 or wider, one pass, and their exact triplets: the sketch's oracle.

    Memory: one full gradient copy of every target.
    """
    begin = time.perf_counter()
    sums = {
        t.name: torch.zeros(t.shape, dtype=torch.promote_types(t.layer.dtype, torch.float32), device=t.layer.device)
        for t in targets
    }
    layers = {t.name: t.layer for t in targets}

    def sink(name: str, x: Tensor, grad: Tensor, weight: float) -> None:
        sums[name].add_(_full_gradient(layers[name], x, grad), alpha=weight)

    loss, tokens = run_pass(model, targets, calibration, sink)
    gradients = {name: all_reduce(total).div_(tokens) for name, total in sums.items()}
    svds = {}
    for name, gradient in gradients.items():
        if not torch.isfinite(gradient).all():
            raise GradientError(
                f"the calibration gradient of {name} is not finite: check the data and the model's dtype"
            )
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
