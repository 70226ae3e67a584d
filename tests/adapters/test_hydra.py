"""Hydra: both heads against the module written out, merging, and the one kernel against the heads apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom.errors import RecipeError, TargetError
from rankloom.kernels import lowrank, lowrank_linear
from tests import zoo


def adapted(tokens: int = 30, bias: bool = True, **changes: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(7, 6, bias=bias, dtype=torch.float64)})
    settings = {"targets.modules": ("layer",), "adapter.rank": 3, "adapter.sequential_rank": 2, "adapter.alpha": 5.0}
    b = rankloom.adapt(model, rankloom.methods.get("hydra").with_({**settings, **changes})).bindings[0]
    for parameter in b.adapter.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(len(parameter)))
    return b, torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)


def by_hand(b: Any, x: Tensor) -> Tensor:
    """The two heads, the one on the output without the bias."""
    a, w = b.adapter, b.layer.weight()
    z = x @ w.T
    out = z + a.scale * (x @ a.A.T @ a.B.T + z @ a.A_s.T @ a.B_s.T)
    return out if b.layer.bias() is None else out + b.layer.bias()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 30])
def test_both_routes_are_the_heads_written_out(tokens: int, bias: bool) -> None:
    """Few tokens read the output, many run as one product with ``A_s W``: the same outputs and gradients."""
    b, x = adapted(tokens, bias)
    assert (b.adapter.operands(x, b.layer) is not None) is (tokens == 30)
    got, want = b.adapter.forward(x, b.layer), by_hand(b, x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    pull, inputs = torch.randn_like(want), (x, *b.adapter.parameters())
    for g, w in zip(torch.autograd.grad(got, inputs, pull), torch.autograd.grad(want, inputs, pull), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-9)


def test_the_merged_weight_is_the_papers() -> None:
    """``W' = (I + s B_s A_s) W + s B A``, of rank r + r_s over ``W``; the column space of the second head is ``B_s``'s."""
    b, x = adapted()
    a, w = b.adapter, b.layer.weight()
    eye = torch.eye(6, dtype=w.dtype)
    want = (eye + a.scale * a.B_s @ a.A_s) @ w + a.scale * a.B @ a.A
    delta = a.delta(b.layer).detach()
    torch.testing.assert_close(w + delta, want.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(x @ (w + delta).T + b.layer.bias(), a.forward(x, b.layer), rtol=0, atol=1e-11)
    assert torch.linalg.matrix_rank(delta) == 5
    up, down = a.factors_on(b.layer)
    assert up.shape == (6, 5) and down.shape == (5, 7) and a.factors() is None
    a.B.data.zero_()
    basis = torch.linalg.qr(a.B_s.detach()).Q
    delta = a.delta(b.layer).detach()
    torch.testing.assert_close(basis @ (basis.T @ delta), delta, rtol=0, atol=1e-11)


def test_without_the_second_head_it_is_lora() -> None:
    b, x = adapted()
    b.adapter.B_s.data.zero_()
    want = lowrank_linear(x, b.layer.weight(), b.layer.bias(), b.adapter.A, b.adapter.B, b.adapter.scale)
    got = b.adapter.forward(x, b.layer)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for g, w in zip(
        torch.autograd.grad(got.square().sum(), (b.adapter.A, b.adapter.B)),
        torch.autograd.grad(want.square().sum(), (b.adapter.A, b.adapter.B)),
        strict=True,
    ):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_the_weight_comes_back_through_the_woodbury_identity() -> None:
    """``W = (I + s B_s A_s)^-1 (W' - s B A)``, the inverse from an r_s x r_s one."""
    b, _ = adapted()
    a, w = b.adapter, b.layer.weight()
    merged = w + a.delta(b.layer)
    left, right = a.scale * a.B_s, a.A_s
    inner = torch.eye(2, dtype=w.dtype) + right @ left
    rest = merged - a.scale * a.B @ a.A
    torch.testing.assert_close(rest - left @ torch.linalg.solve(inner, right @ rest), w, rtol=0, atol=1e-10)


def test_the_one_kernel_keeps_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved by tokens is the input and the heads' hidden units, not the layer's output."""
    monkeypatch.setattr(lowrank, "forming_pays", lambda *_: False)  # as it is with a layer's real sides
    b, x = adapted(tokens=40)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        b.adapter.forward(x, b.layer)
    by_token = [tuple(t.shape) for t in kept if 40 in t.shape]
    assert sorted(by_token) == [(5, 40), (40, 7)]


def test_siblings_run_together() -> None:
    handle = zoo.adapted("hydra", zoo.build("llama"), "llama")
    zoo.perturb(handle)
    inputs = zoo.batch("llama", rows=6)
    merged = zoo.merged_copy(handle, zoo.build("llama"))
    torch.testing.assert_close(handle.model(**inputs).logits, merged(**inputs).logits, rtol=0, atol=1e-10)


def test_parameters_and_refusals() -> None:
    b, _ = adapted()
    assert sum(p.numel() for p in b.adapter.parameters()) == 3 * (7 + 6) + 2 * 2 * 6
    with pytest.raises(RecipeError, match="sequential_rank must be at least 1"):
        adapted(**{"adapter.sequential_rank": 0})
    for changes in ({"adapter.sequential_rank": 7}, {"adapter.rank": 7}):
        with pytest.raises(TargetError, match=r"above 6, the most layer"):
            adapted(**changes)
