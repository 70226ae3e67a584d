"""MiSS: one matrix shared by all slices of the input, against the tiled dense update written out here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import MiSS, MiSSAdapter
from rankloom.errors import RecipeError, TargetError
from rankloom.init import OwnStart
from rankloom.kernels import shard_linear, shard_sum
from rankloom.layers import LinearLayer

CASES = [(6, 12, 4, None), (6, 13, 4, None), (6, 3, 3, None), (6, 12, 4, 3), (6, 13, 5, 2), (6, 12, 4, 6), (6, 7, 1, 1)]
every_case = pytest.mark.parametrize(("out", "width", "rank", "mini"), CASES)


def made(out: int, width: int, rank: int, mini: int | None) -> tuple[MiSSAdapter, LinearLayer]:
    layer = LinearLayer(nn.Linear(width, out, dtype=torch.float64).requires_grad_(False))
    adapter = MiSSAdapter(layer, rank, mini, torch.float64)
    nn.init.normal_(adapter.D)
    return adapter, layer


def tiled(shard: Tensor, out: int, width: int) -> Tensor:
    """Entry by entry."""
    delta = torch.empty(out, width, dtype=shard.dtype)
    for j in range(out):
        for i in range(width):
            delta[j, i] = shard[i % shard.shape[0], j % shard.shape[1]]
    return delta


@every_case
def test_the_update_is_the_tiled_matrix(out: int, width: int, rank: int, mini: int | None) -> None:
    adapter, layer = made(out, width, rank, mini)
    want = tiled(adapter.D.detach(), out, width)
    assert torch.equal(adapter.delta(layer).detach(), want)
    assert torch.linalg.matrix_rank(want) == min(rank, mini or out)
    assert sum(p.numel() for p in adapter.parameters()) == rank * (mini or out)
    b, a = adapter.factors()
    assert a.shape == (rank, width) and torch.equal((b @ a).detach(), want)


@every_case
def test_forward_and_gradients(out: int, width: int, rank: int, mini: int | None) -> None:
    adapter, layer = made(out, width, rank, mini)
    x = torch.randn(2, 5, width, dtype=torch.float64, requires_grad=True)
    got = adapter(x, layer)
    want = F.linear(x, layer.weight() + adapter.delta(layer), layer.bias())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    pull = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(y, (x, adapter.D), pull) for y in (got, want))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    fixed = (layer.weight(), layer.bias())
    assert torch.autograd.gradcheck(lambda x, d: shard_linear(x, *fixed, d), (x, adapter.D))


def test_a_full_width_mini_is_miss() -> None:
    (one, layer), (other, _) = made(6, 12, 4, None), made(6, 12, 4, 6)
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 12, dtype=torch.float64)
    assert torch.equal(one(x, layer), other(x, layer))


@pytest.mark.parametrize("mini", [None, 3])
def test_only_the_slices_sum_is_kept(mini: int | None) -> None:
    adapter, layer = made(6, 40, 4, mini)
    x = torch.randn(2, 5, 40, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter(x, layer)
    own = {layer.weight().data_ptr(), adapter.D.data_ptr()}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in own] == [(10, 4)]


def test_the_sum_of_many_half_precision_slices_is_accumulated_wider() -> None:
    x = torch.randn(4, 448 * 8).bfloat16()
    want = x.double().view(4, 448, 8).sum(1)
    got = shard_sum(x, 8).double()
    assert float(((got - want).abs() / want.abs().clamp(min=1)).max()) < 2**-7  # one rounding, not 448


def test_step_zero_moves_no_bit_and_has_a_gradient() -> None:
    layer = LinearLayer(nn.Linear(12, 6, dtype=torch.float64).requires_grad_(False))
    adapter = MiSSAdapter(layer, 4, None, torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64)
    y = adapter(x, layer)
    assert torch.equal(y, layer(x))
    y.square().sum().backward()
    assert adapter.D.grad.abs().min() > 0


def test_converts_to_lora_exactly(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Linear(13, 6)).double()
    handle = rankloom.adapt(model, Recipe(Targets(("0",)), MiSS(rank=4), OwnStart()))
    nn.init.normal_(handle.parameters()[0])
    report = handle.export(tmp_path / "peft")
    assert report["exact"] and handle.bindings[0].adapter.factors()[1].shape == (4, 13)


def test_impossible_settings_are_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 6))
    for settings, error, text in (
        ({"rank": 0}, RecipeError, "at least 1"),
        ({"rank": 13}, TargetError, r"rank 13 is above the 12 inputs of 0: lower it to at most 12"),
        ({"rank": 2, "mini": 4}, TargetError, r"mini 4 does not divide the 6 outputs of 0"),
    ):
        with pytest.raises(error, match=text):
            Recipe(Targets(("0",)), MiSS(**settings), OwnStart()).check(model)
