"""Riemannian preconditioning (2402.02347): the card's invariants in float64, and convergence free of the condition number."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear_model import LinearModel, iterates, problem, spectral_start
from rankloom import Recipe, methods
from rankloom.adapters import Trainable
from rankloom.errors import RecipeError
from rankloom.optim import Riemannian
from tests.optim.toy import Toy, equivalent, moved, projector, rand, toy, turned


def scaled_gd(**settings: Any) -> Riemannian:
    return Riemannian(inner="sgd", **{"damping": 0.0, **settings})


def test_the_step_over_the_other_factors_gram() -> None:
    of = toy()
    step_a, step_b = moved(scaled_gd(damping=0.3), of)
    of.backward()
    eye = 0.3 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(step_a, torch.linalg.inv(of.b.mT @ of.b + eye) @ of.a.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step_b, of.b.grad @ torch.linalg.inv(of.a @ of.a.mT + eye), rtol=1e-12, atol=1e-12)


def test_the_weight_moves_along_both_projections() -> None:
    of = toy()
    want = of.scale**2 * (projector(of.b) @ of.g + of.g @ projector(of.a.mT))
    torch.testing.assert_close(equivalent(of, *moved(scaled_gd(), of)), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_factorisation_does_not_matter(seed: int) -> None:
    """``(B Q, Q^-1 A)``: several steps of the whole optimizer move the weight alike, to all orders; LoRA's own do not."""
    of = toy()
    other, weights = turned(of, rand(40 + seed, 3, 3)), []
    for each in (of, other):
        optimizer = scaled_gd().build(each.trainables, 0.05)
        for _ in range(3):
            each.backward()
            optimizer.step()
        weights.append(each.weight)
    assert (weights[0] - weights[1]).norm() < 1e-10 * weights[0].norm()
    plain = []
    for each in (toy(), turned(toy(), rand(40 + seed, 3, 3))):
        each.backward()
        plain.append(equivalent(each, each.a.grad, each.b.grad))
    assert (plain[0] - plain[1]).norm() > 0.1 * plain[0].norm()


def test_heavy_damping_is_plain_descent() -> None:
    of = toy()
    step_a, step_b = moved(scaled_gd(damping=1e9), of, lr=1.0)
    of.backward()
    torch.testing.assert_close(1e9 * step_a, of.a.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(1e9 * step_b, of.b.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("inner", ["sgd", "adamw"])
def test_loras_start(inner: str, relative: bool) -> None:
    of = toy()
    of.b.data.zero_()
    step_a, step_b = moved(Riemannian(inner=inner, relative=relative), of, 1e-2)  # type: ignore[arg-type]
    assert torch.count_nonzero(step_a) == 0
    assert torch.isfinite(step_b).all() and step_b.norm() > 0


def test_relative_damping_follows_the_size_of_the_factors() -> None:
    """Scaling the factors by c scales the steps by 1/c; with an absolute lambda it does not."""
    of = toy()
    small = Toy(nn.Parameter(of.a.data * 1e-3), nn.Parameter(of.b.data * 1e-3), of.g, of.scale)
    for relative, equal in ((True, True), (False, False)):
        one, other = (moved(scaled_gd(damping=0.1, relative=relative), each)[0] for each in (of, small))
        assert torch.allclose(1e-3 * other, one, rtol=1e-9) == equal


def test_registration_order_does_not_matter() -> None:
    toys = [toy(seed=10 * i, name=f"layer{i}", fan_in=5 + i % 2) for i in range(4)]
    trainables = [t for each in toys for t in each.trainables]
    results = []
    for order in (range(8), (7, 0, 3, 4, 1, 6, 2, 5)):
        fresh = [Trainable(t.name, nn.Parameter(t.parameter.detach().clone()), *t[2:]) for t in trainables]
        copies = {t.name: t.parameter for t in fresh}
        optimizer = Riemannian().build([fresh[i] for i in order], 0.1)
        for of in toys:
            of.backward()
        for t in trainables:
            copies[t.name].grad = t.parameter.grad.clone()
        optimizer.step()
        results.append(copies)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-12, atol=1e-13)


def adam(grads: list[Tensor], start: Tensor, *, lr: float, decay: float, eps: float, transform: Any = None) -> Tensor:
    """AdamW written out for one tensor whose gradients are known beforehand."""
    p, m, v = start.clone(), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = (1 - lr * decay) * p - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + eps)
    return p


