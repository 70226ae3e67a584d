"""Riemannian preconditioned LoRA (2402.02347): each factor's gradient over the other factor's Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rankloom.errors import RecipeError
from rankloom.linalg import damped, spd_inverse
from rankloom.optim.pairs import PairStack
from rankloom.optim.preconditioned import ActsOn, Order, Preconditioned
from rankloom.parts import part

__all__ = ["Riemannian"]


@part("optimizer", "riemannian")
@dataclass(frozen=True)
class Riemannian(Preconditioned):
    """Scaled gradients: ``(B^T B + lambda I)^-1 dA`` and ``dB (A A^T + lambda I)^-1``, fed to AdamW (or SGD: scaled GD).

    Without damping the change of ``W`` is, to first order, ``-lr s^2 (P_B G + G P_A)``, whichever way the product is split
    into factors (``P_B``, ``P_A`` project on B's columns and A's rows); convergence does not depend on the condition number
    of what is learnt. It is also the preconditioner of LoRA-One (2502.01235, eq. 9).

    ``damping`` is lambda; ``relative`` takes it times the Gram's mean eigenvalue. At LoRA's start, ``B = 0``, ``A`` does not
    move, and an absolute lambda bounds the kick that its gradient gets right after. ``acts_on="direction"`` preconditions
    AdamW's direction, whose elementwise scale would otherwise undo much of it. ``order="gauss-seidel"`` lets B's Gram be of
    the ``A`` already moved.
    """

    damping: float = 1e-6
    relative: bool = False
    acts_on: ActsOn = "gradient"
    order: Order = "jacobi"

    def check(self) -> None:
        super().check()
        if self.damping < 0:
            raise RecipeError(f"optimizer.damping must not be negative, got {self.damping}")
        if self.acts_on == "direction" and self.order == "gauss-seidel":
            raise RecipeError("optimizer.order='gauss-seidel' works with acts_on='gradient' only: use order='jacobi'")

    def precondition(self, pairs: PairStack) -> tuple[Tensor, Tensor]:
        inverse_a, inverse_b = (
            spd_inverse(damped(gram, self.damping, relative=self.relative)) for gram in (pairs.gram_a, pairs.gram_b)
        )
        return inverse_b @ pairs.grad_a, pairs.grad_b @ inverse_a

    def options(self) -> dict[str, Any]:
        return {"acts_on": self.acts_on, "order": self.order}
