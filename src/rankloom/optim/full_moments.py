"""Adam's moments in the space of the full weight, for pairs whose gradients stand for a full gradient (LoRA-Pro's Adam)."""

from __future__ import annotations

import torch
from torch import Tensor

from rankloom.optim.pairs import Pair, stacked
from rankloom.optim.preconditioned import Gradients, PreconditionedOptimizer, by_parameter

__all__ = ["FullMomentOptimizer"]


class FullMomentOptimizer(PreconditionedOptimizer):
    """LoRA-Pro's Adam (2407.18242): transform, Adam on the equivalent gradient, back to the pair, transform again.

    ``E = s (B g_A + g_B A)``; ``N = Adam(E)`` (out, in); then ``transform`` of ``G_A = s B^T N``, ``G_B = s N A^T`` is what
    the pair moves along, ``p <- (1 - lr wd) p - lr g``. Moments are the state of the pair's ``B``. The inner optimizer moves
    all other tensors, and its ``betas`` and ``eps`` hold here.
    """

    def _step(self, raw: Gradients) -> None:
        factors = {p for pair in self.pairs for p in pair.factors}
        new = self._transformed(raw)
        self._feed({p: g for p, g in raw.items() if p not in factors})
        rates = {p: group["lr"] for group in self.param_groups for p in group["params"]}
        self._write({p: g * -rates[p] for p, g in new.items() if g is not None})

    def _transformed(self, gradients: Gradients) -> Gradients:
        new: Gradients = {}
        for members, stack in stacked(self.pairs, gradients):
            grad_a, grad_b = self.transform(stack)
            for i, pair in enumerate(members):
                full = self._adam(pair, pair.scale * (stack.b[i] @ grad_a[i] + grad_b[i] @ stack.a[i]))
                # The stack's gradients have been read: the projections of Adam's direction take their place.
                torch.mm(stack.b[i].mT, full, out=stack.grad_a[i]).mul_(pair.scale)
                torch.mm(full, stack.a[i].mT, out=stack.grad_b[i]).mul_(pair.scale)
            new.update(by_parameter(members, *self.transform(stack)))
        return new

    def _adam(self, pair: Pair, gradient: Tensor) -> Tensor:
        """Adam's direction for a full gradient (out, in)."""
        state, (beta1, beta2) = self.state[pair.b], self.defaults["betas"]
        if not state:
            empty = torch.zeros_like(gradient, dtype=pair.b.dtype)
            state.update(step=torch.tensor(0.0), exp_avg=empty, exp_avg_sq=empty.clone())
        state["step"] += 1
        state["exp_avg"].lerp_(gradient.to(pair.b.dtype), 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(*2 * [gradient.to(pair.b.dtype)], value=1 - beta2)
        step = float(state["step"])
        scale = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(self.defaults["eps"])
        return (state["exp_avg"] / (1 - beta1**step)).div_(scale).to(gradient.dtype)
