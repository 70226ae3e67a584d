"""LoLDU's start: the leading steps of pivoted LU against scipy's whole decomposition, in float64."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

import rankloom
from rankloom.errors import RecipeError
from rankloom.init.weight_lu import leading_ldu

SHAPES = [(8, 8), (10, 6), (6, 10)]


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_the_first_steps_are_those_of_the_whole_decomposition(shape: tuple[int, int], rank: int) -> None:
    w = matrix(shape)
    lower, pivots, upper = leading_ldu(w, rank)
    permuted, u = (torch.from_numpy(t) for t in scipy.linalg.lu(w.numpy(), permute_l=True))
    torch.testing.assert_close(lower, permuted[:, :rank], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pivots, u.diagonal()[:rank], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pivots[:, None] * upper, u[:rank], rtol=1e-10, atol=1e-12)
    assert torch.equal(upper.tril(), torch.eye(*upper.shape, dtype=w.dtype))
    if rank == min(shape):
        torch.testing.assert_close((lower * pivots) @ upper, w, rtol=0, atol=1e-13)


def test_tiny_and_zero_pivots_are_not_divided_by() -> None:
    w = matrix((6, 2)) @ matrix((2, 7), 1)  # the third pivot is rounding noise
    w[:, 0] = 0  # and the first one is zero
    lower, pivots, upper = leading_ldu(w, 5)
    assert all(torch.isfinite(t).all() for t in (lower, pivots, upper))
    assert upper.abs().max() < 1e3 and (pivots == 1).sum() >= 3
    torch.testing.assert_close((lower * pivots) @ upper, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_core_moves_pivots_and_its_gradient_is_the_full_one_between_the_factors(shape: tuple[int, int]) -> None:
    """With all pivots, ``z = d (1 + e)`` gives ``P L diag(d (1 + e)) U``; ``dL/dz_i = s (P L)_i^T G U_i``."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(shape[1], shape[0], dtype=torch.float64)})
    changes = {"targets.modules": ("layer",), "adapter.rank": "full", "adapter.alpha": 3.0}
    binding = rankloom.adapt(model, rankloom.methods.get("loldu").with_(changes)).bindings[0]
    w, adapter = binding.layer.weight(), binding.adapter
    lower, pivots, upper = leading_ldu(w, min(shape))
    assert not adapter.delta(binding.layer).any() and [p.numel() for p in adapter.parameters()] == [min(shape)]
    e = 0.3 * matrix((min(shape), 1))[:, 0]
    adapter.E.data.copy_(pivots * e / adapter.scale)
    want = (lower * (pivots * (1 + e))) @ upper
    torch.testing.assert_close(w + adapter.delta(binding.layer).detach(), want, rtol=0, atol=1e-12)
    x = matrix((9, shape[1]), 3)
    dense = (w + adapter.delta(binding.layer).detach()).requires_grad_()
    (x @ dense.T).pow(3).sum().backward()
    (adapter.forward(x, binding.layer) - binding.layer.bias()).pow(3).sum().backward()
    gradient = adapter.scale * torch.einsum("ok,on,kn->k", lower, dense.grad, upper)
    torch.testing.assert_close(adapter.E.grad, gradient, rtol=1e-9, atol=1e-9)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match="tiny"):
        rankloom.methods.get("loldu").with_({"init.tiny": 1.0})
