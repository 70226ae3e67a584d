"""The engine against the same map written out densely, its autograd, and exact attention."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankloom.attention.contract import Factor
from rankloom.attention.engine import default_chunk, factored_attention
from rankloom.attention.polynomial import Anisotropic, Isotropic, exponential_series
from rankloom.errors import AttentionError

DIM, VALUES, LENGTH = 3, 4, 23


def head(g: int = 1, length: int = LENGTH, dtype: torch.dtype = torch.float64, size: float = 0.6) -> list[Tensor]:
    q, k = size * torch.randn(g, length, DIM), size * torch.randn(length, DIM)
    v, log_weight = torch.randn(length, VALUES) + 1, -torch.rand(length)
    return [t.to(dtype).requires_grad_() for t in (q, k, v, log_weight)]


def dense(
    q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, series: list[float], chunk: int | None
) -> tuple[Tensor, Tensor]:
    """``p(S)`` (with exact diagonal blocks of ``chunk`` and a causal mask, or neither), normalised by rows."""
    s = q @ k.mT
    kernel = sum((a * s**j for j, a in enumerate(series)), torch.zeros_like(s))
    if chunk is not None:
        at = torch.arange(len(k))
        block = at // chunk
        kernel = torch.where(block[:, None] == block, s.exp(), kernel) * (at[:, None] >= at)
    kernel = kernel * log_weight.exp()
    denominators = kernel.sum(-1)
    return (kernel / denominators[..., None]) @ v, denominators


def compare(got: Tensor, want: Tensor, leaves: list[Tensor], rtol: float) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)
    pull = torch.randn_like(got)
    ours = torch.autograd.grad(got, leaves, pull)
    theirs = torch.autograd.grad(want, leaves, pull)
    for name, one, other in zip(["q", "k", "v", "lw"], ours, theirs, strict=False):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"gradient of {n}: {m}")


@pytest.mark.parametrize("g", [1, 3])
@pytest.mark.parametrize("chunk", [1, 5, 8, 23, 100])
@pytest.mark.parametrize("causal", [False, True])
def test_dense_map_and_its_autograd(causal: bool, chunk: int, g: int) -> None:
    leaves = head(g)
    for degree, name in ((0, "taylor"), (3, "taylor"), (4, "chebyshev")):
        factor = Isotropic(DIM, degree, name, 2.0)
        got, denominators = factored_attention(*leaves, factor, causal=causal, chunk=chunk)
        want, sums = dense(*leaves, factor.series, chunk if causal else None)
        assert not denominators.requires_grad
        torch.testing.assert_close(denominators, sums.detach(), rtol=1e-10, atol=1e-10)
        if degree or causal:
            compare(got, want, leaves, 1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_layouts_and_other_lengths(causal: bool) -> None:
    """Strided inputs and pulls; without a mask there may be more or fewer queries than keys."""
    factor = Isotropic(DIM, 3)
    wide = torch.randn(LENGTH, 2, 2 * DIM, dtype=torch.float64)
    k, v, log_weight = head()[1:]
    q = wide[..., ::2].transpose(0, 1).requires_grad_()
    got, _ = factored_attention(q, k, v, log_weight, factor, causal=causal, chunk=6)
    want, _ = dense(q, k, v, log_weight, factor.series, 6 if causal else None)
    compare(got, want, [q, k, v, log_weight], 1e-10)
    got, _ = factored_attention(q, k, v, log_weight, factor, causal=causal, chunk=6)
    ours = torch.autograd.grad(got.sum(), [q, k])  # an expanded pull with zero strides
    theirs = torch.autograd.grad(dense(q, k, v, log_weight, factor.series, 6 if causal else None)[0].sum(), [q, k])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    if not causal:
        for count in (1, 40):
            q = torch.randn(2, count, DIM, dtype=torch.float64).requires_grad_()
            got, _ = factored_attention(q, k, v, log_weight, factor, causal=False, chunk=6)
            compare(got, dense(q, k, v, log_weight, factor.series, None)[0], [q, k, v, log_weight], 1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), ()])
def test_only_the_gradients_asked_for(wanted: tuple[int, ...], causal: bool) -> None:
    leaves = head(2)
    given = [t if i in wanted else t.detach() for i, t in enumerate(leaves)]
    factor = Isotropic(DIM, 3)
    got, _ = factored_attention(*given, factor, causal=causal, chunk=6)
    assert got.requires_grad == bool(wanted)
    if wanted:
        want, _ = dense(*leaves, factor.series, 6 if causal else None)
        compare(got, want, [leaves[i] for i in wanted], 1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("coefficients", ["taylor", "chebyshev"])
def test_error_falls_to_nothing_under_the_bound(coefficients: str, causal: bool) -> None:
    leaves = head(size=0.4)
    radius = float((leaves[0] @ leaves[1].mT).detach().abs().max())
    logits = leaves[0] @ leaves[1].mT + leaves[3]
    if causal:
        logits = logits.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
    exact = logits.softmax(-1) @ leaves[2]
    pull = torch.randn_like(exact)
    want = torch.autograd.grad(exact, leaves[:3], pull)
    errors: list[list[float]] = []
    for degree in range(0, 15, 2):
        factor = Isotropic(DIM, degree, coefficients, radius)
        out, _ = factored_attention(*leaves, factor, causal=causal, chunk=8)
        eps = factor.bound(radius)
        if eps < 1:
            assert (
                float((out - exact).detach().abs().max())
                <= 2 * eps / (1 - eps) * float(leaves[2].detach().abs().max()) + 1e-12
            )
        grads = torch.autograd.grad(out, leaves[:3], pull)
        pairs = zip((out, *grads), (exact, *want), strict=True)
        errors.append([float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs])
    for column in zip(*errors, strict=True):
        assert all(b < a or a < 1e-11 for a, b in itertools.pairwise(column))
        assert column[-1] < 1e-9


def test_anisotropic_runs_through_the_same_engine() -> None:
    leaves = head()
    factor = Anisotropic(torch.tensor([0.6, 0.4, 0.1]), 12)
    got, _ = factored_attention(*leaves, factor, causal=False, chunk=6)
    q, k = (torch.stack([t[..., i] for i in range(DIM)]) for t in leaves[:2])
    kernel = torch.einsum("wgi,wj->gij", _powers(factor, q), factor.mix(_powers(factor, k))) * leaves[3].exp()
    compare(got, kernel @ leaves[2] / kernel.sum(-1, keepdim=True), leaves, 1e-10)


def _powers(factor: Factor, x: Tensor) -> Tensor:
    """The factor's monomials as powers; which they are is read off at (2, 4^2, 4^4)."""
    logs = (
        factor.features(torch.tensor([[2.0], [2.0**12], [2.0**144]], dtype=torch.float64))[:, 0].log2().round().long()
    )
    exponents = [(int(n) % 12, int(n) % 144 // 12, int(n) // 144) for n in logs]
    return torch.stack([x[0] ** a * x[1] ** b * x[2] ** c for a, b, c in exponents])


def test_the_past_does_not_see_the_future() -> None:
    q, k, v, log_weight = (t.detach() for t in head(2))
    factor, at = Isotropic(DIM, 3), 12
    before, _ = factored_attention(q, k, v, log_weight, factor, causal=True, chunk=5)
    for t in (q, k, v):
        t[..., at + 1 :, :] += 7
    log_weight[at + 1 :] = -3
    after, _ = factored_attention(q, k, v, log_weight, factor, causal=True, chunk=5)
    torch.testing.assert_close(after[:, : at + 1], before[:, : at + 1], rtol=1e-13, atol=1e-13)
    assert (after[:, at + 1 :] - before[:, at + 1 :]).abs().min() > 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_values_get_wide_sums(causal: bool) -> None:
    leaves = head(2, length=200)
    narrow = [leaves[0].float(), leaves[1].float(), leaves[2].bfloat16(), leaves[3].float()]
    narrow = [t.detach().requires_grad_() for t in narrow]
    factor = Isotropic(DIM, 5)
    out, denominators = factored_attention(*narrow, factor, causal=causal, chunk=32)
    assert out.dtype == torch.bfloat16 and denominators.dtype == torch.float32
    wide = [t.detach().double().requires_grad_() for t in narrow]
    want, _ = factored_attention(*wide, factor, causal=causal, chunk=32)
    torch.testing.assert_close(out, want.bfloat16(), rtol=2**-7, atol=1e-6)
    pull = torch.randn_like(want)
    theirs = torch.autograd.grad(want, wide, pull.bfloat16().double())
    for one, other, leaf in zip(torch.autograd.grad(out, narrow, pull.bfloat16()), theirs, narrow, strict=True):
        assert one.dtype == leaf.dtype
        assert float((one.double() - other).norm() / other.norm()) < 2e-2


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives out."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_of_length_by_width_or_by_length_is_formed(causal: bool) -> None:
    """Nor kept between the passes: those are the inputs, output, denominators and one state."""
    length, chunk = 1024, 64
    saved: list[int] = []
    leaves = head(length=length, dtype=torch.float32)
    factor = Isotropic(DIM, 7)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
        Largest() as seen,
    ):
        out, _ = factored_attention(*leaves, factor, causal=causal, chunk=chunk)
        torch.autograd.grad(out.sum(), leaves)
    assert sum(saved) <= length * (2 * DIM + 2 * VALUES + 2) + factor.width * (VALUES + 1)
    assert seen.numel <= max(length * VALUES, chunk * max(factor.width, chunk))


def test_light_early_keys_keep_their_digits_in_the_causal_gradient() -> None:
    """Sums over the past are formed from the past, not by taking the future, up to e^40 as large, out of the whole."""
    q, k, v, _ = head(length=96)
    log_weight = torch.linspace(-40, 0, 96, dtype=torch.float64).requires_grad_()
    leaves = [q, k, v, log_weight]
    narrow = [t.detach().float().requires_grad_() for t in leaves]
    factor, pull = Isotropic(DIM, 3), torch.randn(1, 96, VALUES, dtype=torch.float64)
    wide, _ = factored_attention(*leaves, factor, causal=True, chunk=8)
    want, _ = dense(*leaves, factor.series, 8)
    got, _ = factored_attention(*narrow, factor, causal=True, chunk=8)
    dq = torch.autograd.grad(want, q, pull)[0]
    torch.testing.assert_close(torch.autograd.grad(wide, q, pull)[0], dq, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, narrow[0], pull.float())[0].double(), dq, rtol=1e-3, atol=1e-5)


