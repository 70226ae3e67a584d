"""LoRA-Pro (2407.18242): the gradients of a pair whose step comes closest to a step along the full gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer

from rankloom.adapters import Trainable
from rankloom.errors import RecipeError
from rankloom.linalg import damped, spd_inverse, spd_sylvester
from rankloom.optim.full_moments import FullMomentOptimizer
from rankloom.optim.pairs import PairStack, find_pairs
from rankloom.optim.preconditioned import Preconditioned
from rankloom.parts import part

__all__ = ["LoRAPro", "Split", "adjusted"]

Split = Literal["sylvester", "symmetric", "zero"]


def adjusted(pairs: PairStack, split: Split, damping: float) -> tuple[Tensor, Tensor]:
    """The closed form, with ``K_B = B^T B``, ``K_A = A A^T`` and any ``X`` (r, r):

    ``g_A = K_B^-1 G_A / s^2 + X A``, ``g_B = (I - B K_B^-1 B^T) G_B K_A^-1 / s^2 - B X``.

    ``split`` says which ``X``: the one that keeps both nearest to ``G_A``, ``G_B``, by
    ``K_B X + X K_A = -K_B^-1 G_A A^T / s^2``; half of the shared part for each factor; or zero.
    """
    gram_a, gram_b = (damped(gram, damping, relative=True) for gram in (pairs.gram_a, pairs.gram_b))
    inverse_a, inverse_b = spd_inverse(gram_a), spd_inverse(gram_b)
    weight = pairs.scale**-2
    # G_A A^T and B^T G_B are one matrix, s B^T G A^T: the part of the gradient that either factor could take.
    shared = weight * inverse_b @ (pairs.grad_a @ pairs.a.mT)
    half = {"symmetric": -0.5, "zero": 0.0}
    x = half[split] * shared @ inverse_a if split in half else spd_sylvester(gram_b, gram_a, -shared)
    return (
        weight * inverse_b @ pairs.grad_a + x @ pairs.a,
        weight * pairs.grad_b @ inverse_a - pairs.b @ (shared @ inverse_a + x),
    )


@part("optimizer", "lora-pro")
@dataclass(frozen=True)
class LoRAPro(Preconditioned):
    """Adjusted gradients ``g_A``, ``g_B`` with the least ``||s (B g_A + g_B A) - G||_F``, fed to AdamW or SGD.

    The equivalent gradient is ``G - (I - P_B) G (I - P_A)`` (``P_B``, ``P_A`` project on B's columns and A's rows): all of
    the full gradient that the pair can express, the same for every alpha and every way to split the product into factors.
    ``split`` shares what either factor could take; it does not change the equivalent gradient. See :func:`adjusted`.

    ``moments="low-rank"``: the inner AdamW's moments are of ``g_A``, ``g_B``. ``"full"``, the paper's main form, keeps Adam's
    moments of the equivalent gradient, ``2 in * out`` numbers a weight. ``damping`` is relative to a Gram's mean eigenvalue.
    """

    split: Split = "sylvester"
    moments: Literal["low-rank", "full"] = "low-rank"
    damping: float = 1e-6

    def check(self) -> None:
        super().check()
        if self.damping < 0:
            raise RecipeError(f"optimizer.damping must not be negative, got {self.damping}")
        if self.moments == "full" and self.inner != "adamw":
            raise RecipeError("optimizer.moments='full' are Adam's: use optimizer.inner='adamw'")

    def precondition(self, pairs: PairStack) -> tuple[Tensor, Tensor]:
        return adjusted(pairs, self.split, self.damping)

    def build(self, trainables: list[Trainable], lr: float, weight_decay: float | None = None) -> Optimizer:
        if self.moments == "low-rank":
            return super().build(trainables, lr, weight_decay)
        inner = self.build_inner(trainables, lr, weight_decay)
        return FullMomentOptimizer(inner, find_pairs(trainables), self.precondition)
