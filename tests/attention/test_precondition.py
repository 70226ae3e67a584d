"""The change of coordinates: exact in the softmax, balanced in the covariances, harmless on degenerate clouds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankloom.attention.precondition import Preconditioner
from rankloom.errors import AttentionError

SCALE = 0.3


def clouds(d: int = 6, n: int = 300, m: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Far offsets, correlated coordinates, column scales over four decades, queries 1e3 times the keys."""
    g = torch.Generator().manual_seed(seed)

    def cloud(rows: int, size: float) -> Tensor:
        mix = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
        columns = 10 ** (4 * torch.rand(d, generator=g, dtype=torch.float64) - 3)
        points = torch.randn(rows, d, generator=g, dtype=torch.float64) * columns @ mix
        return size * (points + 3 * torch.randn(d, generator=g, dtype=torch.float64))

    return cloud(n, 30.0), cloud(m, 0.03)


def softmax(p: Preconditioner, q: Tensor, k: Tensor) -> Tensor:
    return (p.queries(q) @ p.keys(k).mT + p.log_weights(k)).softmax(-1)


@pytest.mark.parametrize("rows", [4096, 64])
def test_softmax_is_unchanged(rows: int) -> None:
    """Also for rows that were not fitted to."""
    q, k = clouds()
    p = Preconditioner.fit(q, k, SCALE, rows=rows, generator=torch.Generator().manual_seed(1))
    for a, b in ((q, k), (3 * clouds(seed=5)[0], k - 0.1)):
        want = (SCALE * a @ b.mT).softmax(-1)
        torch.testing.assert_close(softmax(p, a, b), want, rtol=1e-8, atol=1e-10)
    assert p.log_weights(k).amax() == 0


def test_both_covariances_are_the_spectrum() -> None:
    q, k = clouds()
    p = Preconditioner.fit(q, k, SCALE)
    for cloud in (p.queries(q), p.keys(k)):
        torch.testing.assert_close(cloud.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-8)
        root = p.spectrum.rsqrt()
        covariance = root[:, None] * torch.cov(cloud.mT, correction=0) * root
        torch.testing.assert_close(covariance, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (p.spectrum.diff() <= 0).all()
    centred = SCALE * (q - q.mean(0)) @ (k - k.mean(0)).mT
    torch.testing.assert_close(centred.square().mean(), p.spectrum.square().sum(), rtol=1e-9, atol=0)


def test_gradients_pass_through_as_through_the_logits() -> None:
    q, k = (t.requires_grad_() for t in clouds(n=20, m=30))
    p = Preconditioner.fit(q, k, SCALE)
    assert not any(getattr(p, n).requires_grad for n in ("query_mean", "key_mean", "query_map", "key_map", "spectrum"))
    pull = torch.randn(20, 30, dtype=torch.float64)
    ours = torch.autograd.grad(softmax(p, q, k), (q, k), pull)
    want = torch.autograd.grad((SCALE * q @ k.mT).softmax(-1), (q, k), pull)
    for one, other in zip(ours, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize("case", ["constant queries", "zero queries", "flat keys", "one key"])
def test_degenerate_clouds(case: str) -> None:
    q, k = (torch.randn(50, 4) for _ in range(2))
    if "queries" in case:
        q = torch.full_like(q, 0.1 if case.startswith("constant") else 0.0)
    if case == "flat keys":
        k[:, 1:3] = 0.7
    if case == "one key":
        k = k[:1]
    p = Preconditioner.fit(q, k, SCALE)
    for a in (q, q + torch.randn_like(q)):  # later queries leave the cloud that was fitted to
        torch.testing.assert_close(softmax(p, a, k), (SCALE * a @ k.mT).softmax(-1), rtol=1e-4, atol=1e-5)


def test_half_precision_is_widened() -> None:
    q, k = (torch.randn(40, 4, dtype=torch.bfloat16) for _ in range(2))
    p = Preconditioner.fit(q, k, SCALE)
    assert p.queries(q).dtype == p.keys(k).dtype == p.log_weights(k).dtype == torch.float32
    torch.testing.assert_close(softmax(p, q, k), (SCALE * q.float() @ k.float().mT).softmax(-1), rtol=1e-4, atol=1e-6)


def test_bad_input_is_refused() -> None:
    q, k = torch.randn(5, 4), torch.randn(6, 4)
    for a, b in ((q[None], k), (q[:, :3], k), (q[:0], k)):
        with pytest.raises(AttentionError, match="of one width"):
            Preconditioner.fit(a, b, SCALE)
    with pytest.raises(AttentionError, match="NaN or infinity"):
        Preconditioner.fit(q.index_fill(0, torch.tensor([2]), torch.nan), k, SCALE)
