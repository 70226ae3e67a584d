"""BAT against its definition, block by block in loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom import Recipe, Targets
from rankloom.adapters import BAT, BATAdapter
from rankloom.errors import RecipeError, TargetError
from rankloom.init import OwnStart
from rankloom.kernels import materialized
from rankloom.layers import LinearLayer

SHAPES = [(8, 12, 4), (7, 12, 4), (8, 10, 3), (5, 4, 3), (6, 6, 6), (3, 5, 1)]
every_shape = pytest.mark.parametrize(("out", "width", "rank"), SHAPES)


def made(out: int, width: int, rank: int) -> tuple[BATAdapter, LinearLayer]:
    layer = LinearLayer(nn.Linear(width, out, dtype=torch.float64).requires_grad_(False))
    adapter = BATAdapter(layer, rank, torch.float64)
    nn.init.normal_(adapter.b, std=0.3)
    return adapter, layer


def by_blocks(weight: Tensor, b: Tensor) -> Tensor:
    """``W[i, c] b_i + b_i`` for every block, on ``W`` padded with zeros."""
    (out, width), r = weight.shape, b.shape[-1]
    padded = torch.zeros(-(-out // r) * r, -(-width // r) * r, dtype=weight.dtype)
    padded[:out, :width] = weight
    delta = torch.zeros_like(padded)
    for i in range(0, len(padded), r):
        for c in range(0, padded.shape[1], r):
            own = b[i // r]
            delta[i : i + r, c : c + r] = padded[i : i + r, c : c + r] @ own + own
    return delta[:out, :width]


@every_shape
@pytest.mark.parametrize("block", [1, 1 << 21])
def test_update_forward_and_gradients(
    out: int, width: int, rank: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(materialized, "BLOCK", block)
    adapter, layer = made(out, width, rank)
    torch.testing.assert_close(adapter.delta(layer), by_blocks(layer.weight(), adapter.b), rtol=1e-13, atol=1e-13)
    x = torch.randn(2, 3, width, dtype=torch.float64, requires_grad=True)
    got, want = adapter(x, layer), F.linear(x, layer.weight() + by_blocks(layer.weight(), adapter.b), layer.bias())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(y, (x, adapter.b), pull) for y in (got, want))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_the_gradient_in_closed_form() -> None:
    """``db_i = sum_c W[i, c]^T G[i, c] + G[i, c]``."""
    adapter, layer = made(8, 12, 4)
    x = torch.randn(5, 12, dtype=torch.float64)
    pull = torch.randn(5, 8, dtype=torch.float64)
    adapter(x, layer).backward(pull)
    weight, full = layer.weight(), pull.mT @ x
    for i in range(2):
        rows = slice(4 * i, 4 * i + 4)
        cuts = [slice(4 * c, 4 * c + 4) for c in range(3)]
        want = sum(weight[rows, c].mT @ full[rows, c] + full[rows, c] for c in cuts)
        torch.testing.assert_close(adapter.b.grad[i], want, rtol=1e-12, atol=1e-12)


def test_the_merged_weight_gives_the_base_back() -> None:
    """``W = (W' - b) (I + b)^-1`` by blocks, as long as ``I + b`` is far from singular; and the update has full rank."""
    adapter, layer = made(8, 12, 4)
    merged = (layer.weight() + adapter.delta(layer)).detach()
    for i in range(2):
        back = torch.linalg.inv(torch.eye(4, dtype=torch.float64) + adapter.b[i].detach())
        for c in range(3):
            block = merged[4 * i : 4 * i + 4, 4 * c : 4 * c + 4]
            want = layer.weight()[4 * i : 4 * i + 4, 4 * c : 4 * c + 4]
            torch.testing.assert_close((block - adapter.b[i].detach()) @ back, want, rtol=1e-10, atol=1e-10)
    assert torch.linalg.matrix_rank(adapter.delta(layer)) == 8


def test_parameters_and_start() -> None:
    layer = LinearLayer(nn.Linear(12, 8, dtype=torch.float64).requires_grad_(False))
    adapter = BATAdapter(layer, 4, torch.float64)
    assert adapter.b.numel() == 4 * 8  # r out where r divides out
    x = torch.randn(3, 12, dtype=torch.float64)
    y = adapter(x, layer)
    assert torch.equal(y, layer(x))
    y.square().sum().backward()
    assert adapter.b.grad.abs().min() > 0


def test_impossible_settings_are_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 6))
    for rank, error, text in (
        (0, RecipeError, "at least 1"),
        (7, TargetError, r"rank 7 is above min\(out, in\) = 6 of 0"),
    ):
        with pytest.raises(error, match=text):
            Recipe(Targets(("0",)), BAT(rank=rank), OwnStart()).check(model)
