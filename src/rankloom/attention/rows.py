r"""Single rows of a head, exact and approximate, and what they add to the gradients.

With the exact attention row ``P_i`` (arXiv 2406.03136 writes f), the output's gradient ``G_i`` there and the row's weight ``w_i``

    O_i = P_i V,   T_i = P_i o (V G_i - G_i . O_i),   dQ_i = scale T_i K,
    dK = scale sum_i w_i T_i^T Q_i,   dV = sum_i w_i P_i^T G_i

and the same sums of the approximate rows follow by differentiating them. Causal rows are taken with the keys up to their last
one, in the order of their positions: half of the work where they lie anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rankloom.attention.contract import Approximation
from rankloom.attention.projection import Projection

__all__ = ["Rows"]

_LOGITS = 2**21  # rows x L at once
_CACHED = 2**17  # logits of exact rows at once, which half a dozen passes go over: they stay in a core's L2 cache


class Rows:
    """One head's exact rows less its approximate ones, for ``q`` (g, L, d), ``k`` (L, d) and ``v`` (L, d_v).

    ``known`` holds the approximate ``output``, and with ``grad`` (g, L, d_v) also ``dQ``.
    """

    def __init__(
        self,
        approximation: Approximation,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        known: Mapping[str, Tensor],
        grad: Tensor | None,
        projections: Mapping[str, Projection],
    ) -> None:
        self.approximation, self.k, self.v = approximation, k, v
        self.projections = {n: p.to(k.dtype) for n, p in projections.items()}
        self.heads, self.length = q.shape[:2]
        self.q, self.out = q.flatten(0, 1), known["output"].flatten(0, 1)
        self.grad = None if grad is None else grad.flatten(0, 1)
        self.dq = None if grad is None else known["dQ"].flatten(0, 1)

    def differences(self, index: Tensor, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Over the rows ``index`` (n,): squared errors (n,) of what is per row, sums with ``weight`` (n,) of what is a sum."""
        order = (index % self.length).argsort()
        index, weight = index[order], weight[order]
        out, dq, dk, dv = self._exact(index, weight)
        squares = {"output": _squares(out - self.out[index])}
        sums = {}
        if self.grad is not None and self.dq is not None:
            approximate_dk, approximate_dv = self._approximate(index, weight)
            dq -= self.dq[index]
            if not self.projections:
                squares["dQ"] = _squares(dq)
            by_head = dq.new_zeros(self.heads, *dq.shape)
            by_head[index // self.length, torch.arange(len(index), device=index.device)] = dq * weight[:, None]
            sums = self.sums(by_head, dk - approximate_dk, dv - approximate_dv, index % self.length)
        return {name: torch.empty_like(t).index_copy_(0, order, t) for name, t in squares.items()}, sums

    def sums(self, dq: Tensor, dk: Tensor, dv: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        """The gradients that are sums over rows, from ``dq`` (g, n, d) at the positions ``at`` (n,), ``dk`` and ``dv`` (L, .)."""
        if not self.projections:
            return {"dK": dk, "dV": dv}
        parts = {"q": (dq, at), "k": (dk[None], None), "v": (dv[None], None)}
        named = {n: p.gradients(*parts[n]) for n, p in self.projections.items()}
        return {f"{factor}_{n}": t for n, pair in named.items() for factor, t in zip(("dA", "dB"), pair, strict=True)}

    def _exact(self, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows (n, .) of the output and of dQ, and the weighted sums dK and dV; zero without an output gradient."""
        out, dq = self.v.new_empty(len(index), self.v.shape[1]), self.q.new_zeros(len(index), self.q.shape[1])
        dk, dv, scale = torch.zeros_like(self.k), torch.zeros_like(self.v), self.approximation.scale
        for part in torch.arange(len(index), device=index.device).split(max(1, _CACHED // self.length)):
            rows, at = index[part], index[part] % self.length
            stop = self._stop(at)
            k, v, q = self.k[:stop], self.v[:stop], scale * self.q[rows]
            weights = q @ k.mT
            if self.approximation.causal:
                for row, last in zip(weights, at.tolist(), strict=True):
                    row[last + 1 :] = -math.inf
            torch.softmax(weights, -1, out=weights)
            out[part] = weights @ v
            if self.grad is None:
                continue
            grad, w = self.grad[rows], weight[part, None]
            dv[:stop].addmm_(weights.mT, grad * w)
            pulled = (grad @ v.mT).sub_((grad * out[part]).sum(1, keepdim=True)).mul_(weights)
            dq[part] = scale * (pulled @ k)
            dk[:stop].addmm_(pulled.mT, q * w)
        return out, dq, dk, dv

    def _approximate(self, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sums dK and dV."""
        assert self.grad is not None
        dk, dv = torch.zeros_like(self.k), torch.zeros_like(self.v)
        for rows, w in zip(*(t.split(max(1, _LOGITS // self.length)) for t in (index, weight)), strict=True):
            at, grad = rows % self.length, self.grad[rows] * w[:, None]
            stop = self._stop(at)
            k, v = self.k[:stop].detach().requires_grad_(), self.v[:stop]
            with torch.enable_grad():
                weights = self.approximation.weights(self.q[rows], at, k)
            dv[:stop].addmm_(weights.detach().mT, grad)
            dk[:stop] += torch.autograd.grad(weights, k, grad @ v.mT)[0]
        return dk, dv

    def _stop(self, at: Tensor) -> int:
        return int(at.max()) + 1 if self.approximation.causal else self.length


def _squares(rows: Tensor) -> Tensor:
    return rows.double().square().sum(1)
