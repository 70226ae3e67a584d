r"""Single rows of a head, exact and approximate, and what they add to the gradients.

With the exact attention row ``P_i`` (arXiv 2406.03136 writes f), the output's gradient ``G_i`` there and the row's weight ``w_i``

    O_i = P_i V,   T_i = P_i o (V G_i - G_i . O_i),   dQ_i = scale T_i K,
    dK = scale sum_i w_i T_i^T Q_i,   dV = sum_i w_i P_i^T G_i

and the same sums of the approximate rows, at their known denominators, follow by differentiating the approximate kernel. Causal
rows are taken with the keys up to their last one, in the order of their positions: half of the work where they lie anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankloom.attention.contract import Approximation
from rankloom.attention.projection import Projection

__all__ = ["Rows"]

_PAIRS = 2**20  # of rows and keys at once
# Keys at once, whose features are formed once for all rows; under a causal mask fewer, as only the rows after them meet them.
_KEYS = {False: 4096, True: 1152}
_CACHED = 2**18  # logits of exact rows at once, which half a dozen passes go over: they stay in a core's L2 cache


class Rows:
    """One head's exact rows less its approximate ones, for ``q`` (g, L, d), ``k`` (L, d) and ``v`` (L, d_v).

    ``known`` holds the approximate ``output``, and with ``grad`` (g, L, d_v) also ``dQ`` and the ``denominators``. dK and dV are
    compared at the positions ``keys`` (n,), ascending; dQ by the gradients of the factors of ``projection`` where there is one.
    """

    def __init__(
        self,
        approximation: Approximation,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        known: Mapping[str, Tensor],
        grad: Tensor | None,
        projection: Projection | None,
        keys: Tensor,
    ) -> None:
        self.approximation, self.k, self.v, self.keys = approximation, k, v, keys
        self.projection = projection
        self.heads, self.length = q.shape[:2]
        self.q, self.out = q.flatten(0, 1), known["output"].flatten(0, 1)
        self.grad = None if grad is None else grad.flatten(0, 1)
        self.dq = None if grad is None else known["dQ"].flatten(0, 1)
        self.denominators = None if grad is None else known["denominators"].flatten()

    def differences(
        self, samples: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Over the rows (m,) of each sample: squared errors (m,) of what is per row, sums with ``weights`` (m,) of what is a
        sum."""
        approximate = None if self.grad is None else self._approximate(samples, weights)
        found = []
        for number, (index, weight) in enumerate(zip(samples, weights, strict=True)):
            order = (index % self.length).argsort()
            index, weight = index[order], weight[order]
            out, dq, dk, dv = self._exact(index, weight)
            squares, sums = {"output": _squares(out - self.out[index])}, dict[str, Tensor]()
            if self.dq is not None and approximate is not None:
                dq -= self.dq[index]
                squares["dQ"] = _squares(dq)
                sums = {n: t - of_all[number] for n, t, of_all in zip(("dK", "dV"), (dk, dv), approximate, strict=True)}
                if self.projection is not None:
                    by_head = dq.new_zeros(self.heads, *dq.shape)
                    by_head[index // self.length, torch.arange(len(index), device=index.device)] = dq * weight[:, None]
                    sums["dA_q"], sums["dB_q"] = self.projection.gradients(by_head, index % self.length)
            found.append(({name: torch.empty_like(t).index_copy_(0, order, t) for name, t in squares.items()}, sums))
        return found

    def _exact(self, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows (m, .) of the output and of dQ, and the weighted sums dK and dV; zero without an output gradient."""
        q, at, scale = self.q[index], index % self.length, self.approximation.scale
        grad = None if self.grad is None else self.grad[index]
        out, dq = self.v.new_empty(len(index), self.v.shape[1]), torch.zeros_like(q)
        dk, dv = self._empty_sums()
        q *= scale
        step = max(1, _CACHED // self.length)
        for part in (slice(a, a + step) for a in range(0, len(index), step)):
            stop, to = self._before(at[part])
            k, v = self.k[:stop], self.v[:stop]
            weights = q[part] @ k.mT
            if self.approximation.causal:
                for row, last in zip(weights, at[part].tolist(), strict=True):
                    row[last + 1 :] = -math.inf
            torch.softmax(weights, -1, out=weights)
            torch.mm(weights, v, out=out[part])
            if grad is None:
                continue
            pulled = (grad[part] @ v.mT).sub_((grad[part] * out[part]).sum(1, keepdim=True)).mul_(weights)
            torch.mm(pulled, k, out=dq[part])
            if len(to) < stop:
                weights, pulled = weights.index_select(1, to), pulled.index_select(1, to)
            dv[: len(to)].addmm_(weights.mT, grad[part] * weight[part, None])
            dk[: len(to)].addmm_(pulled.mT, q[part] * weight[part, None])
        return out, dq.mul_(scale), dk, dv

    def _approximate(self, samples: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The weighted sums dK (S, n, d) and dV (S, n, d_v) of each sample, in one pass over the keys: with ``e_ij`` the kernel,
        ``dV_j = sum_i w_i e_ij G_i / den_i``, and dK from the gradient ``w_i (V_j - O_i) . G_i / den_i`` in ``e_ij``."""
        assert self.grad is not None and self.denominators is not None
        causal = self.approximation.causal
        dk, dv = (t.repeat(len(samples), 1, 1) for t in self._empty_sums())
        for to, dk_part, dv_part in zip(
            *(t.split(_KEYS[causal], -2) for t in (self.keys[:, None], dk, dv)), strict=True
        ):
            to = to[:, 0]
            k, v = self.k[to].requires_grad_(), self.v[to]
            with torch.enable_grad():
                kernel = self.approximation.kernel(k, to, self.k)
            for s, (index, weight) in enumerate(zip(samples, weights, strict=True)):
                if causal:
                    after = index % self.length >= to[0]
                    index, weight = index[after], weight[after]
                count = max(1, _PAIRS // len(to))
                for rows, w in zip(index.split(count), weight.split(count), strict=True):
                    grad = self.grad[rows] * (w / self.denominators[rows])[:, None]
                    with torch.enable_grad():
                        values = kernel(self.q[rows], rows % self.length)
                    pull = (grad @ v.mT).sub_((grad * self.out[rows]).sum(1, keepdim=True))
                    dv_part[s].addmm_(values.detach().mT, grad)
                    dk_part[s] += torch.autograd.grad(values, k, pull, retain_graph=True)[0]
        return dk, dv

    def _empty_sums(self) -> tuple[Tensor, Tensor]:
        return self.k.new_zeros(len(self.keys), self.k.shape[1]), self.v.new_zeros(len(self.keys), self.v.shape[1])

    def _before(self, at: Tensor) -> tuple[int, Tensor]:
        """Up to where rows at these positions attend, and the compared keys before."""
        if not self.approximation.causal:
            return self.length, self.keys
        stop = int(at.max()) + 1
        return stop, self.keys[: int(torch.searchsorted(self.keys, stop))]


def _squares(rows: Tensor) -> Tensor:
    return rows.double().square().sum(1)
