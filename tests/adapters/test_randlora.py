"""RandLoRA against the sum written out: both orientations, both ways of applying it, full rank, shared banks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import RandLoRA, RandLoRAAdapter
from rankloom.errors import RecipeError, TargetError
from rankloom.init import OwnStart
from rankloom.kernels.generated import signs, uniform
from rankloom.kernels.scaled import scaled_bases
from rankloom.layers import LinearLayer
from rankloom.targets import Target
from tests import zoo

SHAPES = [(5, 8), (8, 5), (6, 6), (7, 9)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def made(shape: tuple[int, int], moved: bool = True, **settings: Any) -> tuple[RandLoRAAdapter, LinearLayer]:
    layer = LinearLayer(nn.Linear(shape[1], shape[0], dtype=torch.float64).requires_grad_(False))
    adapter = RandLoRA(**{"rank": 3, "scale": 2.0, "seed": 1, **settings}).build(Target("x", layer, "x"))
    adapter.reset(layer, torch.Generator())
    if moved:
        with torch.no_grad():
            adapter.lam.normal_()
            adapter.gam.normal_()
    return adapter, layer


def row(stream: str, i: int, count: int, density: float) -> Tensor:
    if density < 1:
        return signs(1, stream, i * 2**40, count, density).double() / density**0.5
    return 3**0.5 * (2 * uniform(1, stream, i * 2**40, count).double() - 1)


def written_out(adapter: RandLoRAAdapter, shape: tuple[int, int], density: float = 1.0) -> Tensor:
    """``2 sum_j B_j diag(lam_j) A diag(gam_j)`` by a double loop over terms and components, transposed where out < in."""
    d, width = sorted(shape)
    n = math.ceil(d / 3)
    total = torch.zeros(width, d, dtype=torch.float64)
    for j in range(n):
        for k in range(3):
            column, line = row("randlora.B", 3 * j + k, width, density), row("randlora.A", k, d, density)
            total += 2.0 * adapter.lam[k, j].detach() * torch.outer(column, line * adapter.gam[j].detach())
    return total if shape[0] >= shape[1] else total.mT


@pytest.mark.parametrize("density", [1.0, 1 / 3, 0.2])
@every_shape
def test_the_update_is_the_double_sum(shape: tuple[int, int], density: float) -> None:
    adapter, layer = made(shape, density=density)
    want = written_out(adapter, shape, density)
    torch.testing.assert_close(adapter.delta(layer).detach(), want, rtol=1e-6, atol=1e-6)
    b, a = adapter.factors()
    torch.testing.assert_close(b @ a, adapter.delta(layer), rtol=1e-12, atol=1e-13)
    if density == 1:
        assert torch.linalg.matrix_rank(adapter.delta(layer)) == min(shape)


@every_shape
def test_both_ways_of_applying_it_are_the_dense_product(shape: tuple[int, int]) -> None:
    adapter, layer = made(shape)
    for tokens in (1, 40):  # below and above half the smaller width
        x = torch.randn(tokens, shape[1], dtype=torch.float64, requires_grad=True)
        dense = layer.apply(x, layer.weight() + adapter.delta(layer))
        out = adapter.forward(x, layer)
        torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-12)
        pull = torch.randn_like(out)
        leaves = [x, adapter.lam, adapter.gam]
        for got, want in zip(
            torch.autograd.grad(out, leaves, pull), torch.autograd.grad(dense, leaves, pull), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@every_shape
def test_only_the_parameters_and_the_input_are_kept_for_backward(shape: tuple[int, int]) -> None:
    adapter, layer = made(shape)
    weight = layer.weight().untyped_storage().data_ptr()
    for tokens in (1, 40):
        saved: list[Tensor] = []
        x = torch.randn(tokens, shape[1], dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            adapter.forward(x, layer)
        own = {tuple(t.shape) for t in saved if t.untyped_storage().data_ptr() != weight}
        assert own <= {tuple(adapter.lam.shape), tuple(adapter.gam.shape), (tokens, shape[1])}


def test_scaled_bases_and_their_gradients() -> None:
    a, rows, columns = torch.randn(3, 5).double(), torch.randn(3, 4).double(), torch.randn(4, 5).double()
    out = scaled_bases(a, rows, columns)
    for j in range(4):
        torch.testing.assert_close(out[j], torch.diag(rows[:, j]) @ a @ torch.diag(columns[j]), rtol=1e-14, atol=1e-15)
    leaves = rows.requires_grad_(), columns.requires_grad_()
    assert torch.autograd.gradcheck(lambda r, c: scaled_bases(a, r, c), leaves)
    assert [tuple(t.shape) for t in scaled_bases(a, *leaves).grad_fn.saved_tensors] == [(3, 5), (3, 4), (4, 5)]


@every_shape
def test_the_start_the_first_gradients_and_the_count(shape: tuple[int, int]) -> None:
    adapter, layer = made(shape, moved=False)
    d, n = min(shape), math.ceil(min(shape) / 3)
    assert not adapter.lam.any() and bool((adapter.gam == 1 / max(n, d)).all())
    x = torch.randn(9, shape[1], dtype=torch.float64)
    out = adapter.forward(x, layer)
    assert torch.equal(out, layer(x))
    out.square().sum().backward()
    assert adapter.lam.grad.any() and not adapter.gam.grad.any()
    assert sum(p.numel() for p in adapter.parameters()) == n * (3 + d)


def test_smaller_ranks_have_more_parameters() -> None:
    counts = [sum(p.numel() for p in made((12, 12), rank=rank)[0].parameters()) for rank in (1, 2, 3, 6, 12)]
    assert counts == sorted(counts, reverse=True) == [12 * 13, 6 * 14, 4 * 15, 2 * 18, 24]


def test_all_layers_share_the_banks_and_none_depends_on_the_others() -> None:
    def adapted(*modules: str) -> dict[str, Any]:
        recipe = Recipe(targets=Targets(modules), adapter=RandLoRA(rank=3), init=OwnStart())
        handle = rankloom.adapt(zoo.build("llama"), recipe)
        zoo.perturb(handle)
        return {b.name: b.adapter for b in handle.bindings}

    few, more = adapted("k_proj"), adapted("k_proj", "up_proj", "down_proj", "lm_head")
    assert len({id(a.small) for a in more.values()}) == len({id(a.large) for a in more.values()}) == 1
    assert all(key in ("lam", "gam", "digest") for a in more.values() for key in a.state_dict())
    for name, adapter in few.items():
        assert torch.equal(adapter.digest, more[name].digest)
        frozen = [a.large.corner(3, 8, a.lam) for a in (adapter, more[name])]
        assert torch.equal(*frozen)


def test_dropout_takes_the_path_through_the_factors() -> None:
    adapter, layer = made((6, 6), dropout=0.5)
    x = torch.randn(40, 6, dtype=torch.float64)
    torch.manual_seed(1)
    out = adapter.train().forward(x, layer)
    torch.manual_seed(1)
    want = layer(x) + nn.functional.dropout(x, 0.5) @ adapter.delta(layer).mT
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.eval().forward(x, layer), layer(x) + x @ adapter.delta(layer).mT)


def test_impossible_settings_are_refused() -> None:
    for broken in ({"rank": 0}, {"density": 0.0}, {"density": 1.5}):
        with pytest.raises(RecipeError, match=r"adapter.density in \(0, 1\]"):
            RandLoRA(**broken).check()
    with pytest.raises(TargetError, match=r"rank 9 is above min\(out, in\) = 8 of .*k_proj"):
        Recipe(adapter=RandLoRA(rank=9), init=OwnStart()).check(zoo.build("llama"))
