"""LoRA-One's algebra (2502.01235) on the linear model; its theorems are the programs', tested beside this file."""

from __future__ import annotations

import math

import torch

from linear_model import SINGULAR, lora_ga_start, problem, spectral_start
from rankloom import Calibration, Targets, adapt
from rankloom.adapters import LoRA
from rankloom.init import OneStepGradient
from rankloom.recipe import Recipe


def test_the_negative_gradient_is_delta_sigma_and_has_its_rank() -> None:
    model = problem(40, SINGULAR, samples=400)
    torch.testing.assert_close(model.negative, model.delta @ model.sigma)
    s = torch.linalg.svdvals(model.negative)
    assert s[3] > 0.05 and s[4] < 1e-12


def test_first_update_direction() -> None:
    """LoRA-One's factors weight the first update as ``2 U_r S_r^2 V_r^T / (gamma S1)``; orthonormal ones give ``2 N_r``."""
    model, rank = problem(30, SINGULAR, samples=300), 3
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
