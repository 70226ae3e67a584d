"""Message passing over thresholded attention, against the formula written out with every tensor in full."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankloom.kernels.graph import Edges, message_passing

B, H, G, N, DH, D = 2, 6, 3, 9, 4, 5
SCALE = 2.5
WIDE = Edges(sharpness=10.0, threshold=0.1, cutoff=0.6)


def tensors(seed: int = 0, count: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    shapes = (B, N, D), (B, H, count, DH), (B, H // G, N, DH), ()
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)


def padded(kind: str, count: int = N) -> Tensor:
    """The first sequence has two tokens of padding before it, the second three after it."""
    real = torch.ones(B, N, dtype=torch.bool)
    real[0, :2] = real[1, -3:] = False
    i = torch.arange(N - count, N)[:, None]
    seen = (torch.arange(N) <= i)[None] & real[:, None]
    if kind == "window":
        seen = seen & (torch.arange(N) > i - 4)
    if kind == "prefix":  # the first tokens see each other, the future too; edges still come from the past only
        seen = seen | ((torch.arange(N) < 5) & (i < 5))
    if kind != "additive":
        return seen[:, None]
    return torch.zeros(B, 1, count, N, dtype=torch.float64).masked_fill(~seen[:, None], torch.finfo(torch.float64).min)


def eager(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    eps: Tensor,
    mask: Tensor | None,
    edges: Edges,
    loops: bool = False,
    heads: Tensor | None = None,
) -> Tensor:
    """The card's formula: probabilities of all heads, their sum, the graph, one product (or a loop over edges)."""
    count = q.shape[2]
    i, j = torch.arange(N - count, N)[:, None], torch.arange(N)
    seen = (j <= i).expand(B, 1, -1, -1) if mask is None else mask > -1e10 if mask.is_floating_point() else mask
    logits = SCALE * torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(G, 1))
    p = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    p = p if heads is None else p * heads[:, None, None]
    a = p.mean(1) if edges.mean else p.sum(1).clamp(max=1)
    w = torch.sigmoid(edges.sharpness * (a - edges.threshold))
    own = seen[:, 0].gather(-1, i.expand(B, -1, 1)).expand(-1, -1, N)  # padding does not see itself
    keep = (a > edges.threshold + math.log(edges.cutoff / (1 - edges.cutoff)) / edges.sharpness) & own & seen[:, 0]
    keep &= {"self": i == j, "past": j < i, "causal": j <= i}[edges.senders]
    w = w * keep
    if not loops:
        return eps * x[:, N - count :] + w @ x
    out = eps * x[:, N - count :].clone()
    for b, row, column in w.nonzero().tolist():
        out[b, row] += w[b, row, column] * x[b, column]
    return out


GRAPHS = {
    "sum": WIDE,
    "mean": Edges(sharpness=4.0, threshold=0.05, cutoff=0.52, mean=True),
    "self": Edges(senders="self"),
    "past": Edges(senders="past", threshold=0.3),
    "everything": Edges(threshold=-1.0, cutoff=0.1),
    "nothing": Edges(threshold=3.0),
}
MASKS: dict[str, Any] = {
    "causal": None,
    "padded": "padded",
    "additive": "additive",
    "window": "window",
    "prefix": "prefix",
}


