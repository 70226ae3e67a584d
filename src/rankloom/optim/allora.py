"""ALLoRA (2410.09692): the gradient of every row of ``B`` times an inverse function of the row's norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankloom.errors import RecipeError
from rankloom.optim.pairs import PairStack
from rankloom.optim.preconditioned import ActsOn, Preconditioned
from rankloom.parts import part

__all__ = ["ALLoRA"]


@part("optimizer", "allora")
@dataclass(frozen=True)
class ALLoRA(Preconditioned):
    """``c(b_i) = 1 / sqrt(||b_i|| + 1 / eta^2)`` on the gradient of row ``b_i`` (r,) of ``B``; ``A``'s gradient is left alone.

    A row at zero gets ``eta`` and escapes sooner, a large one ``||b_i||^(-1/2)``. Meant with ``s = 1`` and no dropout.
    AdamW absorbs a scale that changes slowly: ``acts_on="direction"`` applies c after it, as a learning rate of the row.
    """

    eta: float = 2.0
    acts_on: ActsOn = "gradient"

    def check(self) -> None:
        super().check()
        if self.eta <= 0:
            raise RecipeError(f"optimizer.eta must be above 0, got {self.eta}")

    def precondition(self, pairs: PairStack) -> tuple[Tensor, Tensor]:
        norms = torch.linalg.vector_norm(pairs.b, dim=-1, keepdim=True)
        return pairs.grad_a, pairs.grad_b * (norms + self.eta**-2).rsqrt()

    def options(self) -> dict[str, Any]:
        return {"acts_on": self.acts_on}
