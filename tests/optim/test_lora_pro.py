"""LoRA-Pro (2407.18242): the card's invariants in float64, the full-moment form against the paper's steps written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankloom import Recipe, adapt
from rankloom.adapters import LoRA, Trainable
from rankloom.errors import RecipeError
from rankloom.optim import LoRAPro
from tests import zoo
from tests.optim.toy import Toy, equivalent, moved, projector, rand, toy, turned

SPLITS = ("sylvester", "symmetric", "zero")


def plain(split: str = "sylvester", **settings: object) -> LoRAPro:
    """Fed to descent without damping, a step is the closed form itself."""
    return LoRAPro(inner="sgd", split=split, damping=0.0, **settings)


def least_squares(of: Toy) -> Tensor:
    """``argmin ||s (B gA + gB A) - G||`` by a dense solver over the entries of ``gA`` and ``gB``: the equivalent gradient."""
    a, b, g = of.a.detach().numpy(), of.b.detach().numpy(), of.g.numpy()
    design = of.scale * np.hstack([np.kron(b, np.eye(a.shape[1])), np.kron(np.eye(b.shape[0]), a.T)])
    solution = np.linalg.lstsq(design, g.reshape(-1), rcond=None)[0]
    return torch.from_numpy((design @ solution).reshape(g.shape))


@pytest.mark.parametrize("split", SPLITS)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.integers(4, 8), st.integers(4, 8), st.integers(1, 3), st.floats(0.1, 8))
def test_it_is_the_least_squares_optimum(split: str, seed: int, out: int, fan_in: int, rank: int, scale: float) -> None:
    of = toy(out, fan_in, rank, scale, seed)
    for factor in (
        of.a,
        of.b,
    ):  # random ones can be arbitrarily badly conditioned; the tolerance below is for good ones
        u, s, vh = torch.linalg.svd(factor.detach(), full_matrices=False)
        factor.data = (u * s.clamp(min=0.5)) @ vh
    got = equivalent(of, *moved(plain(split), of))
    assert (got - least_squares(of)).norm() <= 1e-12 * of.g.norm()
    off = (torch.eye(out) - projector(of.b)) @ of.g @ (torch.eye(fan_in) - projector(of.a.mT))
    assert (got - (of.g - off)).norm() <= 1e-12 * of.g.norm()


def test_the_equivalent_gradient_does_not_depend_on_the_split() -> None:
    of = toy()
    steps = {split: moved(plain(split), of) for split in SPLITS}
    for split in SPLITS:
        torch.testing.assert_close(
            equivalent(of, *steps[split]), equivalent(of, *steps["zero"]), rtol=1e-12, atol=1e-12
        )
    assert (steps["sylvester"][0] - steps["zero"][0]).norm() > 0.1  # the pair's own steps do


def test_x_solves_the_sylvester_equation_and_is_nearest() -> None:
    of = toy()
    with torch.no_grad():
        (step_a, step_b), (base_a, base_b) = moved(plain(), of), moved(plain("zero"), of)
        of.backward()
        x = (step_a - base_a) @ torch.linalg.pinv(of.a)  # gA = base + X A
        torch.testing.assert_close(base_b - of.b @ x, step_b, rtol=1e-11, atol=1e-12)
        inverse = torch.linalg.inv(of.b.mT @ of.b)
        residual = of.b.mT @ of.b @ x + x @ of.a @ of.a.mT + inverse @ of.a.grad @ of.a.mT / of.scale**2
        assert residual.norm() < 1e-12 * (1 + x.norm() * of.g.norm())

        def distance(x: Tensor) -> float:
            near = base_a + x @ of.a - of.a.grad, base_b - of.b @ x - of.b.grad
            return float(sum(n.square().sum() for n in near))

        best = distance(x)
        assert all(distance(x + size * rand(seed, 3, 3)) > best for seed in range(20) for size in (1e-3, 1e-1))
        half = (moved(plain("symmetric"), of)[0] - base_a) @ torch.linalg.pinv(of.a)
        assert min(distance(half), distance(torch.zeros_like(x))) > best
        # Half of what either factor could take for each: both then add the same to the weight along P_B G P_A.
        shared = projector(of.b) @ of.g @ projector(of.a.mT) / 2
        symmetric = moved(plain("symmetric"), of)
        torch.testing.assert_close(of.scale * of.b @ symmetric[0] @ projector(of.a.mT), shared, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(projector(of.b) @ symmetric[1] @ of.a * of.scale, shared, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("split", SPLITS)
def test_a_step_descends_by_the_norm_of_the_equivalent_gradient(split: str) -> None:
    of = toy()
    step_a, step_b = moved(plain(split), of)
    of.backward()
    descent = (of.a.grad * step_a).sum() + (of.b.grad * step_b).sum()
    torch.testing.assert_close(descent, equivalent(of, step_a, step_b).square().sum(), rtol=1e-12, atol=0)


def test_neither_the_factorisation_nor_alpha_matters() -> None:
    of = toy()
    want = equivalent(of, *moved(plain(), of))
    other = turned(of, rand(9, 3, 3))
    torch.testing.assert_close(equivalent(other, *moved(plain(), other)), want, rtol=1e-10, atol=1e-10)
    doubled = Toy(of.a, of.b, of.g, 2 * of.scale)
    torch.testing.assert_close(equivalent(doubled, *moved(plain(), doubled)), want, rtol=1e-12, atol=1e-12)
    # LoRA's own step depends on both.
    of.backward(), other.backward()
    lora, turned_lora = equivalent(of, of.a.grad, of.b.grad), equivalent(other, other.a.grad, other.b.grad)
    assert (lora - turned_lora).norm() > 0.1 * lora.norm()


@pytest.mark.parametrize(("out", "fan_in"), [(4, 9), (9, 4), (5, 5)])
def test_at_full_rank_it_is_full_fine_tuning(out: int, fan_in: int) -> None:
    of = toy(out, fan_in, min(out, fan_in))
    torch.testing.assert_close(equivalent(of, *moved(plain(), of)), of.g, rtol=1e-9, atol=1e-9)
    gaps = []
    for lr in (1e-3, 1e-4):
        start = of.weight
        step_a, step_b = moved(plain(), of, lr)
        after = of.scale * (of.b - lr * step_b) @ (of.a - lr * step_a)
        gaps.append(float((after - (start - lr * of.g)).detach().norm()))
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=1e-3)  # O(lr^2)


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_step_from_loras_start(split: str) -> None:
    of = toy()
    of.b.data.zero_()
    step_a, step_b = moved(plain(split), of)
    assert torch.count_nonzero(step_a) == 0
    torch.testing.assert_close(equivalent(of, step_a, step_b), of.g @ projector(of.a.mT), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dead_directions_and_low_precision_stay_finite(split: str, dtype: torch.dtype) -> None:
    of = toy(40, 30, 8)
    of.b.data[:, 3:] = 0
    of.a.data[5:] = of.a.data[:1]
    narrow = Toy(nn.Parameter(of.a.data.to(dtype)), nn.Parameter(of.b.data.to(dtype)), of.g.to(dtype), of.scale)
    for part in (LoRAPro(split=split), LoRAPro(split=split, damping=0.0, inner="sgd")):
        step_a, step_b = moved(part, narrow)
        assert step_a.dtype == dtype and torch.isfinite(step_a).all() and torch.isfinite(step_b).all()


def reference_adam(
    of: Toy, steps: int, *, lr: float, decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """The paper's Adam over the full weight, step by step, with pseudo-inverses and a dense Sylvester solve."""
    a, b, s, m, v = of.a.detach().clone(), of.b.detach().clone(), of.scale, 0.0, 0.0
    eye = torch.eye(len(a), dtype=torch.float64)

    def closed_form(grad_a: Tensor, grad_b: Tensor, nearest: bool) -> tuple[Tensor, Tensor]:
        inv_b, inv_a = torch.linalg.pinv(b.mT @ b), torch.linalg.pinv(a @ a.mT)
        x = torch.zeros_like(eye)
        if nearest:
            system = torch.kron(b.mT @ b, eye) + torch.kron(eye, (a @ a.mT).mT.contiguous())
            x = torch.linalg.lstsq(
                system, -(inv_b @ grad_a @ a.mT / s**2).reshape(-1, 1), driver="gelsd"
            ).solution.view_as(x)
        off_b = torch.eye(len(b), dtype=torch.float64) - b @ inv_b @ b.mT
        return inv_b @ grad_a / s**2 + x @ a, off_b @ grad_b @ inv_a / s**2 - b @ x

    for t in range(1, steps + 1):
        adjusted_a, adjusted_b = closed_form(s * b.mT @ of.g, s * of.g @ a.mT, False)
        full = s * (b @ adjusted_a + adjusted_b @ a)
        m = betas[0] * m + (1 - betas[0]) * full
        v = betas[1] * v + (1 - betas[1]) * full * full
        n = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        step_a, step_b = closed_form(s * b.mT @ n, s * n @ a.mT, True)
        a, b = (1 - lr * decay) * a - lr * step_a, (1 - lr * decay) * b - lr * step_b
    return a, b


