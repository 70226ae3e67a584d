"""Messages along the edges of thresholded attention, without ever holding a tensor of queries by keys.

Blocks of query rows rebuild their attention probabilities from queries and keys, head by head, in the forward pass and again
in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Edges", "message_passing"]

BLOCK = 1 << 21  # entries of one block of the graph, all sequences of the batch together


@dataclass(frozen=True)
class Edges:
    """Which attention becomes an edge: ``w = sigmoid(sharpness (a - threshold))`` where that is above ``cutoff``, else 0.

    ``a`` is the sum of the heads' probabilities, at most 1, or (``mean``) their mean. ``own``: a token's edge to itself only.
    """

    sharpness: float = 10.0
    threshold: float = 0.1
    cutoff: float = 0.6
    mean: bool = False
    own: bool = False


def message_passing(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    eps: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    edges: Edges,
    block: int = BLOCK,
) -> Tensor:
    """``m_i = eps x_i + sum_{j <= i} w_ij x_j`` for the last n of N tokens (2501.02393).

    Peak memory is a few blocks, saved are the inputs alone. Padding, which is what a mask hides from itself, neither sends nor
    receives. Differentiable once in ``x``, ``eps``, ``query`` and ``key``; edges below the cutoff and sums above 1 have no
    gradient. Pass ``query`` and ``key`` detached where the graph is not to learn, which also spares a second pass over heads.

    Args:
        x: features of all tokens (B, N, d).
        query: (B, H, n, d_h), of the last n tokens.
        key: (B, H / g, N, d_h), g query heads to a key head.
        eps: a scalar tensor.
        mask: of (B or 1, 1, n, N), boolean (true where a query sees a key) or additive; None for causal attention.
        scale: of the logits.
        edges: what becomes an edge.
        block: entries of the graph that are formed at once.

    Returns:
        (B, n, d) in the dtype of ``x``.
    """
    out: Tensor = _MessagePassing.apply(x, query, key, eps, mask, scale, edges, block)
    return out


class _MessagePassing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        eps: Tensor,
        mask: Tensor | None,
        scale: float,
        edges: Edges,
        block: int,
    ) -> Tensor:
        ctx.save_for_backward(x, query, key, eps, mask)
        ctx.settings = scale, edges, block
        with torch.autocast(x.device.type, enabled=False):
            own = x[:, x.shape[1] - query.shape[2] :]
            out = eps.to(x.dtype) * own
            for rows in _blocks(query, key, mask, scale, edges, block):
                out[:, rows.at] += rows.weights().to(x.dtype) @ x[:, : rows.stop]
            return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, query, key, eps, mask = ctx.saved_tensors
        scale, edges, block = ctx.settings
        with torch.autocast(x.device.type, enabled=False):
            wide = _wide(x.dtype)
            past = x.shape[1] - query.shape[2]
            dx = torch.zeros(x.shape, dtype=wide, device=x.device)
            dx[:, past:] = eps.to(wide) * grad.to(wide)
            deps = (grad.to(wide) * x[:, past:].to(wide)).sum().to(eps.dtype).view_as(eps)
            learns = any(ctx.needs_input_grad[1:3])
            dq, dk = (torch.zeros(t.shape, dtype=wide, device=t.device) if learns else None for t in (query, key))
            for rows in _blocks(query, key, mask, scale, edges, block):
                w, pulled = rows.weights(), grad[:, rows.at]
                dx[:, : rows.stop] += w.mT.to(x.dtype) @ pulled
                if dq is not None and dk is not None:
                    rows.pull(w, (pulled @ x[:, : rows.stop].mT).to(w.dtype), dq, dk)
        graph = (dq.to(query.dtype), dk.to(key.dtype)) if dq is not None and dk is not None else (None, None)
        return dx.to(x.dtype), *graph, deps, None, None, None, None


@dataclass
class _Rows:
    """Some rows of the graph: queries ``at``, keys up to ``stop``."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float
    edges: Edges
    at: slice
    stop: int

    def __post_init__(self) -> None:
        past = self.key.shape[2] - self.query.shape[2]
        tokens = torch.arange(past + self.at.start, past + self.at.stop, device=self.query.device)
        keys = torch.arange(self.stop, device=self.query.device)
        causal = keys <= tokens[:, None]
        self.bias, self.visible = None, causal[None]
        if self.mask is not None:
            rows = self.mask[:, 0, self.at, : self.stop]
            self.visible = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
            self.bias = None if rows.dtype == torch.bool else rows
        # A token that does not see itself is padding.
        present = self.visible.gather(-1, tokens.expand(len(self.visible), -1)[..., None])
        self.possible = self.visible & present & (keys == tokens[:, None] if self.edges.own else causal)
        self.total: Tensor | None = None

    def probabilities(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one head (B, rows, stop), with its queries and keys, in float32 at least."""
        wide = _wide(self.query.dtype)
        group = self.query.shape[1] // self.key.shape[1]
        q, k = self.query[:, head, self.at].to(wide), self.key[:, head // group, : self.stop].to(wide)
        logits = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=self.scale)
        if self.bias is not None:
            logits += self.bias
        # Not -inf: a row that sees nothing must stay finite; it has no edges.
        return logits.masked_fill_(~self.visible, torch.finfo(wide).min).softmax(-1), q, k

    def weights(self) -> Tensor:
        """``w`` (B, rows, stop), in float32 at least."""
        heads, edges = self.query.shape[1], self.edges
        total = self.probabilities(0)[0]
        for head in range(1, heads):
            total += self.probabilities(head)[0]
        self.total = total.div_(heads) if edges.mean else total
        w = total.clamp(max=1).sub_(edges.threshold).mul_(edges.sharpness).sigmoid_()
        return w.masked_fill_(~(self.possible & (w > edges.cutoff)), 0)

    def pull(self, w: Tensor, dw: Tensor, dq: Tensor, dk: Tensor) -> None:
        """Add what a gradient in :meth:`weights` is in queries and keys, through the sigmoid, the clamp and the softmax."""
        heads, edges = self.query.shape[1], self.edges
        assert self.total is not None
        da = dw.mul_(w).mul_(1 - w).mul_(edges.sharpness / (heads if edges.mean else 1))
        if not edges.mean:
            da.masked_fill_(self.total > 1, 0)
        for head in range(heads):
            p, q, k = self.probabilities(head)
            ds = p * (da - (p * da).sum(-1, keepdim=True)) * self.scale
            dq[:, head, self.at] += ds @ k
            dk[:, head // (heads // dk.shape[1]), : self.stop] += ds.mT @ q


def _blocks(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, edges: Edges, block: int) -> Iterator[_Rows]:
    (batch, _, count, _), keys = query.shape, key.shape[2]
    step = max(1, block // (batch * keys))
    for start in range(0, count, step):
        at = slice(start, min(start + step, count))
        # A mask says itself what attention sees, which may be the future (prefixes); its softmax needs every key.
        yield _Rows(query, key, mask, scale, edges, at, keys if mask is not None else keys - count + at.stop)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
