"""Exact where near, low-rank where far: against dense kernels written out here, and against the parts' own dense weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rankloom.attention.blocks import BlockExact, Windowed
from rankloom.attention.contract import Approximation, Factor
from rankloom.attention.factored import Factored
from rankloom.attention.heavy import heaviness, heavy_threshold
from rankloom.attention.mehler import Mehler
from rankloom.attention.nystrom import Nystrom
from rankloom.attention.polynomial import Isotropic
from rankloom.attention.precondition import Preconditioner
from rankloom.errors import AttentionError, CompositionError, RecipeError
from tests.attention.dense import weights

DIM, VALUES, SCALE = 3, 5, 0.4
Head = tuple[Tensor, Tensor, Tensor]


def head(length: int, heads: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> Head:
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return 1.5 * rand(heads, length, DIM) + 0.5, rand(length, DIM) - 1, rand(length, VALUES)


def fitted(q: Tensor, k: Tensor) -> Preconditioner:
    return Preconditioner.fit(q.detach().flatten(0, 1), k.detach(), SCALE)


def windowed(q: Tensor, k: Tensor, causal: bool, sinks: int = 2, window: int = 8, share: float = 0.0) -> Windowed:
    p = fitted(q, k)
    heavy = heavy_threshold(p, k, share)
    return Windowed(p, Isotropic(DIM, 2), scale=SCALE, causal=causal, window=window, sinks=sinks, heavy=heavy)


def block_exact(q: Tensor, k: Tensor, block: int = 8, share: float = 0.0) -> BlockExact:
    p = fitted(q, k)
    return BlockExact(p, Isotropic(DIM, 2), scale=SCALE, block=block, heavy=heavy_threshold(p, k, share))


def dense(approximation: Approximation, q: Tensor, k: Tensor, near: Tensor) -> Tensor:
    """Attention rows (g, L, L) of ``exp`` where near and ``1 + s + s^2 / 2`` elsewhere."""
    p: Preconditioner = approximation.preconditioner  # type: ignore[attr-defined]
    s = p.queries(q) @ p.keys(k).mT
    kernel = torch.where(near, s.exp(), 1 + s + s * s / 2) * p.log_weights(k).exp()
    if approximation.causal:
        kernel = kernel.tril()
    return kernel / kernel.sum(-1, keepdim=True)


def window_of(length: int, window: int, sinks: int) -> Tensor:
    near = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        chunk = i // window
        near[i, max(0, (chunk - 1) * window) : (chunk + 2) * window] = True
    near[:, :sinks] = True
    return near


def compare(approximation: Approximation, given: Head, rows: Any) -> None:
    """Output and gradients of all three inputs, for a random pull, against the dense ``rows(q, k) @ v``."""
    q, k, v = (t.detach().requires_grad_() for t in given)
    out, denominators = approximation(q, k, v)
    want = rows(q, k) @ v
    assert denominators.shape == q.shape[:2] and not denominators.requires_grad and bool((denominators > 0).all())
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    pull = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(9))
    for name, a, b in zip("qkv", *(torch.autograd.grad(y, (q, k, v), pull) for y in (out, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"gradient of {n}: {m}")


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("sinks", [0, 2, 19, 99])
@pytest.mark.parametrize("length", [1, 8, 45])
@pytest.mark.parametrize("causal", [True, False])
def test_windowed_against_a_dense_kernel(causal: bool, length: int, sinks: int, heads: int) -> None:
    q, k, v = head(length, heads)
    part = windowed(q, k, causal, sinks)
    near = window_of(length, 8, sinks)
    compare(part, (q, k, v), lambda q, k: dense(part, q, k, near))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("length", [1, 45, 600])
def test_without_a_window_only_sinks_and_heavy_keys_are_exact(length: int, heads: int) -> None:
    q, k, v = head(length, heads)
    part = windowed(q, k, causal=False, window=0, share=0.1)
    near = torch.zeros(length, length, dtype=torch.bool)
    near[:, :2] = True
    near[:, heaviness(part.preconditioner, k).topk(round(0.1 * length)).indices] = True
    compare(part, (q, k, v), lambda q, k: dense(part, q, k, near))
    at = torch.arange(length)
    torch.testing.assert_close(weights(part, q[0], at, k), dense(part, q[0], k, near))


@pytest.mark.parametrize("share", [0.2, 1.0])
@pytest.mark.parametrize("causal", [True, False])
def test_heavy_keys_are_exact_for_every_query(causal: bool, share: float) -> None:
    """The share of keys with the largest root mean square relative weight over Gaussian queries, here by its definition."""
    q, k, v = head(45, 2)
    part = windowed(q, k, causal, share=share)
    p = part.preconditioner
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(30))
    sample = torch.cartesian_prod(*[nodes] * DIM) * p.spectrum.sqrt()
    density = torch.cartesian_prod(*[weights] * DIM).prod(1) * (-sample.square() @ p.spectrum).exp()
    want = (density @ ((sample @ p.keys(k).mT + p.log_weights(k)) * 2).exp()).log() / 2
    score = heaviness(p, k)
    torch.testing.assert_close(score - score.mean(), want - want.mean(), rtol=0, atol=1e-6)
    near = window_of(45, 8, 2)
    near[:, score.topk(round(share * 45)).indices] = True
    compare(part, (q, k, v), lambda q, k: dense(part, q, k, near))


def test_heavy_keys_carry_most_of_the_error() -> None:
    """Logits of standard deviation 2, spectrum 1/i: 5 % of the keys exact at least halve the error, whatever the factor."""
    g = torch.Generator().manual_seed(0)
    spectrum = 1 / torch.arange(1, 33, dtype=torch.float64)
    root = (2 * spectrum / spectrum.norm()).sqrt()
    q, k = (torch.randn(1500, 32, generator=g, dtype=torch.float64) * root for _ in range(2))
    v = torch.randn(1500, 8, generator=g, dtype=torch.float64)
    p, want = Preconditioner.fit(q, k, 1.0), (q @ k.mT).softmax(1) @ v
    for landmarks in (True, False):
        errors = []
        for share in (0.0, 0.05):
            heavy = heavy_threshold(p, k, share)
            light = p.keys(k[heaviness(p, k) < heavy])
            factor: Factor = Mehler(p.spectrum, 256)
            if landmarks:
                factor = Nystrom.fit(light, 256, generator=torch.Generator().manual_seed(0))
            out, _ = Windowed(p, factor, scale=1.0, causal=False, window=0, sinks=0, heavy=heavy)(q[None], k, v)
            errors.append(float((out[0] - want).norm() / want.norm()))
        assert errors[1] < min(errors[0], 1) / 2


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_windowed_against_its_own_weights(causal: bool, heads: int) -> None:
    """With landmarks, whose core is not diagonal; rows asked for in any order."""
    q, k, v = head(45, heads)
    p = fitted(q, k)
    factor = Nystrom.fit(p.keys(k), 20, generator=torch.Generator().manual_seed(0))
    part = Windowed(p, factor, scale=SCALE, causal=causal, window=8, sinks=2)
    at = torch.arange(45)
    compare(part, (q, k, v), lambda q, k: torch.stack([weights(part, one, at, k) for one in q]))
    some = torch.tensor([40, 3, 17])
    torch.testing.assert_close(weights(part, q[0, some], some, k), weights(part, q[0], at, k)[some])


def test_future_tokens_change_nothing() -> None:
    q, k, v = head(45)
    part = windowed(q, k, causal=True, share=0.1)
    before = part(q, k, v)[0]
    for t in (3, 8, 30):
        changed = [
            torch.cat([a[..., :t, :], b[..., t:, :]], -2) for a, b in zip((q, k, v), head(45, seed=1), strict=True)
        ]
        after = part(*changed)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(after[:, t:], before[:, t:])


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("length", [1, 8, 45, 100])
def test_block_exact_against_its_own_weights(length: int, heads: int, share: float) -> None:
    q, k, v = head(length, heads)
    part = block_exact(q, k, share=share)
    at = torch.arange(length)
    compare(
        part, (q, k, v), lambda q, k: weights(part, q.flatten(0, 1), at.repeat(heads), k).view(heads, length, length)
    )


def test_block_exact_is_exact_on_one_group_of_similar_keys_a_query() -> None:
    """Four clusters of logits: each query is exact on its own cluster, on no more than a block, and on the same as its like."""
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[3.0, 0, 0], [-3, 0, 0], [0, 3, 0], [0, -3, 0]], dtype=torch.float64)
    label = torch.arange(160) % 4
    q, k = (centres[label] + 0.1 * torch.randn(160, 3, generator=g, dtype=torch.float64) for _ in range(2))
    part = block_exact(q[None], k, block=45)
    p = part.preconditioner
    s = p.queries(q) @ p.keys(k).mT
    kernel = weights(part, q, torch.arange(160), k) / p.log_weights(k).exp()
    near = label[:, None] == label
    ratio = kernel / torch.where(near, s.exp(), 1 + s + s * s / 2)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-10, atol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_everything_near_is_softmax(causal: bool) -> None:
    q, k, v = head(14, 2)
    part = windowed(q, k, causal, window=7)
    parts: list[Approximation] = [part, *([] if causal else [block_exact(q, k, block=14)])]
    mask = torch.zeros(14, 14, dtype=torch.float64).masked_fill_(torch.ones(14, 14).triu(1).bool() & causal, -torch.inf)
    for each in parts:
        compare(each, (q, k, v), lambda q, k: (SCALE * q @ k.mT + mask).softmax(-1))


def test_identical_keys_are_halved_all_the_same() -> None:
    q, k, v = head(40)
    k = k[:1].expand(40, -1)
    out, _ = block_exact(q, k)(q, k, v)
    torch.testing.assert_close(out, v.mean(0).expand_as(out), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_in_and_out(causal: bool) -> None:
    q, k, v = head(45, 2, dtype=torch.bfloat16)
    for part in (windowed(q, k, causal), *([] if causal else [block_exact(q, k)])):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, denominators = part(*leaves)
        assert out.dtype == torch.bfloat16 and denominators.dtype == torch.float32
        want = part(*(t.double() for t in (q, k, v)))[0]
        torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)
        out.sum().backward()
        assert all(t.grad is not None and t.grad.dtype == torch.bfloat16 for t in leaves)


@pytest.mark.parametrize("causal", [True, False])
def test_autocast_changes_nothing(causal: bool) -> None:
    """Neither the output, nor its gradients, nor the dense rows."""
    q, k, v = (t.float().requires_grad_() for t in head(45, 2))
    for part in (windowed(q, k, causal, share=0.1), *([] if causal else [block_exact(q, k, share=0.1)])):
        seen = []
        for on in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
                out = part(q, k, v)[0]
                rows = weights(part, q[0], torch.arange(45), k)
            seen.append([out, rows, *torch.autograd.grad(out.square().sum(), (q, k, v))])
        assert all(a.equal(b) for a, b in zip(*seen, strict=True))


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes():
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("kind", ["causal", "both sides", "blocks"])
def test_no_tensor_is_larger_than_the_inputs(kind: str) -> None:
    """At width 455: neither (L, width) nor (L, L), forward or backward."""
    length, dim = 1500, 12
    g = torch.Generator().manual_seed(0)
    q, k, v = (0.3 * torch.randn(*s, generator=g) for s in ((1, length, dim), (length, dim), (length, dim)))
    p, factor = Preconditioner.fit(q[0], k, SCALE), Isotropic(dim, 3)
    part: Approximation = BlockExact(p, factor, scale=SCALE, block=64)
    if kind != "blocks":
        part = Windowed(p, factor, scale=SCALE, causal=kind == "causal", window=32)
    with Largest() as largest:
        part(q, *(t.requires_grad_() for t in (k, v)))[0].sum().backward()
    assert factor.width == 455
    assert largest.elements <= max(length * (dim + 1), factor.width * 64)


def test_bad_settings_and_shapes() -> None:
    q, k, v = head(20)
    p, factor = fitted(q, k), Isotropic(DIM, 1)
    for share in (-0.1, 1.1):
        with pytest.raises(RecipeError, match=r"must lie in \[0, 1\]"):
            heavy_threshold(p, k, share)
    for window, sinks, causal in ((0, 4, True), (-1, 4, False), (8, -1, True)):
        with pytest.raises(RecipeError, match=f"causal >= 1, and sinks >= 0, got window={window} and sinks={sinks}"):
            Windowed(p, factor, scale=SCALE, causal=causal, window=window, sinks=sinks)
    with pytest.raises(RecipeError, match="block >= 1"):
        BlockExact(p, factor, scale=SCALE, block=0)
    with pytest.raises(CompositionError, match="fit it anew"):
        Windowed(p, factor, scale=2 * SCALE, causal=True)
    with pytest.raises(CompositionError, match="the factor takes 4 coordinates"):
        BlockExact(p, Isotropic(4, 1), scale=SCALE)
    for part in (Windowed(p, factor, scale=SCALE, causal=True), BlockExact(p, factor, scale=SCALE)):
        for bad in ((q[0], k, v), (q, k[:-1], v), (q, k, v[:-1]), (q, k[None], v)):
            with pytest.raises(AttentionError, match="pass one key head with its g query heads"):
                part(*bad)


def test_difficulty_is_the_norm_in_the_factors_coordinates() -> None:
    q, k, _ = head(20, 2)
    part = windowed(q, k, causal=True)
    norms = part.preconditioner.queries(q).square().sum(-1).sqrt()
    torch.testing.assert_close(part.difficulty(q), norms.where(part.difficulty(q) > 0, 0))


def test_rows_without_difficulty_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((2, 90, 3), (90, 3)))
    preconditioner = Preconditioner.fit(q.flatten(0, 1), k, 0.5)
    made = Windowed(preconditioner, Isotropic(3, 1), scale=0.5, causal=True, window=16, sinks=2)
    easy, at = made.difficulty(q) == 0, torch.arange(90)
    logits = (0.5 * q[0] @ k.mT).masked_fill(at > at[:, None], -torch.inf)
    same = (weights(made, q[0], at, k) - logits.softmax(1)).abs().amax(1) < 1e-12
    assert torch.equal(easy[0], same) and torch.equal(easy[1], same)


@pytest.mark.parametrize("kind", ["factored", "windowed", "blocks"])
def test_kernels_ignore_autocast(kind: str) -> None:
    """With landmarks, whose features are matrix products: rows in float32 at least, and the denominators are their sums."""
    q, k, v = (t.detach().float() for t in head(45, 2))
    p = fitted(q, k)
    factor, every = Nystrom.fit(p.keys(k), 20, generator=torch.Generator().manual_seed(0)), torch.arange(45)
    made: dict[str, Approximation] = {
        "factored": Factored(p, factor, scale=SCALE, causal=True, chunk=8),
        "windowed": Windowed(p, factor, scale=SCALE, causal=True, window=8, sinks=2),
        "blocks": BlockExact(p, factor, scale=SCALE, block=9),
    }
    plain = made[kind].kernel(k, every, k)(q[0], every)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made[kind].kernel(k, every, k)(q[0], every), plain)
    torch.testing.assert_close(plain.sum(1), made[kind](q, k, v)[1][0], rtol=1e-4, atol=1e-4)
    some = torch.tensor([1, 7, 8, 30, 44])
    torch.testing.assert_close(made[kind].kernel(k[some], some, k)(q[0], every), plain[:, some], rtol=1e-4, atol=1e-5)
