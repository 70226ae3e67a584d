"""Keys that weigh so much that a smooth factor spends itself on them: few, and better taken exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from rankloom.attention.precondition import Preconditioner
from rankloom.errors import RecipeError

__all__ = ["heaviness", "heavy_threshold"]


def heaviness(preconditioner: Preconditioner, k: Tensor) -> Tensor:
    """The log of the root mean square weight of every key ``k`` (L, d) over Gaussian queries, without a gradient: (L,).

    With ``q~`` of covariance ``diag(Sig)``, ``E exp(q~ . k~)^2 = exp(2 k~^T diag(Sig) k~)``, so this is

        scale c . (k_j - m) + k~_j^T diag(Sig) k~_j

    in the :class:`Preconditioner`'s symbols. It depends on the key alone, so a threshold on it is strictly causal. In
    heads with Gaussian keys and logits of standard deviation 1.5 and more, a few percent of the keys hold most of what a
    factor gets wrong.
    """
    fitted, keys = preconditioner, preconditioner.keys(k.detach())
    log_weight = (k.detach().to(keys) - fitted.key_mean.to(keys)) @ (fitted.scale * fitted.query_mean).to(keys)
    return log_weight + keys.square() @ fitted.spectrum.to(keys)


def heavy_threshold(preconditioner: Preconditioner, k: Tensor, share: float) -> float:
    """The heaviness that ``share`` of the keys ``k`` (L, d) reach, infinite for ``share = 0``.

    Raises ``RecipeError`` for a share outside ``[0, 1]``.
    """
    if not 0 <= share <= 1:
        raise RecipeError(f"the share of heavy keys must lie in [0, 1], got {share}")
    count = round(share * len(k))
    return float(heaviness(preconditioner, k).topk(count).values[-1]) if count else torch.inf
