"""The kernel ``exp(q . k)`` through landmarks among the keys (Nystrom), chosen by randomly pivoted Cholesky.

Pivoting: Chen, Epperly, Tropp, Webber (arXiv 2207.06503); in blocks with rejection: Epperly, Tropp, Webber (arXiv 2410.03969).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankloom.attention.contract import Factor
from rankloom.errors import AttentionError, RecipeError

__all__ = ["Nystrom"]

_JITTER = 1e-9
_CANDIDATES = 2048
_HELD_OUT = 512


class Nystrom(Factor):
    """``exp(q . k) ~ phi(q)^T H^-1 phi(k)`` with one feature for each landmark ``l_s``:

        phi_s(x) = exp(x . l_s - |l_s|^2 / 2),   H_st = exp(-|l_s - l_t|^2 / 2).

    Exact where ``q`` or ``k`` is a landmark. ``H`` has ones on its diagonal; ``H + 1e-9 I`` is factored in float64, whatever
    the features' dtype, so that the floor of the approximation is the features' own rounding (near 1e-5 in float32).

    landmarks: (width, dim), detached. Raises ``AttentionError`` where they are not finite or not a matrix.
    """

    def __init__(self, landmarks: Tensor) -> None:
        if landmarks.dim() != 2 or not len(landmarks):
            raise AttentionError(f"landmarks are (width, dim) with width >= 1, got shape {tuple(landmarks.shape)}")
        if not landmarks.isfinite().all():
            raise AttentionError("landmarks must be finite: check the keys for NaN and infinity")
        self.width, self.dim = landmarks.shape
        self.landmarks = landmarks.detach()
        exact = self.landmarks.double()
        self._half_norms = exact.square().sum(1) / 2
        gram = _kernel(exact, self._half_norms)
        self._lower = torch.linalg.cholesky(
            gram + _JITTER * torch.eye(self.width, dtype=gram.dtype, device=gram.device)
        )

    @classmethod
    def fit(cls, keys: Tensor, width: int, *, generator: torch.Generator | None = None) -> Nystrom:
        """Up to ``width`` landmarks among ``keys`` (n, dim): fewer where the keys have no more to offer (repeated keys).

        Pivots are drawn from ``max(2048, 2 width)`` candidates by what is left of ``exp(k . k')``, which suits smooth
        heads, again by what is left of ``exp(-|k - k'|^2 / 2)``, which suits clustered ones, and a third time uniformly;
        kept is the set with the smallest error of the attention weights between keys held out of the candidates.
        Raises ``RecipeError`` for a width below 1 or above what the keys allow, ``AttentionError`` for keys that are not finite.
        """
        held = min(_HELD_OUT, len(keys) // 4)
        if not 1 <= width <= len(keys) - held:
            raise RecipeError(
                f"{len(keys)} keys allow between 1 and {len(keys) - held} landmarks, got width={width}: pass more keys"
            )
        if not keys.isfinite().all():
            raise AttentionError("keys must be finite: check the layer's input for NaN and infinity")
        order = torch.randperm(len(keys), generator=generator).to(keys.device)
        exact = keys.detach()[order[: held + max(_CANDIDATES, 2 * width)]].double()
        unseen, candidates = exact[:held], exact[held:]
        half_norms = candidates.square().sum(1) / 2
        smooth, clustered = (
            candidates[_pivots(candidates, shift, width, generator)]
            for shift in (half_norms.max().expand_as(half_norms), half_norms)
        )
        sets = (cls(landmarks.to(keys.dtype)) for landmarks in (smooth, clustered, candidates[: len(clustered)]))
        return min(sets, key=lambda factor: factor._error(*unseen.tensor_split(2)))

    def features(self, x: Tensor) -> Tensor:
        return torch.addmm(-self._half_norms.to(x)[:, None], self.landmarks.to(x), x).exp_()

    def pull_back(self, x: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        return self.landmarks.to(x).mT @ (grad * features)

    def mix(self, state: Tensor) -> Tensor:
        return torch.cholesky_solve(state.double(), self._lower).to(state.dtype)

    def _error(self, queries: Tensor, keys: Tensor) -> float:
        """The relative Frobenius error of ``softmax(queries keys^T)``, infinite where a row has no positive sum."""
        wanted = (queries @ keys.mT).softmax(1)
        got = self.features(queries.mT).mT @ self.mix(self.features(keys.mT))
        sums = got.sum(1, keepdim=True)
        return float((got / sums - wanted).norm() / wanted.norm()) if bool((sums > 0).all()) else torch.inf


def _kernel(x: Tensor, shift: Tensor, y: Tensor | None = None, shift_y: Tensor | None = None) -> Tensor:
    y, shift_y = (x, shift) if y is None or shift_y is None else (y, shift_y)
    return (x @ y.mT - shift[:, None] - shift_y).exp_()


def _pivots(x: Tensor, shift: Tensor, width: int, generator: torch.Generator | None, block: int = 128) -> Tensor:
    """Up to ``width`` rows of ``x`` (n, d), drawn in turn by the residual diagonal of ``exp(x_i . x_j - shift_i - shift_j)``.

    Rows explained to within the jitter are never drawn. Each round proposes a block from the same residual and goes through
    it in turn, accepting a row with the share that the ones accepted before it have left: the law of single draws at the
    speed of matrix products.
    """
    whole = (x.square().sum(1) - 2 * shift).exp()
    left, factor, chosen = whole, x.new_zeros(len(x), width), x.new_zeros(0, dtype=torch.long)
    while len(chosen) < width and bool(left.any()):
        done = len(chosen)
        drawn = torch.multinomial(left.cpu(), block, replacement=True, generator=generator).to(x.device)
        columns = _kernel(x, shift, x[drawn], shift[drawn]) - factor[:, :done] @ factor[drawn, :done].mT
        taken = _accepted(columns[drawn], generator)[: width - done]
        lower = torch.linalg.cholesky(columns[drawn[taken]][:, taken])
        fresh = torch.linalg.solve_triangular(lower, columns[:, taken].mT, upper=False).mT
        factor[:, done : done + len(taken)] = fresh
        left = left - fresh.square().sum(1)
        left = torch.where(left > _JITTER * whole, left, 0.0)
        left[drawn[taken]] = 0.0
        chosen = torch.cat([chosen, drawn[taken]])
    return chosen


def _accepted(residual: Tensor, generator: torch.Generator | None) -> Tensor:
    """The accepted positions of one proposed block, from its residual kernel (b, b)."""
    residual, device = residual.cpu(), residual.device
    bar = residual.diagonal() * torch.rand(len(residual), generator=generator, dtype=residual.dtype)
    taken = []
    for i, limit in enumerate(bar.tolist()):
        pivot = float(residual[i, i])
        if pivot > limit:
            taken.append(i)
            residual = torch.addr(residual, residual[:, i], residual[i], alpha=-1 / pivot)
    return torch.tensor(taken, device=device)