@pytest.mark.parametrize("order", ["jacobi", "gauss-seidel"])
def test_scaled_adamw_written_out(order: str) -> None:
    """Both moments see the preconditioned gradient; gauss-seidel lets B see the A already moved."""
    of, lr, decay, eps, ridge = toy(), 0.02, 0.1, 1e-6, 1e-3
    a, b = of.a.detach().clone(), of.b.detach().clone()
    seen_a, seen_b = [], []
    eye = ridge * torch.eye(3, dtype=torch.float64)
    start = a, b
    for _ in range(5):
        grad_a, grad_b = of.scale * b.mT @ of.g, of.scale * of.g @ a.mT
        seen_a.append(torch.linalg.inv(b.mT @ b + eye) @ grad_a)
        new_a = adam(seen_a, start[0], lr=lr, decay=decay, eps=eps)
        used = new_a if order == "gauss-seidel" else a
        seen_b.append(grad_b @ torch.linalg.inv(used @ used.mT + eye))
        a, b = new_a, adam(seen_b, start[1], lr=lr, decay=decay, eps=eps)
    part = Riemannian(damping=ridge, order=order, eps=eps)  # type: ignore[arg-type]
    optimizer = part.build(of.trainables, lr, weight_decay=decay)
    for _ in range(5):
        of.backward()
        optimizer.step()
    torch.testing.assert_close((of.a.detach(), of.b.detach()), (a, b), rtol=1e-10, atol=1e-12)


def test_on_the_direction_adamws_step_is_preconditioned() -> None:
    of, lr, decay, ridge = toy(), 0.02, 0.1, 1e-1
    a, b, eye = of.a.detach().clone(), of.b.detach().clone(), ridge * torch.eye(3, dtype=torch.float64)
    seen_a, seen_b, zero_a, zero_b = [], [], torch.zeros_like(a), torch.zeros_like(b)
    last = zero_a, zero_b
    for _ in range(5):
        seen_a.append(of.scale * b.mT @ of.g)
        seen_b.append(of.scale * of.g @ a.mT)
        # Without decay AdamW's steps do not depend on where it is, so the sums of steps differ by the last step.
        sums = tuple(adam(s, z, lr=lr, decay=0, eps=1e-8) for s, z in ((seen_a, zero_a), (seen_b, zero_b)))
        move_a, move_b = sums[0] - last[0], sums[1] - last[1]
        last = sums
        a, b = (
            (1 - lr * decay) * a + torch.linalg.inv(b.mT @ b + eye) @ move_a,
            (1 - lr * decay) * b + move_b @ torch.linalg.inv(a @ a.mT + eye),
        )
    optimizer = Riemannian(damping=ridge, acts_on="direction").build(of.trainables, lr, weight_decay=decay)
    for _ in range(5):
        of.backward()
        optimizer.step()
    torch.testing.assert_close((of.a.detach(), of.b.detach()), (a, b), rtol=1e-9, atol=1e-11)


def iterations(model: LinearModel, optimizer: torch.optim.Optimizer, of: Toy, limit: int = 4000) -> int:
    """Steps of a library optimizer to a relative error of 1e-6 on the linear model."""
    for step in range(limit):
        if model.error(of.weight) <= 1e-6:
            return step
        of.g = model.gradient(of.weight)
        of.backward()
        optimizer.step()
    return limit


def linear(kappa: float) -> tuple[LinearModel, Toy]:
    model = problem(60, torch.logspace(0, -math.log10(kappa), 4, dtype=torch.float64), samples=6000)
    b, a = spectral_start(model, 4)
    return model, Toy(nn.Parameter(a), nn.Parameter(b), model.negative, 1.0)


def test_the_rate_is_free_of_the_condition_number() -> None:
    """Steps to 1e-6 over kappa 1, 3, 10, 30, 100: scaled descent stays within 10 %, plain descent grows about as kappa."""
    scaled, plain = [], []
    for kappa in (1, 3, 10, 30, 100):
        model, of = linear(kappa)
        scaled.append(iterations(model, scaled_gd(damping=1e-6).build(of.trainables, 0.4), of))
        model, of = linear(kappa)
        plain.append(iterations(model, torch.optim.SGD([of.a, of.b], lr=0.4), of))
    assert max(scaled) <= 1.1 * min(scaled) and max(scaled) < 40, scaled
    assert plain == sorted(plain) and plain[-1] > 20 * plain[0], plain


def test_lora_one_with_it_is_the_papers_preconditioned_descent() -> None:
    """2502.01235, eq. 9, from the spectral start: the table's recipe with its optimizer exchanged."""
    recipe = methods.get("lora-one").with_(optimizer={"kind": "riemannian", "inner": "sgd"})
    recipe.check()
    assert recipe.init == methods.get("lora-one").init and recipe.optimizer.damping == 1e-6  # type: ignore[attr-defined]
    model, of = linear(30)
    written_out = iterates(model, of.b.detach(), of.a.detach(), lr=0.4, preconditioned=True, ridge=1e-6)
    want_b, want_a = next(islice(written_out, 12, None))
    want = want_b @ want_a
    optimizer = recipe.optimizer.build(of.trainables, 0.4)
    for _ in range(12):
        of.g = model.gradient(of.weight)
        of.backward()
        optimizer.step()
    torch.testing.assert_close(of.weight, want, rtol=1e-9, atol=1e-11)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(RecipeError, match="damping must not be negative"):
        Recipe(optimizer=Riemannian(damping=-1e-3)).check()
    with pytest.raises(RecipeError, match=r"gauss-seidel.*use order='jacobi'"):
        Recipe(optimizer=Riemannian(order="gauss-seidel", acts_on="direction")).check()
    with pytest.raises(RecipeError, match=r"lr_ratio must be above 0"):
        Recipe(optimizer=Riemannian(lr_ratio=0)).check()
