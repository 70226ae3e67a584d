"""The Kronecker linear against the dense product, in every order of its steps; what it saves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.kernels import Terms, contraction, kronecker_linear, kronecker_product
from rankloom.kernels import kronecker as module

M, N, P, Q, LOW = 3, 2, 4, 5, 2
FORMS = {"one": (1, False), "three": (3, False), "low": (1, True)}
ORDERS = {"one": [(0, False), (1, False)], "three": [(0, False), (1, False)]} | {
    "low": [(0, False), (1, False), (2, False), (0, True), (1, True)]
}
EVERY = [(form, order) for form, orders in ORDERS.items() for order in orders]


def factors(form: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    count, low = FORMS[form]
    shapes = [(count, M, N), (count, LOW if low else P, Q)] + ([(P, LOW)] if low else [])
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def dense(made: list[Tensor]) -> Tensor:
    left, right, *up = made
    return sum(torch.kron(u, up[0] @ v if up else v) for u, v in zip(left, right, strict=True))


@pytest.mark.parametrize(("form", "order"), EVERY)
def test_every_order_is_the_dense_product(form: str, order: tuple[int, bool], monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_cheapest", lambda *_: order)
    made = [t.requires_grad_() for t in factors(form)]
    x = torch.randn(2, 3, N * Q, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(M * P, N * Q, dtype=torch.float64), torch.randn(M * P, dtype=torch.float64)
    want = F.linear(x, weight + 0.7 * dense(made), bias)
    pull = torch.randn_like(want)
    grads = torch.autograd.grad(want, [x, *made], pull)
    fused = kronecker_linear(x, weight, bias, contraction(Terms(*made), 6), 0.7)
    plain = F.linear(x, weight, bias) + 0.7 * kronecker_product(x, contraction(Terms(*made), 6))
    for out in (fused, plain):
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
        for got, g in zip(torch.autograd.grad(out, [x, *made], pull), grads, strict=True):
            torch.testing.assert_close(got, g, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("form", "order"), EVERY)
def test_every_choice_of_what_trains(form: str, order: tuple[int, bool], monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_cheapest", lambda *_: order)
    x, weight = torch.randn(4, N * Q, dtype=torch.float64), torch.randn(M * P, N * Q, dtype=torch.float64)
    for flags in itertools.product((False, True), repeat=1 + len(factors(form))):
        if not any(flags):
            continue
        leaves = [x.clone(), *factors(form)]
        trained = [t.requires_grad_() for t, flag in zip(leaves, flags, strict=True) if flag]
        out = kronecker_linear(leaves[0], weight, None, contraction(Terms(*leaves[1:]), 4))
        want = F.linear(leaves[0], weight + dense(leaves[1:]))
        pull = torch.randn_like(out)
        for got, g in zip(
            torch.autograd.grad(out, trained, pull), torch.autograd.grad(want, trained, pull), strict=True
        ):
            torch.testing.assert_close(got, g, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_and_views(form: str) -> None:
    """Inputs that are no contiguous tensors, and gradients that are expanded scalars."""
    wide = torch.randn(3, 2 * N * Q, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(M * P, N * Q, dtype=torch.float64)
    made = [t.requires_grad_() for t in factors(form)]

    def through(x: Tensor, *made: Tensor) -> Tensor:
        return kronecker_linear(x[:, : N * Q], weight, None, contraction(Terms(*made), 3), 1.3)

    assert torch.autograd.gradcheck(through, (wide, *made))
    through(wide, *made).sum().backward()


def test_the_order_is_the_cheapest_by_count() -> None:
    """Multiplications counted by running each order's products."""

    def count(terms: Terms, order: tuple[int, bool], tokens: int) -> float:
        spent, width = 0.0, terms.left.shape[2] * terms.right.shape[2]
        original = module._cheapest
        module._cheapest = lambda *_: order  # type: ignore[assignment]
        try:
            for _, matrix in contraction(terms, tokens):
                rows, columns = matrix.shape
                spent, width = spent + tokens * width * rows, width * rows // columns
        finally:
            module._cheapest = original
        if order[1] and terms.up is not None:
            spent += terms.up.numel() * terms.right.shape[2]
        return spent

    for left, right, up in (
        ((1, 4, 4), (1, 2, 6), (6, 2)),
        ((1, 1, 8), (1, 3, 4), (7, 3)),
        ((1, 9, 2), (1, 5, 3), (3, 5)),
    ):
        terms = Terms(torch.randn(left), torch.randn(right), torch.randn(up))
        orders = ORDERS["low"]
        for tokens in (1, 2, 1000):
            picked = module._cheapest(left, right, up[0], tokens)
            assert count(terms, picked, tokens) == min(count(terms, order, tokens) for order in orders)
    for left, right in (((3, 8, 2), (3, 4, 4)), ((3, 2, 8), (3, 4, 4)), ((5, 4, 4), (5, 9, 2))):
        terms = Terms(torch.randn(left), torch.randn(right))
        picked = module._cheapest(left, right, None, 10)
        assert count(terms, picked, 10) == min(count(terms, order, 10) for order in ORDERS["three"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_changes_no_bit_and_wider_factors_keep_their_dtype(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((7, N * Q), (M * P, N * Q), (M * P,)))
    left, right = (t.requires_grad_() for t in factors("three", torch.float32))
    zero = torch.zeros_like(left, requires_grad=True)
    out = kronecker_linear(x, weight, bias, contraction(Terms(zero, right), 7), 2.0)
    assert torch.equal(out, F.linear(x, weight, bias))
    kronecker_linear(x, weight, bias, contraction(Terms(left, right), 7)).float().sum().backward()
    assert left.grad is not None and left.grad.dtype == torch.float32 and right.grad is not None


def test_what_is_saved() -> None:
    """x where its factor trains, the narrow state, never a token's wide state nor anything (out, in) but the weight."""
    for trained, most in ((True, 10 + 4), (False, 4)):
        kept: list[Tensor] = []
        x = torch.randn(1000, 10, requires_grad=True)
        left, right, up = torch.randn(1, 2, 2), torch.randn(1, 2, 5), torch.randn(6, 2)
        left.requires_grad_(), up.requires_grad_(), right.requires_grad_(trained)
        steps = contraction(Terms(left, right, up), 1000)
        assert [step.left for step in steps] == [False, True, False]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            kronecker_linear(x, torch.randn(12, 10), None, steps)
        assert sum(t.numel() for t in kept if len(t) == 1000) == (most + 4) * 1000
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            wide = [torch.randn(1, 2, 2, requires_grad=True), torch.randn(1, 6, 5, requires_grad=trained)]
            kronecker_linear(x, torch.randn(12, 10), None, contraction(Terms(*wide), 1000))
        assert sum(t.numel() for t in kept if len(t) == 1000) in ((10_000,) if trained else (12_000, 10_000))
