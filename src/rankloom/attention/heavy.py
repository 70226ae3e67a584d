"""Keys that weigh so much that a smooth factor spends itself on them: few, and better taken exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from rankloom.attention.precondition import Preconditioner
from rankloom.errors import RecipeError

__all__ = ["heaviness", "heavy_threshold"]


def heaviness(preconditioner: Preconditioner, k: Tensor) -> Tensor:
    """How much weight a key ``k`` (L, d) can hold, in logs and up to a constant, without a gradient: (L,).

    The root mean square, over Gaussian queries ``q~`` of covariance ``diag(Sig)``, of the key's weight relative to the
    row's expected denominator ``exp(q~^T diag(Sig) q~ / 2)``. In the :class:`Preconditioner`'s symbols its log is

        scale c . (k_j - m) + sum_i k~_ji^2 Sig_i / (1 + 2 Sig_i^2).

    It depends on the key alone, so a threshold on it is strictly causal. In heads with Gaussian keys and logits of standard
    deviation 1.5 and more, a few percent of the keys hold most of what a factor gets wrong.
    """
    fitted, keys = preconditioner, preconditioner.keys(k.detach())
    spectrum = fitted.spectrum
    with torch.autocast(k.device.type, enabled=False):
        log_weight = (k.detach().to(keys) - fitted.key_mean.to(keys)) @ (fitted.scale * fitted.query_mean).to(keys)
        return log_weight + keys.square() @ (spectrum / (1 + 2 * spectrum.square())).to(keys)


def heavy_threshold(preconditioner: Preconditioner, k: Tensor, share: float) -> float:
    """The heaviness that ``share`` of the keys ``k`` (L, d) reach, infinite for ``share = 0``.

    Raises ``RecipeError`` for a share outside ``[0, 1]``.
    """
    if not 0 <= share <= 1:
        raise RecipeError(f"the share of heavy keys must lie in [0, 1], got {share}")
    count = round(share * len(k))
    return float(heaviness(preconditioner, k).topk(count).values[-1]) if count else torch.inf
