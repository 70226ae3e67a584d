"""LoRA-One (2502.01235): start as the best rank-r step along one full negative gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rankloom.adapters import Binding, LowRankAdapter
from rankloom.calibration import GradientReport, GradientSVD
from rankloom.errors import GradientError, RecipeError
from rankloom.init.base import InitContext
from rankloom.init.from_gradient import FromGradient
from rankloom.init.random import kaiming_rows
from rankloom.parts import part

__all__ = ["OneStepGradient"]


@part("init", "one-step-gradient")
@dataclass(frozen=True)
class OneStepGradient(FromGradient):
    """LoRA-One's start, Algorithm 1: with ``N = -G = U diag(S) V^T`` the negative full gradient on the calibration data,

    ``B0 = U_r diag(sqrt(S_i / S1)) / sqrt(gamma)``, ``A0 = diag(sqrt(S_i / S1)) V_r^T / sqrt(gamma)``.

    The initial change of every weight has operator norm ``s / gamma``, whatever the gradient's size; nothing is subtracted,
    so the function at step 0 is the pretrained one after a rank-r gradient step.

    ``gamma``: a number, or ``"auto"``: a line search on the calibration loss over ``grid`` (128 where nothing lowers it).
    Directions with ``S_i <= dead * S1`` carry no signal and would never get one, both factors being zero: they start as
    LoRA's do (A random, B zero), and so does a target whose gradient is zero. The other settings are those of every start
    from the gradient.
    """

    gamma: float | Literal["auto"] = 128.0
    dead: float = 1e-6
    grid: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)

    @property
    def moves_output(self) -> bool:
        return True

    def check(self) -> None:
        super().check()
        if (self.gamma != "auto" and self.gamma <= 0) or min(self.grid, default=0) <= 0:
            raise RecipeError(f"init gamma and its grid must be positive, got {self.gamma} and {self.grid}")

    def apply(self, context: InitContext) -> None:
        gathered: GradientReport = context.evidence
        unit = 1.0 if self.gamma == "auto" else self.gamma
        dead = {b.name: self._write(b, gathered.svds[b.name], unit, context) for b in context.bindings}
        context.report.update(gathered.summary(), dead_directions={n: count for n, count in dead.items() if count})
        if self.gamma == "auto":
            self._line_search(context)

    def _write(self, binding: Binding, svd: GradientSVD, gamma: float, context: InitContext) -> int:
        adapter: LowRankAdapter = binding.adapter
        u, s, v = svd.top(adapter.rank)
        live = s > max(self.dead * float(s[0]), torch.finfo(s.dtype).tiny)
        spare = kaiming_rows(adapter.A, binding.layer, context.generator(binding)).to(v)
        values = torch.where(live, s, 0) / s[0].clamp(min=torch.finfo(s.dtype).tiny) / gamma
        adapter.start(-u, values, torch.where(live[:, None], v.mT, spare))
        return adapter.rank - int(live.sum())

    def _line_search(self, context: InitContext) -> None:
        """The gamma of the grid with the lowest calibration loss: one forward pass over the data each."""
        assert context.loss is not None

        def set_gamma(gamma: float) -> None:
            for b in context.bindings:
                self._write(b, context.evidence.svds[b.name], gamma, context)
                b.adapter.initialized(b.layer)

        losses: dict[float, float] = {}
        for gamma in self.grid:
            set_gamma(gamma)
            losses[gamma] = context.loss()
        finite = {g: loss for g, loss in losses.items() if loss == loss}
        if not finite:
            raise GradientError(
                "no gamma of the grid gives a finite calibration loss: set init.gamma, or larger grid values"
            )
        best = min(finite, key=lambda g: finite[g])
        if finite[best] >= context.report["loss"]:
            best = 128.0
        set_gamma(best)
        context.report.update(gamma=best, gamma_losses=losses)
