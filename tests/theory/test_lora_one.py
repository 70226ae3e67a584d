"""LoRA-One's theorems (2502.01235) on the linear model, by gradient descent written out in the helper module."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankloom import Calibration, Targets, adapt
from rankloom.adapters import LoRA
from rankloom.init import OneStepGradient
from rankloom.recipe import Recipe
from tests.theory.linear_model import LinearModel, descend, lora_start, problem, spectral_start


def op(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def principal(one: Tensor, other: Tensor) -> float:
    """Sine of the largest principal angle between two orthonormal bases."""
    return op(other - one @ (one.T @ other))


FOUR = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)


def test_the_negative_gradient_is_delta_sigma_and_has_its_rank() -> None:
    model = problem(40, FOUR, samples=400)
    torch.testing.assert_close(model.negative, model.delta @ model.sigma)
    s = torch.linalg.svdvals(model.negative)
    assert s[3] > 0.05 and s[4] < 1e-12


def test_t31_columns_of_b_never_leave_the_top_subspace() -> None:
    """T3.1: from LoRA's start, for every step, the columns of ``B`` stay in the top-r* out-side subspace of ``N``."""
    model = problem(60, FOUR, samples=600)
    top = torch.linalg.svd(model.negative).U[:, :4]
    seen: list[tuple[Tensor, Tensor]] = []
    descend(model, *lora_start(model, 8, std=0.1), lr=0.05, steps=1500, watch=seen)
    for b, _ in seen[::50] + seen[-1:]:
        left = torch.linalg.svd(b, full_matrices=False).U[:, :4]
        assert principal(top, left) < 1e-11
        assert op(b - top @ (top.T @ b)) < 1e-13


def test_t32_small_starts_align_the_rows_of_a() -> None:
    """T3.2: rows of ``A`` align with the in-side subspace of ``N``, the better the smaller the start (``Sigma = I``)."""
    model = problem(100, FOUR, samples=None)
    top = torch.linalg.svd(model.negative).Vh[:4].T
    angles = []
    for std in (0.1, 0.01, 0.001):
        seen: list[tuple[Tensor, Tensor]] = []
        descend(model, *lora_start(model, 8, std=std), lr=0.05, steps=1500, watch=seen)
        angles.append(min(principal(top, torch.linalg.svd(a, full_matrices=False).Vh[:4].T) for _, a in seen[::20]))
    assert angles[0] > 0.5 and angles[1] < 0.01 and angles[2] < 1e-3


@pytest.mark.parametrize("samples", [600, 6000, 60000])
def test_t33_one_step_recovery(samples: int) -> None:
    """T3.3: ``||B0 A0 - Delta|| <= ||Sigma - I|| ||Delta||`` in operator norm, at step size one."""
    model = problem(60, FOUR, samples)
    b, a = spectral_start(model, 4)
    bound = op(model.sigma - torch.eye(60, dtype=torch.float64)) * op(model.delta)
    assert op(b @ a - model.delta) <= bound
    assert bound < {600: 0.9, 6000: 0.25, 60000: 0.08}[samples]


@pytest.mark.parametrize("rank", [4, 8])
def test_t33_is_exact_for_isotropic_inputs(rank: int) -> None:
    model = problem(60, FOUR, samples=None)
    b, a = spectral_start(model, rank)
    assert op(b @ a - model.delta) < 1e-13


def kappa_steps(kappa: float, *, preconditioned: bool, ridge: float = 1e-6) -> int:
    singular = torch.logspace(0, -math.log10(kappa), 4, dtype=torch.float64)
    model = problem(60, singular, samples=6000)
    b, a = spectral_start(model, 4)
    _, steps = descend(model, b, a, lr=0.4, steps=4000, tolerance=1e-6, preconditioned=preconditioned, ridge=ridge)
    return steps


def test_condition_number_table() -> None:
    """Steps to 1e-6: plain descent grows with kappa(Delta) (27 ... 1767 over 1 ... 100), preconditioned does not (26)."""
    kappas = (1, 3, 10, 30, 100)
    plain = [kappa_steps(k, preconditioned=False) for k in kappas]
    scaled = [kappa_steps(k, preconditioned=True) for k in kappas]
    ridged = [kappa_steps(k, preconditioned=True, ridge=1e-3) for k in kappas[:3]]
    assert plain == sorted(plain) and plain[0] < 60 and plain[-1] > 20 * plain[0]
    for smaller, larger, step in zip(plain[1:], plain[2:], (10 / 3, 3, 10 / 3), strict=False):
        assert 0.4 * step < larger / smaller < 2 * step  # grows about as kappa does
    assert max(scaled) - min(scaled) <= 3 and max(scaled) < 40
    assert max(ridged) - min(ridged) <= 3