def test_default_chunk_fits_the_cache() -> None:
    for factor in (Isotropic(16, 2), Isotropic(16, 3), Isotropic(64, 2)):
        for causal in (False, True):
            chunk = default_chunk(factor, causal)
            assert chunk % 32 == 0 and 64 <= chunk <= 1024
            assert chunk * factor.width * 4 <= 1_500_000


def test_bad_input_is_refused() -> None:
    q, k, v, log_weight = (t.detach() for t in head(2))
    factor = Isotropic(DIM, 2)
    for bad, match in (
        ((q[0], k, v, log_weight), r"takes q \(g, L, 3\)"),
        ((q[..., :2], k, v, log_weight), r"takes q \(g, L, 3\)"),
        ((q, k, v[1:], log_weight), "as many values"),
        ((q, k, v, log_weight[1:]), "as many values"),
        ((q[:, 1:], k, v, log_weight), "as many queries"),
        ((q.float(), k, v, log_weight), "all float32 or all float64"),
    ):
        with pytest.raises(AttentionError, match=match):
            factored_attention(*bad, factor, causal=True)
    with pytest.raises(AttentionError, match="at least one token"):
        factored_attention(q, k, v, log_weight, factor, causal=True, chunk=-1)


def test_series_of_the_oracle() -> None:
    assert exponential_series(3) == [1, 1, 1 / 2, 1 / 6]
