"""SNELL's kernel matrices and what survives of them, against the formulas written out entry by entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankloom import Recipe, Targets
from rankloom.adapters import SNELL, LoRA, SNELLAdapter
from rankloom.errors import CompositionError, RecipeError
from rankloom.init import OwnStart
from rankloom.kernels import distances, materialized
from rankloom.layers import LinearLayer
from rankloom.rank import SparsityBudget

OUT, IN, DIM = 6, 8, 4
KERNELS, MODES = ("distance", "mixed"), ("hard", "soft", "code")
every_form = pytest.mark.parametrize(("kernel", "sparsify"), [(k, m) for k in KERNELS for m in MODES])


def made(
    kernel: Any = "distance",
    sparsify: Any = "hard",
    sparsity: float = 0.5,
    out: int = OUT,
    width: int = IN,
    dim: int = DIM,
) -> tuple[SNELLAdapter, LinearLayer]:
    layer = LinearLayer(nn.Linear(width, out, dtype=torch.float64).requires_grad_(False))
    adapter = SNELLAdapter(layer, dim, kernel, sparsify, sparsity, torch.float64)
    adapter.reset(layer, torch.Generator().manual_seed(0))
    return adapter, layer


def move(adapter: SNELLAdapter) -> None:
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.3 * torch.randn_like(p)


def full_kernel(q: Tensor, p: Tensor, mix: Tensor | None) -> Tensor:
    """Entry by entry, (out, in)."""
    rows = []
    for j in range(p.shape[1]):
        for i in range(q.shape[1]):
            rows.append(0.1 * ((p[0, j] - q[0, i]).square().sum().sqrt() - (p[1, j] - q[1, i]).square().sum().sqrt()))
    k = torch.stack(rows).view(p.shape[1], q.shape[1])
    if mix is not None:
        k = k + mix[0] * (torch.softmax(k / mix[1].exp(), 0) - 1 / len(k)) + mix[2]
    return k


def oracle(k: Tensor, sparsify: str, sparsity: float) -> Tensor:
    size = k.detach().abs()
    kept = k.numel() - int(sparsity * k.numel())
    limit = size.flatten().sort(descending=True).values[kept - 1]
    live = (size >= limit).to(k.dtype)
    if sparsify == "soft":
        return live * k.detach().sign() * (k.abs() - limit)
    return live * k * (size if sparsify == "code" else 1)


def expected(adapter: SNELLAdapter, sparsity: float = 0.5) -> Tensor:
    parts = [oracle(full_kernel(adapter.Q, adapter.P, adapter._parameters.get("mix")), adapter.sparsify, sparsity)]
    if adapter.sparsify == "code":
        start = full_kernel(adapter.Q0, adapter.P0, adapter._buffers.get("mix0"))
        parts.append(-oracle(start, "code", sparsity))
    return sum(parts[1:], parts[0])


@every_form
@pytest.mark.parametrize("block", [1, 2 * IN, 1 << 21])
def test_update_forward_and_gradients(kernel: str, sparsify: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materialized, "BLOCK", block)
    monkeypatch.setattr(distances, "CHUNK", block)
    adapter, layer = made(kernel, sparsify)
    move(adapter)
    want = expected(adapter)
    torch.testing.assert_close(adapter.delta(layer), want, rtol=1e-11, atol=1e-13)
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    y, dense = adapter(x, layer), x @ (layer.weight() + want).mT + layer.bias()
    torch.testing.assert_close(y, dense, rtol=1e-11, atol=1e-12)
    pull = torch.randn_like(y)
    leaves = (x, *adapter.parameters())
    for one, other in zip(torch.autograd.grad(y, leaves, pull), torch.autograd.grad(dense, leaves, pull), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@every_form
def test_the_start_is_exactly_zero_and_can_leave_it(kernel: str, sparsify: str) -> None:
    adapter, layer = made(kernel, sparsify)
    x = torch.randn(5, IN, dtype=torch.float64)
    assert not adapter.delta(layer).any() and torch.equal(adapter(x, layer), layer(x))
    adapter(x, layer).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (adapter.Q, adapter.P))
    if sparsify != "code":  # two heads that are alike, with opposite signs
        assert torch.equal(adapter.Q[0], adapter.Q[1]) and torch.equal(adapter.P[0], adapter.P[1])
        torch.testing.assert_close(adapter.Q.grad[0], -adapter.Q.grad[1])
        torch.testing.assert_close(adapter.P.grad[0], -adapter.P.grad[1])


def test_the_released_sparsifier_has_no_gradient_where_heads_are_alike() -> None:
    """The reason why it has a start of its own: what survives is multiplied with its magnitude, which is zero there."""
    adapter, layer = made(sparsify="code")
    with torch.no_grad():
        for points in (adapter.Q, adapter.P):
            points[1] = points[0]
    adapter(torch.randn(5, IN, dtype=torch.float64), layer).square().sum().backward()
    assert not adapter.Q.grad.any() and not adapter.P.grad.any()


def test_the_gradient_of_the_released_sparsifier_leaves_its_factor_out() -> None:
    adapter, layer = made(sparsify="code")
    move(adapter)
    pull = torch.randn(OUT, IN, dtype=torch.float64)
    (adapter.delta(layer) * pull).sum().backward()
    k = full_kernel(adapter.Q, adapter.P, None)
    live = k.detach().abs() >= k.detach().abs().flatten().sort(descending=True).values[23]
    want = torch.autograd.grad(k, adapter.Q, pull * k.detach().abs() * live)[0]
    torch.testing.assert_close(adapter.Q.grad, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sparsify", ["hard", "soft"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.99])
def test_how_many_survive(sparsify: str, sparsity: float) -> None:
    adapter, layer = made(sparsify=sparsify, sparsity=sparsity)
    move(adapter)
    kept = int((adapter.delta(layer) != 0).sum())
    exact = OUT * IN - int(sparsity * OUT * IN)
    assert kept == exact - (sparsify == "soft" and sparsity > 0)  # the soft limit's own entry ends at zero
    adapter.kept.zero_()
    assert not adapter.delta(layer).any()


def test_the_released_code_leaves_a_kernel_alone_of_which_all_stays() -> None:
    adapter, layer = made(sparsify="code", sparsity=0.0)
    move(adapter)
    want = full_kernel(adapter.Q, adapter.P, None) - full_kernel(adapter.Q0, adapter.P0, None)
    torch.testing.assert_close(adapter.delta(layer), want, rtol=1e-11, atol=1e-13)


def test_gradcheck() -> None:
    for kernel in KERNELS:
        adapter, layer = made(kernel)
        move(adapter)
        names = [n for n, _ in adapter.named_parameters()]

        def call(x: Tensor, *tensors: Tensor, a: Any = adapter, n: Any = names, own: Any = layer) -> Tensor:
            return torch.func.functional_call(a, dict(zip(n, tensors, strict=True)), (x, own))

        x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(call, (x, *[p.detach().requires_grad_() for p in adapter.parameters()]))


def test_coinciding_points_have_a_gradient_of_zero() -> None:
    adapter, layer = made(sparsity=0.0)
    with torch.no_grad():
        adapter.Q.zero_()
        adapter.P.zero_()
    adapter(torch.randn(5, IN, dtype=torch.float64), layer).square().sum().backward()
    assert not adapter.Q.grad.any() and not adapter.P.grad.any()


def test_the_rank_is_not_bounded_by_the_dimension() -> None:
    adapter, layer = made(sparsity=0.0, out=64, width=64, dim=8)
    move(adapter)
    assert torch.linalg.matrix_rank(adapter.delta(layer), rtol=1e-9) > 4 * 8
    assert sum(p.numel() for p in adapter.parameters()) == 8 * (64 + 64)


def test_nothing_of_the_weights_size_is_saved() -> None:
    adapter, layer = made("mixed", out=40, width=50)
    move(adapter)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter(torch.randn(3, 50, dtype=torch.float64), layer)
    assert max(t.numel() for t in saved) < 40 * 50


def test_impossible_settings_are_refused() -> None:
    for settings, text in (
        ({"dim": 5}, "even number"),
        ({"dim": 0}, "even number"),
        ({"sparsity": 1.0}, r"in \[0, 1\)"),
    ):
        with pytest.raises(RecipeError, match=text):
            Recipe(Targets(("0",)), SNELL(**settings), OwnStart()).check()
    with pytest.raises(CompositionError, match=r"needs sparsity.*'snell'"):
        Recipe(adapter=LoRA(), rank=SparsityBudget()).check()