def lora_ga_start(model: LinearModel, rank: int) -> tuple[Tensor, Tensor]:
    """LoRA-GA's split: ``A`` from the first r right directions, ``B`` from the next r left ones, orthonormal."""
    u, _, vh = torch.linalg.svd(model.gradient(torch.zeros_like(model.delta)))
    return u[:, rank : 2 * rank], vh[:rank]


def test_fig4_lora_one_reaches_the_minimum_where_lora_ga_floors() -> None:
    """Subtracting a start from other directions makes the target's rank r* + r > r: a floor no optimizer gets below."""
    model, rank = problem(100, FOUR, samples=1600), 8
    one, _ = descend(model, *spectral_start(model, rank), lr=0.4, steps=2500, tolerance=1e-11, preconditioned=True)
    assert model.error(one) < 1e-10
    b, a = lora_ga_start(model, rank)
    floor = []
    for preconditioned in (False, True):
        ga, _ = descend(model, b, a, lr=0.3, steps=800, offset=b @ a, preconditioned=preconditioned)
        floor.append(model.error(ga))
    # The capacity argument itself: both optimizers end at the best rank-r fit of `Delta + offset`, and that is not zero.
    root = torch.linalg.cholesky(model.sigma)
    target = (model.delta + b @ a) @ root
    u, s, vh = torch.linalg.svd(target)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root) - b @ a
    assert model.error(best) > 0.1
    assert floor == pytest.approx([model.error(best)] * 2, rel=1e-6)
    # Orthonormal factors of one and the same subspace reach the minimum even with the offset subtracted.
    u, _, vh = torch.linalg.svd(model.negative)
    b, a = u[:, :rank] / 2, vh[:rank] / 2
    same, _ = descend(model, b, a, lr=0.4, steps=2500, offset=b @ a, tolerance=1e-11, preconditioned=True)
    assert model.error(same) < 1e-10


def test_first_update_direction() -> None:
    """LoRA-One's factors weight the first update as ``2 U_r S_r^2 V_r^T / (gamma S1)``; orthonormal ones give ``2 N_r``."""
    model, rank = problem(30, FOUR, samples=300), 3
    n = model.negative
    u, s, vh = torch.linalg.svd(n)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    torch.testing.assert_close(u @ u.T @ n + n @ vh.T @ vh, 2 * (u * s) @ vh)
    b, a = spectral_start(model, rank, step=1.0)  # gamma S1 = 1
    torch.testing.assert_close(b @ b.T @ n + n @ a.T @ a, 2 * (u * s.square()) @ vh)
    b, a = lora_ga_start(model, rank)
    split = b @ b.T @ n + n @ a.T @ a
    full_u, full_s, full_vh = torch.linalg.svd(n)
    torch.testing.assert_close(
        split, (full_u[:, : 2 * rank] * full_s[: 2 * rank]) @ full_vh[: 2 * rank], rtol=1e-7, atol=1e-9
    )


def test_the_library_starts_where_the_theory_says() -> None:
    """On a real linear layer: ``s B0 A0 = alpha / (gamma sqrt(r) S1) N_r`` for ``N = Delta Sigma``."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=g, dtype=torch.float64)
    shift = torch.randn(9, 2, generator=g, dtype=torch.float64) @ torch.randn(2, 12, generator=g, dtype=torch.float64)
    layer = torch.nn.Sequential(torch.nn.Linear(12, 9, bias=False, dtype=torch.float64))
    y = x @ (layer[0].weight.detach() + shift).T
    recipe = Recipe(
        targets=Targets(("0",)), adapter=LoRA(rank=2, scaling="rslora"), init=OneStepGradient(gamma=50, method="exact")
    )
    data = Calibration([(x, y)], lambda m, b: (0.5 * (m(b[0]) - b[1]).square().sum(1).mean(), float(len(b[0]))))
    handle = adapt(layer, recipe, data)
    n = shift @ (x.T @ x / 200)
    u, s, vh = torch.linalg.svd(n)
    step = 16 / (50 * math.sqrt(2) * float(s[0]))
    torch.testing.assert_close(
        handle.bindings[0].adapter.delta(handle.bindings[0].layer).detach(),
        step * (u[:, :2] * s[:2]) @ vh[:2],
        rtol=1e-9,
        atol=1e-12,
    )
