"""TLoRA: its start, its two ways to apply the transform, the symmetry of the published start, its penalties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe
from rankloom.adapters import TLoRA
from rankloom.errors import RecipeError
from rankloom.init import OwnStart


def adapted(layer: nn.Module, move: float = 0.0, **settings: Any) -> rankloom.Adaptation:
    recipe = Recipe(adapter=TLoRA(**settings), init=OwnStart()).with_(targets={"modules": ("0",)})
    handle = rankloom.adapt(nn.Sequential(layer), recipe)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in handle.parameters():
            p += move * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return handle


@pytest.mark.parametrize("bonds", ["random", "uniform"])
@pytest.mark.parametrize(("rank", "modes"), [(1, 2), (2, 3), (3, 3), (2, 1), (2, 5)])
def test_the_transform_starts_as_the_identity(bonds: Any, rank: int, modes: int) -> None:
    handle = adapted(nn.Linear(24, 12).double(), transform_rank=rank, modes=modes, bonds=bonds)
    binding = handle.bindings[0]
    closed = torch.linalg.multi_dot([torch.eye(rank, dtype=torch.float64), *binding.adapter.bonds]).trace()
    assert float(closed) == pytest.approx(1, abs=1e-13)
    x = torch.randn(3, 24, dtype=torch.float64)
    assert torch.equal(handle.model(x), binding.layer(x)) and not binding.adapter.delta(binding.layer).any()
    handle.model(x).square().sum().backward()
    moved = {name for name, p in binding.adapter.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"B0", *(f"T{d}" for d in range(modes))}


def test_half_precision_leaves_every_bit() -> None:
    layer = nn.Linear(24, 12, dtype=torch.bfloat16)
    handle = adapted(layer)
    x = torch.randn(5, 24).bfloat16()
    assert torch.equal(handle.model(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("into", [24, 23])  # 23 is padded to 24
@pytest.mark.parametrize("modes", [1, 2, 3])
def test_formed_and_by_tokens_are_the_dense_transform(into: int, modes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(into, 12).double()
    handle = adapted(layer, 0.3, modes=modes)
    adapter, base = handle.bindings[0].adapter, handle.bindings[0].layer
    x = torch.randn(4, into, dtype=torch.float64, requires_grad=True)
    change, (left, right) = adapter.change(), adapter.residual(base)
    assert change.shape == (into, into)
    want = nn.functional.linear(x, layer.weight @ (torch.eye(into) + change) + left @ right, layer.bias)
    pull, trained = torch.randn_like(want), list(adapter.parameters())
    true = torch.autograd.grad(want, [x, *trained], pull)
    for formed in (True, False):
        monkeypatch.setattr(adapter, "forms", lambda *_, formed=formed: formed)
        out = handle.model(x)
        torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
        for one, other in zip(torch.autograd.grad(out, [x, *trained], pull), true, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_narrow_outputs_are_formed_and_wide_ones_go_by_tokens() -> None:
    for out, formed in ((192, True), (576, True), (1536, False)):
        binding = adapted(nn.Linear(576, out)).bindings[0]
        assert binding.adapter.forms(binding.layer, 1024, torch.float32) is formed
        assert not binding.adapter.forms(binding.layer, 8, torch.float32)


def test_ranks_of_both_parts() -> None:
    handle = adapted(nn.Linear(64, 60).double(), 0.3, rank=3, transform_rank=2)
    adapter = handle.bindings[0].adapter
    left, right = adapter.residual(handle.bindings[0].layer)
    assert torch.linalg.matrix_rank(left @ right) == 9 and left.shape == (60, 9)
    assert torch.linalg.matrix_rank(torch.eye(64) + adapter.change()) == 64
    assert sum(p.numel() for p in adapter.parameters()) == 4 * (3 * 16) + 9 * (3 * 4 + (3 + 4 + 5))


def kronecker_rank(handle: rankloom.Adaptation) -> int:
    """Terms of ``T`` as a sum of Kronecker products over its first mode and the others."""
    adapter = handle.bindings[0].adapter
    t = torch.eye(16, dtype=torch.float64) + adapter.change().detach()
    first, rest = adapter.sizes[0], math.prod(adapter.sizes[1:])
    folded = t.view(first, rest, first, rest).transpose(1, 2).reshape(first**2, rest**2)
    values = torch.linalg.svdvals(folded)
    return int((values > 1e-9 * values[0]).sum())


@pytest.mark.parametrize(("bonds", "terms"), [("uniform", 1), ("random", 4)])
def test_uniform_bonds_never_leave_one_kronecker_product(bonds: Any, terms: int) -> None:
    """The published start: every slice of a core has the same gradient, so R^2 of them do the work of one."""
    torch.manual_seed(0)
    handle = adapted(nn.Linear(16, 12).double(), transform_rank=2, modes=2, bonds=bonds)
    optimizer = handle.optimizer(1e-2)
    x, want = torch.randn(40, 16, dtype=torch.float64), torch.randn(40, 12, dtype=torch.float64)
    for _ in range(12):
        (handle.model(x) - want).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert kronecker_rank(handle) == terms
    core = handle.bindings[0].adapter.T0.detach()
    assert torch.allclose(core, core[:, :, :1, :1].expand_as(core), rtol=1e-7, atol=0) is (bonds == "uniform")


@pytest.mark.parametrize("penalty", ["identity", "orthogonality"])
def test_penalties_draw_the_transform_back(penalty: Any) -> None:
    torch.manual_seed(0)
    handle = adapted(nn.Linear(16, 12).double(), 0.1, penalty=penalty, penalty_weight=3.0)
    adapter, identity = handle.bindings[0].adapter, torch.eye(16, dtype=torch.float64)

    def distance() -> Tensor:
        t = identity + adapter.change()
        return ((t if penalty == "identity" else t.mT @ t) - identity).square().sum()

    optimizer, start = handle.optimizer(1e-2), distance()
    schedule = handle.driver.schedules[0]
    torch.testing.assert_close(schedule.extra_loss(0), 3 * start)
    for _ in range(30):
        (0 * handle.model(torch.randn(2, 16, dtype=torch.float64)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance() < 0.2 * start


@pytest.mark.parametrize("settings", [{"rank": 0}, {"transform_rank": 0}, {"modes": 0}, {"modes": 9}])
def test_settings_that_cannot_be(settings: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=next(iter(settings))):
        Recipe(adapter=TLoRA(**settings), init=OwnStart()).check()
