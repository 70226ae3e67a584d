"""Coordinates in which a head's logits are small, balanced between queries and keys, and ordered by how much they matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankloom.errors import AttentionError
from rankloom.linalg import damped

__all__ = ["Preconditioner"]


@dataclass(frozen=True)
class Preconditioner:
    """A change of coordinates ``q~``, ``k~`` and a log-weight for every key that leave softmax attention as it is:

        scale q_i . k_j = q~_i . k~_j + lw_j + (a constant of row i).

    *Centre*: with the means ``c`` of the queries and ``m`` of the keys, ``lw_j = scale c . (k_j - m)`` and the rest is the
    product of ``q - c`` and ``k - m``. *Balance*: with ``C_q = R_q R_q^T`` and ``C_k = R_k R_k^T`` the centred covariances
    (queries times ``scale``) and ``R_q^T R_k = U diag(Sig) V^T``, the maps ``q~ = scale (q - c) R_k V Sig^-1/2`` and
    ``k~ = (k - m) R_q U Sig^-1/2`` keep every product and give both clouds the covariance ``diag(Sig)``, descending.
    ``sum Sig_i^2`` is the variance of the centred logits.

    Both identities hold for any tensors, not only those that were fitted to; the fit is a constant for gradients.
    (Preparation for the polynomial method of arXiv 2302.13214 and 2406.03136, whose degree grows with the largest logit.)
    """

    scale: float
    query_mean: Tensor
    key_mean: Tensor
    query_map: Tensor
    key_map: Tensor
    spectrum: Tensor

    @classmethod
    def fit(
        cls, q: Tensor, k: Tensor, scale: float, *, rows: int = 4096, generator: torch.Generator | None = None
    ) -> Preconditioner:
        """Fit to queries ``q`` (n, d) and keys ``k`` (m, d), at most ``rows`` random ones of each, in float64.

        Raises ``AttentionError`` for shapes that do not match, no row, or entries that are not finite.
        """
        if q.dim() != 2 or k.dim() != 2 or q.shape[1] != k.shape[1] or not len(q) or not len(k):
            raise AttentionError(
                f"a preconditioner is fitted to queries (n, d) and keys (m, d) of one width, n, m >= 1; "
                f"got {tuple(q.shape)} and {tuple(k.shape)}: flatten the query heads of one key head into rows"
            )
        q, k = (_sample(t.detach(), rows, generator) for t in (q, k))
        if not (q.isfinite().all() and k.isfinite().all()):
            raise AttentionError("queries or keys hold NaN or infinity: check the model's weights and inputs")
        query_mean, key_mean = q.mean(0), k.mean(0)
        root_q, root_k = _root((q - query_mean) * scale), _root(k - key_mean)
        u, spectrum, vh = torch.linalg.svd(root_q.mT @ root_k)
        balance = spectrum.rsqrt()
        query_map, key_map = scale * (root_k @ vh.mT) * balance, (root_q @ u) * balance
        return cls(scale, query_mean, key_mean, query_map, key_map, spectrum)

    def queries(self, q: Tensor) -> Tensor:
        """``q~`` of ``q`` (..., d), in float32 at least."""
        return _apply(q, self.query_mean, self.query_map)

    def keys(self, k: Tensor) -> Tensor:
        """``k~`` of ``k`` (..., d), in float32 at least."""
        return _apply(k, self.key_mean, self.key_map)

    def log_weights(self, k: Tensor, among: Tensor | None = None) -> Tensor:
        """``lw`` of the keys ``k`` (L, d), shifted so that the largest of them, or ``among`` keys (n, d), is 0: (L,)."""
        centre = self.scale * self.query_mean
        weights = _apply(k, self.key_mean, centre)
        every = weights if among is None else _apply(among, self.key_mean, centre)
        return weights - every.detach().amax()


def _sample(x: Tensor, rows: int, generator: torch.Generator | None) -> Tensor:
    if len(x) > rows:
        x = x[torch.randperm(len(x), generator=generator)[:rows].to(x.device)]
    return x.double()


def _root(centred: Tensor) -> Tensor:
    """The Cholesky factor of the covariance. The ridge keeps directions without variance invertible, so that the identities
    hold for later queries and keys too; its absolute part covers clouds that are one point."""
    covariance = centred.mT @ centred / len(centred)
    return torch.linalg.cholesky(damped(damped(covariance, 1e-12, relative=True), 1e-30))


def _apply(x: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """``(x - mean) @ matrix`` in float32 at least, also under autocast: half precision would be the largest error of all."""
    x = x if x.dtype == torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        return (x - mean.to(x)) @ matrix.to(x)
