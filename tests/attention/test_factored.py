"""Preconditioner, factor and engine together, against exact attention and against their own dense rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.attention.factored import Factored, factored_kernel
from rankloom.attention.polynomial import Anisotropic, Isotropic
from rankloom.attention.precondition import Preconditioner
from rankloom.errors import AttentionError, CompositionError
from tests.attention.dense import weights

DIM, LENGTH, SCALE = 4, 61, 0.5


def head(g: int = 2) -> list[Tensor]:
    """Unbalanced and off-centre."""
    q = 8 * (0.3 * torch.randn(g, LENGTH, DIM, dtype=torch.float64) + torch.tensor([1.0, -1, 2, 0]))
    k = (0.3 * torch.randn(LENGTH, DIM, dtype=torch.float64) + torch.tensor([0, 3.0, 1, 1])) / 8
    return [t.requires_grad_() for t in (q, k, torch.randn(LENGTH, 3, dtype=torch.float64))]


def approximation(q: Tensor, k: Tensor, causal: bool, degree: int = 3, chunk: int | None = 16) -> Factored:
    p = Preconditioner.fit(q.reshape(-1, DIM), k, SCALE)
    return Factored(p, Isotropic(DIM, degree), scale=SCALE, causal=causal, chunk=chunk)


@pytest.mark.parametrize("causal", [False, True])
def test_tends_to_exact_attention(causal: bool) -> None:
    q, k, v = head()
    exact = F.scaled_dot_product_attention(q, k.expand(2, -1, -1), v.expand(2, -1, -1), scale=SCALE, is_causal=causal)
    pull = torch.randn_like(exact)
    want = torch.autograd.grad(exact, (q, k, v), pull)
    errors = []
    for degree in (2, 5, 8, 16):
        out, denominators = approximation(q, k, causal, degree)(q, k, v)
        assert (denominators > 0).all() and denominators.shape == (2, LENGTH)
        grads = torch.autograd.grad(out, (q, k, v), pull)
        pairs = zip((out, *grads), (exact, *want), strict=True)
        errors.append(max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs))
    assert errors == sorted(errors, reverse=True) and errors[0] < 0.2 and errors[-1] < 1e-9, errors


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [1, 16, None])
def test_weights_are_the_rows_it_amounts_to(causal: bool, chunk: int | None) -> None:
    q, k, v = head()
    a = approximation(q, k, causal, degree=2, chunk=chunk)
    out, _ = a(q, k, v)
    at = torch.tensor([0, 60, 17, 16, 15, 33])
    rows = weights(a, q[1, at], at, k)
    torch.testing.assert_close(rows.sum(-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(rows @ v, out[1, at], rtol=1e-10, atol=1e-12)
    pull = torch.randn(6, 3, dtype=torch.float64)
    ours = torch.autograd.grad(rows @ v, (q, k, v), pull)
    theirs = torch.autograd.grad(out[1, at], (q, k, v), pull)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_of_some_keys_is_part_of_the_kernel_of_all(causal: bool) -> None:
    q, k, v = head()
    a, at = approximation(q, k, causal), torch.tensor([60, 17, 3])
    kernel, some = a.kernel(k, torch.arange(LENGTH), k)(q[1, at], at), torch.tensor([2, 3, 16, 17, 18, 60])
    torch.testing.assert_close(kernel.sum(1), a(q, k, v)[1][1, at])
    part = a.kernel(k[some], some, k)(q[1, at], at)
    torch.testing.assert_close(part, kernel[:, some])
    pull = torch.randn(3, 6, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(x, (q, k), pull) for x in (part, kernel[:, some]))
    torch.testing.assert_close(ours, theirs)


def test_kernel_over_many_chunks_is_the_dense_product() -> None:
    factor = Anisotropic(torch.tensor([0.5, 0.4, 0.3, 0.1]), 900, max_degree=12)
    q, k = (0.5 * torch.randn(n, DIM, dtype=torch.float64) for n in (5, 1500))
    series = sum((q @ k.mT) ** j / math.factorial(j) for j in range(5))
    torch.testing.assert_close(factored_kernel(k, Isotropic(DIM, 4))(q), series, rtol=1e-12, atol=1e-12)
    leaves = (q[:2].clone().requires_grad_(), k[:3].clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: factored_kernel(b, factor)(a), leaves)
    rows, leaf, pull = q.clone().requires_grad_(), k.clone().requires_grad_(), torch.randn(5, 1500, dtype=torch.float64)
    got, dense = factored_kernel(leaf, factor)(rows), factor.mix(factor.features(q.mT)).mT @ factor.features(k.mT)
    torch.testing.assert_close(got, dense)
    back = factor.pull_back(k.mT, factor.features(k.mT), factor.mix(factor.features(q.mT)) @ pull).mT
    torch.testing.assert_close(torch.autograd.grad(got, leaf, pull)[0], back)


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_and_autocast(causal: bool) -> None:
    """Half precision in and out, everything between in float32."""
    half = [t.detach().bfloat16().requires_grad_() for t in head()]
    a = approximation(half[0], half[1], causal)
    wide = [t.detach().float().requires_grad_() for t in half]
    want = a(*wide)[0]
    pull = torch.randn_like(want)
    grads = torch.autograd.grad(want, wide, pull)
    with torch.autocast("cpu", torch.bfloat16):
        got, at = a(*wide)[0], torch.arange(5)
        rows = weights(a, wide[0][0, :5], at, wide[1])
        value = torch.autograd.grad(got, wide[2], pull, retain_graph=True)[0]
    assert torch.equal(got, want) and torch.equal(value, grads[2])
    assert torch.equal(rows, weights(a, wide[0][0, :5], at, wide[1]))
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(got, wide, pull), grads, strict=True))
    out = a(*half)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, want.bfloat16())
    for one, other in zip(torch.autograd.grad(out, half, pull.bfloat16()), grads, strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.float() - other).norm() / other.norm()) < 3e-2


def test_difficulty_is_the_norm_in_the_factors_coordinates() -> None:
    q, k, _ = head()
    a = approximation(q, k, causal=False)
    want = a.preconditioner.queries(q).square().sum(-1).sqrt().detach()
    assert not a.difficulty(q).requires_grad
    torch.testing.assert_close(a.difficulty(q), want)
    want[:, :16] = 0.0  # the first chunk, which is exact
    torch.testing.assert_close(approximation(q, k, causal=True).difficulty(q), want)


def test_bad_input_is_refused() -> None:
    q, k, _ = head()
    p = Preconditioner.fit(q[0], k, SCALE)
    with pytest.raises(CompositionError, match="takes 3 coordinates, the preconditioner gives 4"):
        Factored(p, Isotropic(3, 2), scale=SCALE, causal=True)
    with pytest.raises(CompositionError, match="fitted at scale"):
        Factored(p, Isotropic(4, 2), scale=0.1, causal=True)
    with pytest.raises(AttentionError, match="a kernel is of keys"):
        approximation(q, k, causal=True).kernel(k[0], torch.arange(3), k)
