"""CorDA (2406.05223): the weight's components as the inputs' covariance sees them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rankloom.adapters import Binding, LowRankAdapter
from rankloom.calibration import Calibration, activation_covariances
from rankloom.errors import DataError
from rankloom.init.base import InitContext, InitPart
from rankloom.linalg import leading_svd, truncated_svd
from rankloom.parts import part

__all__ = ["CovarianceSVD", "damped_inverse"]


def damped_inverse(covariance: Tensor, *, damping: float = 0.01, tolerance: float = 0.05) -> tuple[Tensor, Tensor]:
    """``C + d I`` and its inverse, ``d = damping * mean(diag C)``, doubled until ``||C C^-1 - I||_F < tolerance``.

    Raises:
        DataError: a covariance that is zero or not finite.
    """
    mean = covariance.diagonal().mean()
    if not torch.isfinite(covariance).all() or not mean > 0:
        raise DataError("the activations are all zero or not finite: check the calibration data and the model's dtype")
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    while True:
        damped = covariance + damping * mean * eye
        inverse = torch.linalg.inv(damped)
        if torch.linalg.matrix_norm(damped @ inverse - eye) < tolerance:
            return damped, inverse
        damping *= 2


@part("init", "covariance-svd")
@dataclass(frozen=True)
class CovarianceSVD(InitPart):
    """CorDA's start: with ``C = mean x x^T`` of the target's inputs on the calibration data (damped, see
    :func:`damped_inverse`) and ``W C = U diag(S) V^T``, so that ``W = U diag(S) (V^T C^-1)``,

    ``B0 = U diag(sqrt(S / s))``, ``A0 = diag(sqrt(S / s)) V^T C^-1`` over r components, and ``s B0 A0`` is subtracted.

    ``mode="instruction"`` (IPM, previewing): the r largest components, for calibration data of the task itself.
    ``mode="knowledge"`` (KPM, preserving): the r smallest, for data of the knowledge that has to stay. A core takes
    ``S / s`` between ``U`` and ``V^T C^-1``. Forward passes only; memory: one (in, in) matrix for every distinct input.
    """

    mode: Literal["instruction", "knowledge"] = "instruction"

    evidence: ClassVar[Literal["none", "weight", "gradient", "activations"]] = "activations"
    offset: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"factors"})

    def gather(
        self, model: nn.Module, bindings: list[Binding], calibration: Calibration, seed: int
    ) -> tuple[dict[str, Tensor], float]:
        begin = time.perf_counter()
        found = activation_covariances(model, [binding.target for binding in bindings], calibration)
        return found, time.perf_counter() - begin

    def apply(self, context: InitContext) -> None:
        found: dict[str, Tensor]
        found, seconds = context.evidence
        inverses: dict[int, tuple[Tensor, Tensor]] = {}  # targets that read one input share its covariance
        for binding in context.bindings:
            adapter: LowRankAdapter = binding.adapter
            covariance = found[binding.name]
            if id(covariance) not in inverses:
                inverses[id(covariance)] = damped_inverse(covariance)
            damped, inverse = inverses[id(covariance)]
            oriented = binding.layer.weight().to(damped) @ damped
            if self.mode == "instruction":
                u, s, v, _ = leading_svd(oriented, adapter.rank, generator=context.generator(binding))
            else:
                u, s, v = (t[..., -adapter.rank :] for t in truncated_svd(oriented, min(oriented.shape)))
            adapter.start(u, s / adapter.scale, v.mT @ inverse)
        context.report.update(seconds=seconds)