@pytest.mark.parametrize("start", ["random", "zero"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_full_moments_are_the_papers_adam(start: str, decay: float) -> None:
    of = toy()
    if start == "zero":
        of.b.data.zero_()
    want = reference_adam(of, 6, lr=0.02, decay=decay)
    optimizer = LoRAPro(moments="full", damping=0.0).build(of.trainables, 0.02, weight_decay=decay)
    for _ in range(6):
        of.backward()
        optimizer.step()
    torch.testing.assert_close((of.a.detach(), of.b.detach()), want, rtol=1e-8, atol=1e-9)


def test_full_moments_have_full_size_and_leave_the_rest_to_adamw() -> None:
    of, bias, twin = toy(), nn.Parameter(rand(5, 4)), nn.Parameter(rand(5, 4))
    optimizer = LoRAPro(moments="full").build([*of.trainables, Trainable("whole.bias", bias, "whole", None)], 0.1)
    plain_adamw = torch.optim.AdamW([twin], lr=0.1, fused=True, weight_decay=0.0)
    for step in range(4):
        of.backward()
        bias.grad, twin.grad = rand(step, 4), rand(step, 4)
        optimizer.step()
        plain_adamw.step()
    assert torch.equal(bias, twin)
    assert optimizer.state[of.b]["exp_avg"].shape == of.g.shape and not optimizer.state.get(of.a)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"moments='full' are Adam's: use optimizer.inner='adamw'"):
        Recipe(optimizer=LoRAPro(moments="full", inner="sgd")).check()
    with pytest.raises(RecipeError, match="damping must not be negative"):
        Recipe(optimizer=LoRAPro(damping=-1)).check()


def test_on_a_model_a_small_step_is_the_projected_full_gradient() -> None:
    """Through a real adapter: one step of SGD moves every weight along ``G - (I - P_B) G (I - P_A)``."""
    model = zoo.build("llama")
    handle = adapt(model, Recipe(adapter=LoRA(rank=3, scaling="rslora"), optimizer=plain()))
    zoo.perturb(handle, 0.3)
    merged = zoo.merged_copy(handle, zoo.build("llama"))
    merged(**zoo.batch("llama")).loss.backward()
    lr = 1e-6
    before = {b.name: b.adapter.delta(b.layer).detach() for b in handle.bindings}
    factors = {b.name: (b.adapter.A.detach().clone(), b.adapter.B.detach().clone()) for b in handle.bindings}
    handle.optimizer(lr)
    zoo.train(handle, handle._optimizer, [zoo.batch("llama")], 1)
    for b in handle.bindings:
        full = merged.get_submodule(b.name).weight.grad
        off_a, off_b = (
            torch.eye(n) - projector(f)
            for n, f in zip(full.shape[::-1], (factors[b.name][0].mT, factors[b.name][1]), strict=True)
        )
        want = full - off_b @ full @ off_a
        got = (before[b.name] - b.adapter.delta(b.layer).detach()) / lr
        assert (got - want).norm() < 1e-4 * want.norm(), b.name
