"""Landmarks: the kernel they stand for, its gradient, and where they are put."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankloom.attention.nystrom import Nystrom
from rankloom.errors import AttentionError, RecipeError


def gaussian(n: int, spectrum: Tensor, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, len(spectrum), generator=g, dtype=torch.float64) * spectrum.sqrt()


def clusters(n: int, sizes: Tensor, seed: int, dim: int = 16) -> tuple[Tensor, Tensor]:
    """Points around one centre of norm ``sizes[c]`` for each label ``c``, and their labels."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(len(sizes), dim, generator=g, dtype=torch.float64), dim=1)
    label = torch.randint(len(sizes), (n,), generator=g)
    noise = torch.randn(n, dim, generator=g, dtype=torch.float64)
    return (centres * sizes[:, None])[label] + 0.05 * noise, label


def kernel(factor: Nystrom, q: Tensor, k: Tensor) -> Tensor:
    return factor.features(q.mT).mT @ factor.mix(factor.features(k.mT))


def error(factor: Nystrom, q: Tensor, k: Tensor) -> float:
    """Of the attention weights, relative, in the Frobenius norm."""
    got, want = kernel(factor, q, k), (q @ k.mT).softmax(1)
    return float((got / got.sum(1, keepdim=True) - want).norm() / want.norm())


def test_kernel_is_the_nystrom_approximation() -> None:
    """``K(q, l) K(l, l)^-1 K(l, k)`` of ``K = exp(x . y)``, hence exact at the landmarks."""
    points = gaussian(60, torch.full((4,), 0.7), 0)
    landmarks, q, k = points.split(20)
    factor = Nystrom(landmarks)
    assert (factor.dim, factor.width) == (4, 20)
    want = (q @ landmarks.mT).exp() @ torch.linalg.solve((landmarks @ landmarks.mT).exp(), (landmarks @ k.mT).exp())
    torch.testing.assert_close(kernel(factor, q, k), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kernel(factor, q, landmarks), (q @ landmarks.mT).exp(), rtol=1e-5, atol=1e-5)
    assert (want / (q @ k.mT).exp() - 1).abs().max() > 1e-3  # not because everything is exact


def test_pull_back_is_autograd() -> None:
    points = gaussian(50, torch.full((4,), 0.7), 0)
    factor, x = Nystrom(points[:20]), points[20:].mT.clone().requires_grad_()
    features = factor.features(x)
    torch.testing.assert_close(features, (points[:20] @ x - points[:20].square().sum(1)[:, None] / 2).exp())
    grad = torch.randn(features.shape, dtype=features.dtype, generator=torch.Generator().manual_seed(1))
    (want,) = torch.autograd.grad(features, x, grad)
    got = factor.pull_back(x.detach(), features.detach(), grad.clone())
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_core_is_symmetric_and_solved_in_float64() -> None:
    points = gaussian(300, 0.02 / torch.arange(1, 9), 0)
    factor = Nystrom.fit(points, 100, generator=torch.Generator().manual_seed(0))
    core = factor.mix(torch.eye(factor.width, dtype=torch.float64))
    torch.testing.assert_close(core, core.mT, rtol=1e-6, atol=1e-6 * float(core.abs().max()))
    assert core.norm() > 1e6  # ill-conditioned: float32 could not solve it
    single = factor.mix(factor.features(points.float().mT))
    assert single.dtype == torch.float32
    assert error(factor, points.float(), points.float()) < 1e-4


def test_error_falls_with_the_width() -> None:
    spectrum = 0.4 / torch.arange(1, 17)
    keys, q, k = gaussian(3000, spectrum, 0), gaussian(200, spectrum, 1), gaussian(200, spectrum, 2)
    widths = (32, 128, 512)
    found = [error(Nystrom.fit(keys, w, generator=torch.Generator().manual_seed(0)), q, k) for w in widths]
    assert found[0] > 2 * found[1] > 4 * found[2]


def test_small_clusters_get_landmarks_beside_large_ones() -> None:
    """By ``exp(k . k')`` alone the clusters far out, with ``exp(|k|^2)`` up to ``e^25``, would take them all."""
    sizes = torch.linspace(1.0, 5.0, 24, dtype=torch.float64)
    keys, label = clusters(4000, sizes, 0)
    q, k = keys[:500], keys[500:1000]
    factor = Nystrom.fit(keys, 96, generator=torch.Generator().manual_seed(0))
    nearest = torch.cdist(factor.landmarks, keys).argmin(1)
    assert set(label[nearest].tolist()) == set(range(24))
    assert error(factor, q, k) < 2e-2


def test_smooth_heads_get_landmarks_where_the_kernel_is_large() -> None:
    keys = gaussian(3000, torch.full((3,), 1.0), 0)
    factor = Nystrom.fit(keys, 64, generator=torch.Generator().manual_seed(0))
    assert factor.landmarks.norm(dim=1).mean() > 1.2 * keys.norm(dim=1).mean()


def test_no_more_landmarks_than_distinct_keys() -> None:
    distinct = gaussian(10, torch.full((4,), 1.0), 0)
    keys = distinct.repeat(50, 1)
    factor = Nystrom.fit(keys, 64, generator=torch.Generator().manual_seed(0))
    assert factor.width == 10 and len(factor.landmarks.unique(dim=0)) == 10
    torch.testing.assert_close(kernel(factor, keys[:10], keys[:10]), (distinct @ distinct.mT).exp(), rtol=1e-6, atol=0)


def test_landmarks_are_detached_repeatable_keys() -> None:
    keys = gaussian(400, torch.full((4,), 1.0), 0).float().requires_grad_()
    one, two, other = (Nystrom.fit(keys, 300, generator=torch.Generator().manual_seed(s)).landmarks for s in (0, 0, 1))
    assert one.equal(two) and not one.equal(other) and not one.requires_grad and one.dtype == torch.float32
    assert len(one.unique(dim=0)) == 300 and len(torch.cat([one, keys.detach()]).unique(dim=0)) == 400


@pytest.mark.parametrize("width", [0, 301])
def test_width_beyond_the_keys(width: int) -> None:
    with pytest.raises(RecipeError, match=r"400 keys allow between 1 and 300 landmarks.*pass more keys"):
        Nystrom.fit(gaussian(400, torch.ones(3), 0), width)


def test_keys_that_are_not_finite() -> None:
    keys = gaussian(40, torch.ones(3), 0)
    keys[7, 1] = math.nan
    with pytest.raises(AttentionError, match="keys must be finite"):
        Nystrom.fit(keys, 4)
    with pytest.raises(AttentionError, match="landmarks must be finite"):
        Nystrom(keys)
    with pytest.raises(AttentionError, match=r"landmarks are \(width, dim\)"):
        Nystrom(keys[0])
