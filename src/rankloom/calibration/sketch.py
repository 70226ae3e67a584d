"""A streamed, two-sided sketch of one gradient, which is never formed.

``G = sum grad_y^T x`` (out, in), so ``G P = sum grad_y^T (x P)`` and ``G^T Q = sum x^T (grad_y Q)`` are sums over tokens of
thin products. Each pass over the data multiplies ``G`` from both sides. The first pass uses random bases and finds the
ranges; every later one multiplies the current singular subspaces, and :func:`rankloom.linalg.two_sided_svd` puts both
products together, which moves both subspaces by one power of ``G`` more than a one-sided projection would.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankloom.calibration.data import all_reduce
from rankloom.errors import GradientError, TargetError
from rankloom.layers import Conv2dLayer, Layer, LinearLayer
from rankloom.linalg import fix_signs, orthonormal, truncated_svd, two_sided_svd
from rankloom.targets import Target

__all__ = ["AlternatingSketch", "GradientSVD", "Sketch", "target_generator"]


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


def target_generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for every target, so results do not depend on the order or number of other targets."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Sketch:
    """The state of one target: two thin bases, the two sums of the current pass, and the energies of earlier passes."""

    powers: ClassVar[int] = 4
    """Of the ratio of singular values by which the missing energy shrinks a pass: both subspaces gain a power of ``G``."""

    def __init__(self, target: Target, rank: int, width: int, seed: int) -> None:
        if isinstance(target.layer, Conv2dLayer) and target.layer.grouped:
            raise TargetError(f"{target.name} is a grouped convolution: its gradient needs exact mode (method='exact')")
        fan_out, fan_in = target.shape
        self.layer, self.rank = target.layer, min(rank, fan_out, fan_in)
        self.width = min(width, fan_out, fan_in)
        self.dtype = torch.promote_types(self.layer.dtype, torch.float32)
        generator = target_generator(seed, target.name)
        self.right, self.left = (
            torch.randn(n, self.width, generator=generator, dtype=self.dtype).to(self.layer.device)
            for n in (fan_in, fan_out)
        )
        self.passes, self.frobenius2 = 0, 0.0
        self.energies: list[float] = []
        self.result: GradientSVD | None = None

    def start_pass(self) -> None:
        """Clear the sums and bring the bases to the dtype the model computes in."""
        self.image, self.coimage = torch.zeros_like(self.left), torch.zeros_like(self.right)
        self._left, self._right = self.left.to(self.layer.dtype), self.right.to(self.layer.dtype)

    def add(self, x: Tensor, grad: Tensor, weight: float) -> None:
        """Add one micro-batch: ``weight * grad^T (x P)`` to the image, ``weight * x^T (grad Q)`` to the coimage."""
        self.image.add_(_forward(self.layer, x, self._right, grad), alpha=weight)
        self.coimage.add_(_transposed(self.layer, x, self._left, grad), alpha=weight)

    def finish_pass(self, tokens: float) -> None:
        """Turn the sums into the triplets found so far and the next bases."""
        image, coimage = _mean(self.image, tokens), _mean(self.coimage, tokens)
        self.passes += 1
        if self.passes == 1:
            # E ||G Omega||_F^2 = k ||G||_F^2 for a standard normal Omega, on either side.
            self.frobenius2 = float(image.square().sum() + coimage.square().sum()) / (2 * self.width)
            self.left, self.right = orthonormal(image), orthonormal(coimage)
        else:
            u, s, v = two_sided_svd(self.left, self.right, image, coimage, self.width)
            self._record(u, s, v, proven=min(_energy(image, self.rank), _energy(coimage, self.rank)))
            self.left, self.right = u.contiguous(), v.contiguous()
        self.image = self.coimage = self._left = self._right = torch.empty(0)

    def _record(self, u: Tensor, s: Tensor, v: Tensor, proven: float) -> None:
        energy = float(s[: self.rank].square().sum())
        self.energies.append(energy)
        explained = min(1.0, energy / self.frobenius2) if self.frobenius2 else 1.0
        self.result = GradientSVD(u, s, v, self._captured(s, proven), explained, self.passes)

    def _captured(self, s: Tensor, proven: float) -> float:
        """Energy found over energy expected at convergence.

        What is missing shrinks by about ``(s_k / s_r)^powers`` a pass (k the width), so the last gain continues as a geometric
        series. The gain is counted from the last estimate or from ``proven``, the
        energy the previous subspaces are now seen to hold, whichever is the more cautious; the ratio is taken as 0.1 at
        least, since the sketch's own tail, not yet converged, makes it look smaller than it is. One energy has no gain to
        continue: not known yet, reported as 0.
        """
        energy = self.energies[-1]
        if energy == 0 or self.width == min(self.layer.out_features, self.layer.in_features):
            return 1.0  # nothing to capture, or a basis that spans its whole space
        if len(self.energies) < 2:
            return 0.0
        gain = max(abs(energy - self.energies[-2]), abs(energy - proven))
        ratio = min(0.9, max(0.1, float(s[-1] / s[self.rank - 1]) ** self.powers))
        return energy / (energy + gain * ratio / (1 - ratio))


class AlternatingSketch(Sketch):
    """One product a pass, ``G P`` and ``G^T Q`` in turn: half the memory and half the sketch's work, for slower convergence.

    Only the basis of the current pass and its sum are held. Each pass moves one subspace by one power of ``G``.
    """

    powers: ClassVar[int] = 2

    def __init__(self, target: Target, rank: int, width: int, seed: int) -> None:
        super().__init__(target, rank, width, seed)
        self.left = torch.empty(0)

    def start_pass(self) -> None:
        self.result = None  # of its two bases, the pass takes one
        if self.passes % 2:
            self._left, self.right = self.left.to(self.layer.dtype), torch.empty(0)
            self.coimage = self.left.new_zeros(self.layer.in_features, self.width)
        else:
            self._right, self.left = self.right.to(self.layer.dtype), torch.empty(0)
            self.image = self.right.new_zeros(self.layer.out_features, self.width)

    def add(self, x: Tensor, grad: Tensor, weight: float) -> None:
        """Add one micro-batch: ``weight * grad^T (x P)`` to the image, or ``weight * x^T (grad Q)`` to the coimage."""
        if self.passes % 2:
            self.coimage.add_(_transposed(self.layer, x, self._left, grad), alpha=weight)
        else:
            self.image.add_(_forward(self.layer, x, self._right, grad), alpha=weight)

    def finish_pass(self, tokens: float) -> None:
        odd = bool(self.passes % 2)
        product = _mean(self.coimage if odd else self.image, tokens)
        self.passes += 1
        if self.passes == 1:
            self.frobenius2 = float(product.square().sum()) / self.width
            self.left = orthonormal(product)
        else:  # G P P^T = (U) S (P W)^T, or Q Q^T G = (Q W) S (U)^T: exact within the basis
            u, s, w = truncated_svd(product, self.width)
            self.left, self.right = (self.left @ w, u) if odd else (u, self.right @ w)
            self.left, self.right = fix_signs(self.left, self.right)
            self._record(self.left, s, self.right, proven=_energy(product, self.rank))
        self.image = self.coimage = self._left = self._right = torch.empty(0)


def _mean(total: Tensor, tokens: float) -> Tensor:
    mean = all_reduce(total) / tokens
    if not torch.isfinite(mean).all():
        raise GradientError("a calibration gradient is not finite: check the data, or calibrate in float32 or bfloat16")
    return mean


def _energy(product: Tensor, rank: int) -> float:
    return float(product[:, :rank].square().sum())


def _forward(layer: Layer, x: Tensor, basis: Tensor, grad: Tensor) -> Tensor:
    """``grad^T (x P)`` (out, k) for a basis ``P`` (in, k)."""
    return (layer.tokens(layer.down(x, basis.mT)).mT @ layer.tokens(grad)).mT


def _transposed(layer: Layer, x: Tensor, basis: Tensor, grad: Tensor) -> Tensor:
    """``x^T (grad Q)`` (in, k) for a basis ``Q`` (out, k) and any kind of layer: the adjoint of ``down`` in its matrix."""
    thin = layer.tokens(grad) @ basis
    if isinstance(layer, LinearLayer) or (x.is_floating_point() and x.shape[:-1] == grad.shape[:-1]):
        return x.reshape(-1, x.shape[-1]).mT @ thin
    with torch.enable_grad():
        probe = torch.zeros(thin.shape[1], layer.in_features, dtype=thin.dtype, device=thin.device, requires_grad=True)
        return torch.autograd.grad(layer.tokens(layer.down(x.detach(), probe)), probe, thin)[0].mT
