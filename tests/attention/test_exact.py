"""Closed-form gradients against autograd in float64, and the literal chain against them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.attention.chain import chain_cost, chain_gradients, engine_cost, khatri_rao
from rankloom.attention.exact import attention_gradients, attention_weights, lora_gradients
from rankloom.attention.factored import Factored
from rankloom.attention.polynomial import Isotropic
from rankloom.attention.precondition import Preconditioner
from rankloom.errors import AttentionError
from rankloom.kernels.lowrank import Linear

LENGTH, MODEL, DIM, VALUES, RANK = 37, 10, 5, 4, 3


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def projections(bias: bool) -> dict[str, Linear]:
    def one(out: int) -> Linear:
        return Linear(
            torch.randn(out, MODEL, dtype=torch.float64),
            torch.randn(out, dtype=torch.float64) if bias else None,
            torch.randn(RANK, MODEL, dtype=torch.float64).requires_grad_(),
            torch.randn(out, RANK, dtype=torch.float64).requires_grad_(),
            scale=0.7,
        )

    return {"q": one(DIM), "k": one(DIM), "v": one(VALUES)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapted", ["qv", "qkv"])
@pytest.mark.parametrize("causal", [False, True])
def test_factor_gradients_are_autograds(causal: bool, adapted: str, bias: bool) -> None:
    x, target = (torch.randn(LENGTH, n, dtype=torch.float64) for n in (MODEL, VALUES))
    linears, scale = projections(bias), 1 / math.sqrt(DIM)
    q, k, v = (F.linear(x, p.weight + p.scale * p.b @ p.a, p.bias) for p in linears.values())
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    loss = (out - target).square().sum() / 2
    names = [(name, factor) for name in adapted for factor in ("a", "b")]
    want = torch.autograd.grad(loss, [getattr(linears[name], factor) for name, factor in names])
    with torch.no_grad():
        got = lora_gradients(x, linears, lambda o: o - target, scale=scale, causal=causal, adapted=tuple(adapted))
    assert set(got) == set(adapted)
    for (name, factor), other in zip(names, want, strict=True):
        assert relative(got[name]["ab".index(factor)], other) < 1e-12, (name, factor)


@pytest.mark.parametrize("causal", [False, True])
def test_heads_that_share_their_keys(causal: bool) -> None:
    q = torch.randn(3, LENGTH, DIM, dtype=torch.float64).requires_grad_()
    k, v = (torch.randn(LENGTH, n, dtype=torch.float64).requires_grad_() for n in (DIM, VALUES))
    out = F.scaled_dot_product_attention(q, k.expand(3, -1, -1), v.expand(3, -1, -1), scale=0.4, is_causal=causal)
    grad = torch.randn_like(out)
    want = torch.autograd.grad(out, (q, k, v), grad)
    with torch.no_grad():
        got = attention_gradients(q, k, v, grad, scale=0.4, causal=causal)
        assert relative(attention_weights(q, k, scale=0.4, causal=causal) @ v, out) < 1e-13
    assert all(relative(a, b) < 1e-12 for a, b in zip(got, want, strict=True))


def chain_head(size: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = (size * torch.randn(LENGTH, DIM, dtype=torch.float64) for _ in range(2))
    return q, k, *(torch.randn(LENGTH, VALUES, dtype=torch.float64) for _ in range(2))


def test_khatri_rao_products_multiply_as_hadamard() -> None:
    a, c = (torch.randn(n, 3, dtype=torch.float64) for n in (6, 7))
    b, d = (torch.randn(n, 4, dtype=torch.float64) for n in (6, 7))
    torch.testing.assert_close(khatri_rao(a, b) @ khatri_rao(c, d).mT, (a @ c.mT) * (b @ d.mT))


def test_chain_with_an_exact_factorisation_is_exact() -> None:
    q, k, v, grad = chain_head()
    out, *got = chain_gradients(
        (0.3 * q @ k.mT).exp(), torch.eye(LENGTH, dtype=torch.float64), q, k, v, grad, scale=0.3
    )
    want = attention_gradients(q[None], k, v, grad[None], scale=0.3, causal=False)
    assert relative(out, attention_weights(q[None], k, scale=0.3, causal=False)[0] @ v) < 1e-13
    assert all(relative(a, b.view_as(a)) < 1e-12 for a, b in zip(got, want, strict=True))


def chain_of(factor: Isotropic) -> Callable[..., tuple[Tensor, ...]]:
    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, ...]:
        u1, u2 = factor.features((scale * q).mT.contiguous()).mT, factor.mix(factor.features(k.mT.contiguous())).mT
        return chain_gradients(u1, u2, q, k, v, grad, scale=scale)[1:]

    return run


def test_chain_and_engine_are_of_the_same_accuracy() -> None:
    """And the engine's is the cheaper one, by a factor of about d."""
    q, k, v, grad = chain_head(0.7)
    want = attention_gradients(q[None], k, v, grad[None], scale=0.3, causal=False)
    worst = []
    for degree in (2, 4, 6):
        factor = Isotropic(DIM, degree)
        plain = Preconditioner(0.3, *(torch.zeros(DIM),) * 2, 0.3 * torch.eye(DIM), torch.eye(DIM), torch.ones(DIM))
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, _ = Factored(plain, factor, scale=0.3, causal=False)(leaves[0][None], *leaves[1:])
        engine = torch.autograd.grad(out, leaves, grad[None])
        errors = [
            max(relative(a, b.view_as(a)) for a, b in zip(grads, want, strict=True))
            for grads in (chain_of(factor)(q, k, v, grad, 0.3), engine)
        ]
        assert 1 / 30 < errors[0] / errors[1] < 30
        worst.append(errors)
    assert worst[2][0] < 1e-2 * worst[0][0] and worst[2][1] < 1e-2 * worst[0][1]
    chain, engine = chain_cost(65536, 969, 16, 16), engine_cost(65536, 969, 16, 16)
    assert chain.flops > 8 * engine.flops and chain.state == 16 * engine.state


def test_bad_input_is_refused() -> None:
    q, k, v, grad = chain_head()
    with pytest.raises(AttentionError, match="exact gradients take"):
        attention_gradients(q, k, v, grad, scale=1, causal=False)
    with pytest.raises(AttentionError, match="exact gradients take"):
        attention_gradients(q[None], k, v, grad[None, :-1], scale=1, causal=False)
    with pytest.raises(AttentionError, match="factors of exp"):
        chain_gradients(q, k[:-1], q, k, v, grad, scale=1)
    with pytest.raises(AttentionError, match="projections q, k and v"):
        lora_gradients(q, {"q": None}, lambda o: o, scale=1, causal=False)  # type: ignore[dict-item]
