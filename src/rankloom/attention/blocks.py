"""Exact attention where logits are large, a low-rank factor everywhere else: after grouping, or near the diagonal."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rankloom.attention.contract import Approximation, Factor, Rows
from rankloom.attention.engine import default_chunk
from rankloom.attention.factored import Factored, factored_kernel
from rankloom.attention.heavy import heaviness
from rankloom.attention.near_far import Plan, near_far_sums
from rankloom.attention.precondition import Preconditioner
from rankloom.errors import AttentionError, RecipeError

__all__ = ["BlockExact", "Windowed"]


Near = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Which keys at positions ``to`` (n,) are near to queries ``q`` (m, d) at positions ``at`` (m,): (m, n)."""


class _NearAndFar(Approximation):
    """``out_i = sum_j w_ij v_j / sum_j w_ij`` with ``w_ij = e^lw_j exp(q~_i . k~_j)``, or ``e^lw_j phi(q~_i)^T M phi(k~_j)``
    where ``i`` and ``j`` are not near. Keys of at least the heaviness ``heavy`` are near to every query."""

    sinks = 0

    def __init__(
        self, preconditioner: Preconditioner, factor: Factor, *, scale: float, causal: bool, heavy: float
    ) -> None:
        Factored(preconditioner, factor, scale=scale, causal=causal)  # refuses what does not go together
        self.preconditioner, self.factor, self.heavy = preconditioner, factor, heavy
        self.scale, self.causal = scale, causal

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if q.dim() != 3 or k.shape != q.shape[1:] or v.dim() != 2 or len(v) != len(k):
            raise AttentionError(
                f"attention takes queries (g, L, d), keys (L, d) and values (L, d_v), got {tuple(q.shape)}, "
                f"{tuple(k.shape)} and {tuple(v.shape)}: pass one key head with its g query heads"
            )
        with torch.autocast(q.device.type, enabled=False):
            rows, keys, log_weight = self._coordinates(q, k)
            u = torch.cat([v.to(keys), torch.ones_like(keys[:, :1])], 1) * log_weight.exp()[:, None]
            z = self._sums(rows, keys, u, log_weight.detach(), self._shared(k))
        return (z[..., :-1] / z[..., -1:]).to(v.dtype), z[..., -1].detach()

    def kernel(self, k: Tensor, to: Tensor, every: Tensor) -> Rows:
        fitted, every = self.preconditioner, every.detach()
        shared, keys, weight = self._shared(every), fitted.keys(k), fitted.log_weights(k, every).exp()
        with torch.autocast(k.device.type, enabled=False):
            near = self._near(fitted.keys(every), fitted.log_weights(every), shared)
            far = factored_kernel(keys, self.factor)

        def rows(q: Tensor, at: Tensor) -> Tensor:
            queries = fitted.queries(q)
            with torch.autocast(q.device.type, enabled=False):
                exact = near(queries.detach(), at, to) | shared[to]
                kernel = torch.where(exact, (queries @ keys.mT).exp(), far(queries))
                return (kernel.masked_fill(to > at[:, None], 0.0) if self.causal else kernel) * weight

        return rows

    def _coordinates(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fitted = self.preconditioner
        return fitted.queries(q), fitted.keys(k), fitted.log_weights(k)

    def _shared(self, k: Tensor) -> Tensor:
        """Which of the keys (L, d) are near to every query: (L,)."""
        shared = heaviness(self.preconditioner, k) >= self.heavy
        shared[: self.sinks] = True
        return shared

    @abstractmethod
    def _sums(self, q: Tensor, k: Tensor, u: Tensor, log_weight: Tensor, shared: Tensor) -> Tensor:
        """``sum_j w_ij u_j`` for ``q`` (g, L, d) and ``u`` (L, m): (g, L, m)."""

    @abstractmethod
    def _near(self, k: Tensor, log_weight: Tensor, shared: Tensor) -> Near:
        """Which of the keys (L, d) are near to single queries, beside the shared ones."""


class Windowed(_NearAndFar):
    """A local window, the first tokens and heavy keys exact, a low-rank factor for all other keys.

    Time is cut into chunks of ``window`` tokens. A query meets its own chunk and the neighbouring ones exactly (causal: the
    one before), hence at least ``window`` tokens on either side; the first ``sinks`` tokens; and all keys whose
    :func:`~rankloom.attention.heavy.heaviness` is at least ``heavy``. ``window=0``, which only non-causal attention can have,
    is no window at all, and the fastest form, as all queries then share one far state.
    With ``h`` heavy keys and sinks: time O(L (width + window + h) (d + d_v)); memory O(width (d + d_v + window) +
    g window (window + h)) beyond the inputs' own size. Raises ``RecipeError`` for a ``window`` or ``sinks`` below what is
    said here, and ``AttentionError`` on call for shapes that do not match.
    (Attention sinks: arXiv 2309.17453; local plus low rank: arXiv 2110.15343.)
    """

    def __init__(
        self,
        preconditioner: Preconditioner,
        factor: Factor,
        *,
        scale: float,
        causal: bool,
        window: int = 512,
        sinks: int = 4,
        heavy: float = math.inf,
    ) -> None:
        if window < causal or sinks < 0:
            raise RecipeError(
                f"windowed attention needs window >= 0, causal >= 1, and sinks >= 0, got window={window} and sinks={sinks}"
            )
        super().__init__(preconditioner, factor, scale=scale, causal=causal, heavy=heavy)
        self.window, self.sinks = window, sinks
        self._chunk = window or default_chunk(factor, causal=False)

    def _sums(self, q: Tensor, k: Tensor, u: Tensor, log_weight: Tensor, shared: Tensor) -> Tensor:
        heads, length, dim = q.shape
        edges = [*range(0, length, self._chunk), length]
        chunks = range(len(edges) - 1)
        before = [0, *shared.cumsum(0)[torch.tensor(edges[1:], device=shared.device) - 1].tolist()]
        count = before[-1]
        order = torch.cat([shared.nonzero(), (~shared).nonzero()]).squeeze(1)
        plan = Plan(
            segments=[(heads * a, heads * b) for a, b in pairwise(edges)],
            blocks=list(pairwise(count + edge - some for edge, some in zip(edges, before, strict=True))),
            near=[chunks[max(c - 1, 0) : c + 1 if self.causal else c + 2] if self.window else range(0) for c in chunks],
            shared=[before[c + 1] if self.causal else count for c in chunks],
            positions=order if self.causal else None,
            heads=heads,
        )
        z = near_far_sums(q.transpose(0, 1).reshape(-1, dim), k[order], u[order], self.factor, plan)
        return z.view(length, heads, -1).transpose(0, 1)

    def difficulty(self, q: Tensor) -> Tensor:
        found = super().difficulty(q)
        if self.causal:
            found[:, : 2 * self._chunk] = 0.0  # these meet all their keys exactly
        return found

    def _near(self, k: Tensor, log_weight: Tensor, shared: Tensor) -> Near:
        return lambda q, at, to: ((to // self._chunk - at[:, None] // self._chunk).abs() <= 1) & (self.window > 0)


class BlockExact(_NearAndFar):
    """Keys grouped by similarity, each query exact on heavy keys and on the group that carries most of its weight; not causal.

    Keys lighter than ``heavy`` (:func:`~rankloom.attention.heavy.heaviness`) are halved along their principal axis, where
    between-group variance is largest within the middle half, until no group has more than ``block`` of them, so that the
    exact part costs at most ``L (block + h)`` products for ``h`` heavy keys. A query's group is the one with the largest
    ``log sum_j e^lw_j + q~ . c``, ``c`` the group's weighted mean. The grouping is made anew from the keys of each call,
    and held fixed by the gradient.
    Time O(L (width + block + h) (d + d_v) + L^2 d / block), the last term without a gradient; memory
    O(width (d + d_v) + block (block + h)) beyond the inputs' own size. Raises ``RecipeError`` for ``block < 1``, and
    ``AttentionError`` on call for shapes that do not match. (Sparse plus low rank: arXiv 2110.15343.)
    """

    def __init__(
        self, preconditioner: Preconditioner, factor: Factor, *, scale: float, block: int = 512, heavy: float = math.inf
    ) -> None:
        if block < 1:
            raise RecipeError(f"block-exact attention needs block >= 1, got {block}")
        super().__init__(preconditioner, factor, scale=scale, causal=False, heavy=heavy)
        self.block = block

    def _sums(self, q: Tensor, k: Tensor, u: Tensor, log_weight: Tensor, shared: Tensor) -> Tensor:
        rows, groups = q.reshape(-1, q.shape[-1]), _groups(k.detach(), ~shared, self.block)
        label = _heaviest(rows.detach(), k.detach(), log_weight, groups, self.block)
        order, ends = label.argsort(stable=True), [0, *label.bincount(minlength=len(groups)).cumsum(0).tolist()]
        cuts = [
            (c, a, min(a + self.block, last))
            for c, (first, last) in enumerate(pairwise(ends))
            for a in range(first, last, self.block)
        ]
        count = int(shared.sum())
        plan = Plan(
            segments=[(a, b) for _, a, b in cuts],
            blocks=list(pairwise(accumulate(map(len, groups), initial=count))),
            near=[range(c, c + 1) for c, _, _ in cuts],
            shared=[count] * len(cuts),
        )
        keys = torch.cat([shared.nonzero().squeeze(1), *groups])
        z = near_far_sums(rows[order], k[keys], u[keys], self.factor, plan)
        return z[order.argsort()].view(*q.shape[:2], -1)

    def _near(self, k: Tensor, log_weight: Tensor, shared: Tensor) -> Near:
        groups = _groups(k, ~shared, self.block)
        group = torch.full_like(shared, -1, dtype=torch.long)
        for c, rows in enumerate(groups):
            group[rows] = c
        return lambda q, at, to: _heaviest(q, k, log_weight, groups, self.block)[:, None] == group[to]


def _groups(points: Tensor, among: Tensor, most: int, sample: int = 4096) -> list[Tensor]:
    """The rows ``among`` (L,) of ``points`` (L, d) in groups of at most ``most``, by halving along principal axes."""
    groups, todo = [], [among.nonzero().squeeze(1)]
    while todo:
        rows = todo.pop()
        if len(rows) <= most:
            groups.append(rows)
            continue
        centred = points[rows] - points[rows].mean(0)
        some = centred[:: -(-len(rows) // sample)]
        along, order = (centred @ torch.linalg.eigh(some.mT @ some).eigenvectors[:, -1]).sort(stable=True)
        # The sum of the lower side fixes the variance between both sides, the mean of all being zero.
        first, last = len(rows) // 4, -(-3 * len(rows) // 4)
        below = torch.arange(first + 1, last + 1, device=points.device)
        between = along.cumsum(0)[first:last].square() / (below * (len(rows) - below))
        cut = first + 1 + int(between.argmax())
        todo += [rows[order[cut:]], rows[order[:cut]]]
    return groups


def _heaviest(q: Tensor, k: Tensor, log_weight: Tensor, groups: Sequence[Tensor], rows: int) -> Tensor:
    """For each query of ``q`` (n, d) the group with the largest ``log mass + q . (weighted mean)``: (n,)."""
    mass = torch.stack([log_weight[group].logsumexp(0) for group in groups])
    means = torch.stack([log_weight[group].softmax(0) @ k[group] for group in groups])
    return torch.cat([(part @ means.mT + mass).argmax(1) for part in q.split(rows)])
