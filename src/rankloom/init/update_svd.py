"""LoRA-SB (2411.19557): bases and core from the first update that full fine-tuning would have made."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rankloom.adapters import Binding, LowRankAdapter
from rankloom.calibration import Calibration, GradientReport, GradientSVD, full_gradients
from rankloom.errors import RecipeError
from rankloom.init.base import InitContext
from rankloom.init.from_gradient import FromGradient
from rankloom.linalg import leading_svd
from rankloom.parts import part

__all__ = ["UpdateSVD"]


@part("init", "update-svd")
@dataclass(frozen=True)
class UpdateSVD(FromGradient):
    """LoRA-SB's start: an estimate ``M = U diag(S) V^T`` of the first full-fine-tuning update, on the calibration data,

    ``B = U_r``, ``A = V_r^T``, core ``R0 = diag(S_r) / s``, so ``s B R0 A`` is the best rank-r approximation of ``M``.

    ``update="sign"``: ``M = -step_size sign(G)``, AdamW's first step; ``"gradient"``: ``M = -step_size G``, that of plain
    gradient descent. ``step_size`` is the learning rate of that first step, with warm-up ``lr / warm-up steps`` (1e-4 over
    31 steps by default, the published arithmetic runs). Nothing is subtracted: the model starts one step ahead. Without a
    core both factors take the square root.

    The sign needs every entry of the gradient. Targets take turns, as many at a time as fit into ``memory`` GiB of full
    gradients, one pass over the data each turn, and no setting of a sketch matters. The gradient itself is sketched or exact,
    as in every start from it.
    """

    update: Literal["sign", "gradient"] = "sign"
    step_size: float = 1e-4 / 31
    memory: float = 1.0

    @property
    def moves_output(self) -> bool:
        return True

    def check(self) -> None:
        super().check()
        if self.step_size <= 0 or self.memory <= 0:
            raise RecipeError(
                f"init step_size and memory must be positive, got {self.step_size} and {self.memory} (GiB)"
            )

    def gather(self, model: nn.Module, bindings: list[Binding], calibration: Calibration, seed: int) -> GradientReport:
        if self.update == "gradient":
            return super().gather(model, bindings, calibration, seed)
        begin, report = time.perf_counter(), GradientReport(0.0, 0, 0.0, 0.0, 1.0, {})
        for group in self._groups(bindings):
            gradients, report.loss, report.tokens = full_gradients(model, [b.target for b in group], calibration)
            report.passes += 1
            for b in group:
                u, s, v, captured = leading_svd(gradients.pop(b.name).sign_(), b.adapter.rank)
                report.svds[b.name] = GradientSVD(u, s, v, captured, 1.0, 1)
                report.captured = min(report.captured, captured)
        report.seconds = time.perf_counter() - begin
        return report

    def _groups(self, bindings: list[Binding]) -> Iterator[list[Binding]]:
        """Consecutive targets whose full gradients fit into ``memory`` together; one at least."""
        group: list[Binding] = []
        size = 0
        for binding in bindings:
            dtype = torch.promote_types(binding.layer.dtype, torch.float32)
            own = binding.layer.out_features * binding.layer.in_features * dtype.itemsize
            if group and size + own > self.memory * 2**30:
                yield group
                group, size = [], 0
            group.append(binding)
            size += own
        yield group

    def apply(self, context: InitContext) -> None:
        gathered: GradientReport = context.evidence
        for binding in context.bindings:
            adapter: LowRankAdapter = binding.adapter
            u, s, v = gathered.svds[binding.name].top(adapter.rank)
            live: Tensor = s > torch.finfo(s.dtype).eps * s[0]
            adapter.start(-u, torch.where(live, self.step_size / adapter.scale * s, 0), v.mT)
        context.report.update(gathered.summary())
