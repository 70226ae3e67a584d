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


def saved_per_token(terms: Terms) -> float:
    """Numbers a token that a forward pass keeps."""
    kept: list[Tensor] = []
    x, tokens = torch.randn(1000, 10, requires_grad=True), 1000
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kronecker_linear(x, torch.randn(12, 10), None, contraction(terms, tokens))
    assert not any(t.shape == (12, 10) for t in kept[1:])  # the frozen weight, and no update
    return sum(t.numel() for t in kept if len(t) == tokens) / tokens


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_saved(trained: bool) -> None:
    """x where the factor that meets it trains; narrow states; wide ones only where they cannot be formed again."""
    left = torch.randn(1, 2, 2, requires_grad=True)
    low = Terms(left, torch.randn(1, 2, 5, requires_grad=trained), torch.randn(6, 2, requires_grad=True))
    assert [step.left for step in contraction(low, 1000)] == [False, True, False]
    assert saved_per_token(low) == (10 if trained else 0) + 4 + 4
    wide = Terms(torch.randn(1, 3, 2, requires_grad=True), torch.randn(1, 4, 5, requires_grad=trained))
    assert [step.left for step in contraction(wide, 1000)] == [False, True]
    assert saved_per_token(wide) == (10 if trained else 8)
    first = Terms(torch.randn(1, 1, 2, requires_grad=True), torch.randn(1, 12, 5, requires_grad=trained))
    assert [step.left for step in contraction(first, 1000)] == [True, False]
    assert saved_per_token(first) == (10 + 5 if trained else 10)
