"""Messages along the edges of thresholded attention, without ever holding a tensor of queries by keys.

Blocks of query rows rebuild their attention probabilities from queries and keys, head by head, in the forward pass and again
in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Edges", "message_passing"]

BLOCK = 1 << 21  # entries of one block of the graph, all sequences of the batch together


@dataclass(frozen=True)
class Edges:
    """Which attention becomes an edge: ``w = sigmoid(sharpness (a - threshold))`` where that is above ``cutoff``, else 0.

    ``a`` is the sum of the heads' probabilities, at most 1, or (``mean``) their mean. ``senders`` of a token's messages: itself
    and those before it (``causal``), those before it (``past``), or itself alone (``self``).
    """

    sharpness: float = 10.0
    threshold: float = 0.1
    cutoff: float = 0.6
    mean: bool = False
    senders: Literal["causal", "past", "self"] = "causal"


def message_passing(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    eps: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    edges: Edges,
    heads: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """``m_i = eps x_i + sum_{j <= i} w_ij x_j`` for the last n of N tokens (2501.02393).

    Peak memory is a few blocks, saved are the inputs alone. Padding, which is what a mask hides from itself, neither sends nor
    receives. Differentiable once in ``x``, ``eps``, ``heads``, ``query`` and ``key``; edges below the cutoff and sums above 1
    have no gradient. Pass ``query`` and ``key`` detached where attention is not to learn from the graph, which spares a second
    pass over heads unless ``heads`` is learned.

    Args:
        x: features of all tokens (B, N, d).
        query: (B, H, n, d_h), of the last n tokens.
        key: (B, H / g, N, d_h), g query heads to a key head.
        eps: a scalar tensor.
        mask: of (B or 1, 1, n, N), boolean (true where a query sees a key) or additive; None for causal attention.
        scale: of the logits.
        edges: what becomes an edge.
        heads: by what each head's probabilities count (H,); all by 1 where None.
        block: entries of the graph that are formed at once.

    Returns:
        (B, n, d) in the dtype of ``x``.
    """
    out: Tensor = _MessagePassing.apply(x, query, key, eps, heads, mask, scale, edges, block)
    return out


class _MessagePassing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        eps: Tensor,
        heads: Tensor | None,
        mask: Tensor | None,
        scale: float,
        edges: Edges,
        block: int,
    ) -> Tensor:
        ctx.save_for_backward(x, query, key, eps, heads, mask)
        ctx.settings = scale, edges, block
        with torch.autocast(x.device.type, enabled=False):
            own = x[:, x.shape[1] - query.shape[2] :]
            out = eps.to(x.dtype) * own
            for rows in _blocks(query, key, heads, mask, scale, edges, block):
                out[:, rows.at] += rows.weights().to(x.dtype) @ x[:, : rows.stop]
            return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, query, key, eps, heads, mask = ctx.saved_tensors
        scale, edges, block = ctx.settings
        with torch.autocast(x.device.type, enabled=False):
            wide = _wide(x.dtype)
            past = x.shape[1] - query.shape[2]
            dx = torch.zeros(x.shape, dtype=wide, device=x.device)
            dx[:, past:] = eps.to(wide) * grad.to(wide)
            deps = (grad.to(wide) * x[:, past:].to(wide)).sum().to(eps.dtype).view_as(eps)
            learns = any(ctx.needs_input_grad[1:3])
            graph, wanted = (query, key, heads), (learns, learns, ctx.needs_input_grad[4])
            pulls = [
                torch.zeros(t.shape, dtype=wide, device=t.device) if t is not None and want else None
                for t, want in zip(graph, wanted, strict=True)
            ]
            for rows in _blocks(query, key, heads, mask, scale, edges, block):
                w, pulled = rows.weights(), grad[:, rows.at]
                dx[:, : rows.stop] += w.mT.to(x.dtype) @ pulled
                if any(wanted):
                    rows.pull(w, (pulled @ x[:, : rows.stop].mT).to(w.dtype), *pulls)
        dq, dk, dheads = (None if d is None else d.to(t.dtype) for d, t in zip(pulls, graph, strict=True))
        return dx.to(x.dtype), dq, dk, deps, dheads, None, None, None, None


@dataclass
class _Rows:
    """Some rows of the graph: queries ``at``, keys up to ``stop``."""

    query: Tensor
    key: Tensor
    heads: Tensor | None
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
        sends = {"causal": torch.le, "past": torch.lt, "self": torch.eq}[self.edges.senders]
        self.possible = self.visible & present & sends(keys, tokens[:, None])
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
        total = self._counted(0)
        for head in range(1, heads):
            total += self._counted(head)
        self.total = total.div_(heads) if edges.mean else total
        w = total.clamp(max=1).sub_(edges.threshold).mul_(edges.sharpness).sigmoid_()
        return w.masked_fill_(~(self.possible & (w > edges.cutoff)), 0)

    def _counted(self, head: int) -> Tensor:
        p = self.probabilities(head)[0]
        return p if self.heads is None else p.mul_(self.heads[head])

    def pull(self, w: Tensor, dw: Tensor, dq: Tensor | None, dk: Tensor | None, dheads: Tensor | None) -> None:
        """Add what a gradient in :meth:`weights` is in queries, keys and what heads count, where there is room for it: through
        the sigmoid, the clamp and the softmax."""
        heads, edges = self.query.shape[1], self.edges
        assert self.total is not None
        da = dw.mul_(w).mul_(1 - w).mul_(edges.sharpness / (heads if edges.mean else 1))
        if not edges.mean:
            da.masked_fill_(self.total > 1, 0)
        for head in range(heads):
            p, q, k = self.probabilities(head)
            if dheads is not None:
                dheads[head] += (p * da).sum()
            if dq is None or dk is None:
                continue
            dp = da if self.heads is None else da * self.heads[head]
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * self.scale
            dq[:, head, self.at] += ds @ k
            dk[:, head // (heads // dk.shape[1]), : self.stop] += ds.mT @ q


def _blocks(
    query: Tensor, key: Tensor, heads: Tensor | None, mask: Tensor | None, scale: float, edges: Edges, block: int
) -> Iterator[_Rows]:
    (batch, _, count, _), keys = query.shape, key.shape[2]
    step = max(1, block // (batch * keys))
    for start in range(0, count, step):
        at = slice(start, min(start + step, count))
        # A mask says itself what attention sees, which may be the future (prefixes); its softmax needs every key.
        yield _Rows(query, key, heads, mask, scale, edges, at, keys if mask is not None else keys - count + at.stop)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