@pytest.mark.parametrize("count", [N, 4, 1])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_blocks_of_rows_equal_the_formula_in_value_and_every_gradient(graph: str, mask: str, count: int) -> None:
    inputs = tensors(count=count)
    hidden = None if MASKS[mask] is None else padded(mask, count)
    want = eager(*inputs, hidden, GRAPHS[graph])
    got = message_passing(*inputs, hidden, scale=SCALE, edges=GRAPHS[graph], block=4 * B * N)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(want, eager(*inputs, hidden, GRAPHS[graph], loops=True), rtol=1e-12, atol=1e-12)
    pull = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    for g, w in zip(torch.autograd.grad(got, inputs, pull), torch.autograd.grad(want, inputs, pull), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("mask", ["causal", "padded"])
@pytest.mark.parametrize("graph", ["sum", "mean", "past"])
def test_heads_may_count_differently(graph: str, mask: str, learns: bool) -> None:
    """One weight a head, negative ones among them; their gradient comes with a detached graph as well."""
    x, q, k, eps = tensors(count=7)
    q, k = (q, k) if learns else (q.detach(), k.detach())
    heads = torch.linspace(-0.4, 1.6, H, dtype=torch.float64).requires_grad_()
    hidden = None if MASKS[mask] is None else padded(mask, 7)
    want = eager(x, q, k, eps, hidden, GRAPHS[graph], heads=heads)
    got = message_passing(x, q, k, eps, hidden, scale=SCALE, edges=GRAPHS[graph], heads=heads, block=3 * B * N)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    pull = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    inputs = (x, eps, heads, *((q, k) if learns else ()))
    for g, w in zip(torch.autograd.grad(got, inputs, pull), torch.autograd.grad(want, inputs, pull), strict=True):
        assert w.abs().max() > 1e-3
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)
    plain = message_passing(x, q, k, eps, hidden, scale=SCALE, edges=GRAPHS[graph])
    ones = message_passing(x, q, k, eps, hidden, scale=SCALE, edges=GRAPHS[graph], heads=torch.ones(H))
    assert torch.equal(plain, ones) and not torch.allclose(plain, got)


def test_the_graphs_under_test_are_neither_empty_nor_full() -> None:
    _, q, k, eps = tensors()
    unit = torch.eye(N, dtype=torch.float64).expand(B, N, N)  # with x the identity the output is w itself
    for name, edges in GRAPHS.items():
        w = message_passing(unit, q, k, 0 * eps, scale=SCALE, edges=edges)
        share = float((w != 0).double().sum() / (B * N * (N + 1) / 2))
        assert {"everything": share == 1, "nothing": share == 0}.get(name, 0 < share < 1), (name, share)
        assert w.triu(1 if edges.senders != "past" else 0).count_nonzero() == 0
        kept = w[w != 0]
        assert not len(kept) or (kept.min() > edges.cutoff and kept.max() <= 1)
    w = message_passing(unit, q, k, 0 * eps, scale=SCALE, edges=WIDE)
    assert torch.any(w == torch.sigmoid(torch.tensor(9.0, dtype=torch.float64)))  # the clamp is reached


def test_a_detached_graph_passes_no_gradient_to_attention() -> None:
    x, q, k, eps = tensors()
    out = message_passing(x, q.detach(), k.detach(), eps, scale=SCALE, edges=WIDE)
    want = eager(x, q.detach(), k.detach(), eps, None, WIDE)
    for g, w in zip(torch.autograd.grad(out.sum(), (x, eps)), torch.autograd.grad(want.sum(), (x, eps)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_half_precision_is_the_formula_on_the_rounded_inputs() -> None:
    inputs = tensors(dtype=torch.bfloat16)
    got = message_passing(*inputs, scale=SCALE, edges=WIDE)
    assert got.dtype == torch.bfloat16
    want = eager(*(t.double() for t in inputs), None, WIDE)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=5e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # probabilities stay float32 under autocast
        single = tuple(t.float() for t in inputs)
        torch.testing.assert_close(
            message_passing(*single, scale=SCALE, edges=WIDE).double(), want, rtol=1e-5, atol=1e-5
        )


class Largest(TorchDispatchMode):
    """The most elements any tensor made inside has."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


def test_nothing_of_queries_by_keys_is_formed_or_saved() -> None:
    length, block = 512, 1 << 14
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, 8, generator=g, requires_grad=True)
    q, k = (torch.randn(1, heads, length, 8, generator=g, requires_grad=True) for heads in (4, 2))
    eps = torch.zeros((), requires_grad=True)
    saved: list[Tensor] = []
    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        message_passing(x, q, k, eps, scale=0.5, edges=WIDE, block=block).sum().backward()
    assert seen.size == block < length * length
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, q, k, eps)}
