"""SALT: the update against the block written out in the singular basis, for every clamp, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom.errors import RecipeError, TargetError
from tests import zoo

SHAPES = [(7, 9), (9, 7)]
CLAMPS = ["none", "diag", "official"]


def adapted(shape: tuple[int, int] = (7, 9), **changes: Any) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(shape[1], shape[0], dtype=torch.float64)})
    settings = {"targets.modules": ("layer",), "adapter.rank": 3, "adapter.lora_rank": 2, **changes}
    return rankloom.adapt(model, rankloom.methods.get("salt").with_(settings)).bindings[0]


def moved(*args: Any, size: float = 1.0, **changes: Any) -> Any:
    b = adapted(*args, **changes)
    for index, parameter in enumerate(b.adapter.parameters()):
        parameter.data.normal_(std=size, generator=torch.Generator().manual_seed(index))
    return b


def by_hand(b: Any, clamp: str) -> Tensor:
    """``U S' V^T - W`` with the whole (k, k) block ``S'``, differentiable in the adapter's parameters."""
    a, w = b.adapter, b.layer.weight()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    sign = torch.sign((a.U * u).sum(0))
    u, vh, r = u * sign, sign[:, None] * vh, a.rank
    leading = s[:r] * (1 + a.gain) + a.shift
    if clamp == "diag":
        leading = leading.relu()
    block = torch.block_diag(torch.diag(leading), torch.diag(s[r:]) + a.X @ a.Y)
    if clamp == "official":
        block = block.relu()
    return u @ block @ vh - w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clamp", CLAMPS)
def test_the_update_and_its_gradients_are_the_blocks(shape: tuple[int, int], clamp: str) -> None:
    b = moved(shape, **{"adapter.clamp": clamp})
    parameters = tuple(b.adapter.parameters())
    got, want = b.adapter.delta(b.layer), by_hand(b, clamp)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    pull = torch.randn_like(want)
    for g, w in zip(
        torch.autograd.grad(got, parameters, pull), torch.autograd.grad(want, parameters, pull), strict=True
    ):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-10)
    x = torch.randn(5, shape[1], dtype=torch.float64)
    out = b.adapter.forward(x, b.layer)
    torch.testing.assert_close(out, x @ (b.layer.weight() + want).T + b.layer.bias(), rtol=0, atol=1e-11)


def test_clamping_does_what_it_says() -> None:
    """``diag`` keeps leading values at zero or above, ``official`` cuts negative entries off the diagonal as well."""
    for clamp in CLAMPS:
        b = moved(size=3.0, **{"adapter.clamp": clamp})
        a = b.adapter
        block = a.U.T @ (b.layer.weight() + a.delta(b.layer).detach()) @ a.V.T
        leading, rest = block.diagonal()[:3], block[3:, 3:]
        assert bool((leading < -1e-9).any()) is (clamp == "none")
        assert bool((rest < -1e-9).any()) is (clamp != "official")


def test_the_blocks_are_not_coupled() -> None:
    b = moved()
    a, delta = b.adapter, b.adapter.delta(b.layer).detach()
    for left, right in ((a.U[:, :3], a.V[3:]), (a.U[:, 3:], a.V[:3])):
        torch.testing.assert_close(left.T @ delta @ right.T, torch.zeros(left.shape[1], len(right), dtype=delta.dtype))
    assert torch.linalg.matrix_rank(delta) == 5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_two_ends(shape: tuple[int, int]) -> None:
    """r = k scales and shifts every singular value; r = 0 is LoRA with ``B = U X``, ``A = Y V^T``."""
    b = moved(shape, **{"adapter.rank": 7})
    a, (u, s, vh) = b.adapter, torch.linalg.svd(b.layer.weight(), full_matrices=False)
    assert a.X.numel() == 0
    want = (u * (s * (1 + a.gain) + a.shift)) @ vh - b.layer.weight()
    torch.testing.assert_close(a.delta(b.layer), want, rtol=0, atol=1e-11)
    a = (b := moved(shape, **{"adapter.rank": 0})).adapter
    torch.testing.assert_close(a.delta(b.layer), (a.U @ a.X) @ (a.Y @ a.V), rtol=0, atol=1e-12)


def test_the_start_is_the_weight_and_the_count_the_papers() -> None:
    for clamp in CLAMPS:
        b = adapted(**{"adapter.clamp": clamp})
        assert not b.adapter.delta(b.layer).any() and b.adapter.X.any()
        assert sum(p.numel() for p in b.adapter.parameters()) == 2 * 3 + 2 * (7 - 3) * 2


def test_the_penalty_is_the_norms_and_has_a_gradient_at_the_start() -> None:
    b = moved()
    leading = b.adapter.gain * b.adapter.sigma[:3] + b.adapter.shift
    want = leading.norm() + torch.linalg.matrix_norm(b.adapter.X @ b.adapter.Y)
    torch.testing.assert_close(b.adapter.size(), want, rtol=1e-10, atol=0)
    start = adapted()
    start.adapter.size().backward()
    assert all(not p.grad.any() for p in start.adapter.parameters())  # zero, not NaN
    recipe = zoo.recipe_of("salt").with_({"adapter.penalty": 10.0})
    sizes = []
    for made in (recipe, zoo.recipe_of("salt")):
        handle = zoo.adapted(made, zoo.build("llama"), "llama")
        zoo.train(handle, handle.optimizer(1e-2), zoo.batches("llama", 1), 10)
        sizes.append(sum(float(b.adapter.size().detach()) for b in handle.bindings))
    assert sizes[0] < 0.7 * sizes[1]


def test_what_cannot_work_is_refused() -> None:
    for changes in ({"adapter.rank": -1}, {"adapter.lora_rank": 0}, {"adapter.penalty": -1.0}):
        with pytest.raises(RecipeError, match="adapter"):
            rankloom.methods.get("salt").with_(changes)
    with pytest.raises(TargetError, match=r"above the 7 singular values of layer.*at most 7"):
        adapted(**{"adapter.rank": 8})


@pytest.mark.parametrize("clamp", CLAMPS)
def test_the_published_start_moves_the_function_a_little(clamp: str) -> None:
    """``X, Y ~ N(0, 0.01^2)``: a relative change of a few ten-thousandths, which zero gains leave to ``X Y`` alone."""
    b = adapted(**{"adapter.start": "paper", "adapter.clamp": clamp})
    a = b.adapter
    assert torch.equal(a.X, adapted().adapter.X) and a.Y.any() and not a.gain.any() and not a.shift.any()
    assert 0.005 < float(torch.cat([a.X.flatten(), a.Y.flatten()]).detach().std()) < 0.02
    delta, norm = a.delta(b.layer).detach(), torch.linalg.matrix_norm(b.layer.weight())
    torch.testing.assert_close(delta, by_hand(b, clamp).detach(), rtol=0, atol=1e-12)
    assert 1e-6 < float(torch.linalg.matrix_norm(delta) / norm) < 2e-3
    with pytest.raises(RecipeError, match="start"):
        rankloom.methods.get("salt").with_({"adapter.start": "zero"})
