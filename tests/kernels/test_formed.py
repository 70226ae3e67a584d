"""Updates applied by factors and updates formed: either way is plain autograd through the dense sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import SoKA, TLoRA
from rankloom.adapters import kronecker as kronecker_adapters
from rankloom.init import OwnStart
from rankloom.kernels import (
    Terms,
    contraction,
    digits_worth,
    formed_linear,
    forming_pays,
    lowrank,
    lowrank_linear,
    materialized,
)
from rankloom.kernels.distances import distance_difference
from rankloom.kernels.separable import separable_sum
from rankloom.linalg import kth_smallest


def gradients_agree(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    pull = torch.randn_like(want)
    pairs = zip(torch.autograd.grad(got, leaves, pull), torch.autograd.grad(want, leaves, pull), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wanted", ["xab", "xa", "xb", "x", "ab", "b"])
@pytest.mark.parametrize("forms", [True, False])
@pytest.mark.parametrize("block", [5, 15, 1 << 21])
def test_both_ways_are_the_dense_sum(wanted: str, forms: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materialized, "BLOCK", block)
    monkeypatch.setattr(lowrank, "forming_pays", lambda *_: forms)
    sizes = {"x": (2, 3, 5), "a": (4, 5), "b": (7, 4)}
    given = {n: torch.randn(size, dtype=torch.float64, requires_grad=n in wanted) for n, size in sizes.items()}
    weight, bias = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    got = lowrank_linear(given["x"], weight, bias, given["a"], given["b"], 1.7)
    want = given["x"] @ (weight + 1.7 * given["b"] @ given["a"]).mT + bias
    gradients_agree(got, want, [given[n] for n in wanted])


def test_a_zero_factor_leaves_every_bit_alone_and_factors_may_be_wider() -> None:
    x, weight = torch.randn(6, 5).bfloat16(), torch.randn(7, 5).bfloat16()
    a, b = torch.randn(4, 5, requires_grad=True), torch.zeros(7, 4, requires_grad=True)
    out = formed_linear(x, weight, None, a, b, 2.0)
    assert torch.equal(out, nn.functional.linear(x, weight))
    out.sum().backward()
    assert a.grad is not None and b.grad is not None and a.grad.dtype == b.grad.dtype == torch.float32
    torch.testing.assert_close(b.grad, 2.0 * torch.ones(7, 6) @ x.float() @ a.detach().mT, rtol=0.05, atol=0.1)


def test_half_precision_forms_only_what_saves_much() -> None:
    shape, rank, tokens = (576, 576), 128, 4096
    assert forming_pays(shape, rank, tokens, 2) and not forming_pays(
        shape, rank, tokens, 2, digits_worth(torch.bfloat16)
    )
    assert forming_pays(shape, 576, tokens, 1, digits_worth(torch.float16)) and digits_worth(torch.float32) == 1


def test_thin_factors_are_applied_and_wide_ones_formed() -> None:
    assert not forming_pays((4096, 4096), 64, 1 << 20, 2)
    assert forming_pays((576, 576), 576, 1024, 1) and not forming_pays((576, 576), 576, 64, 1)
    for trained in (1, 2):  # the rank at which one overtakes the other, by the sums written out
        rank = next(r for r in range(1, 100) if forming_pays((30, 20), r, 200, trained))
        for k, forms in ((rank - 1, False), (rank, True)):
            applied = 200 * k * 50 * 2 + trained * 200 * k * 25
            formed = 2 * k * 600 + 200 * 600 + trained * k * 600
            assert (formed < applied) is forms


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_sums_of_waves(shape: tuple[int, int]) -> None:
    left, right = (torch.randn(size + 1, size, dtype=torch.float64) for size in shape)
    values = torch.randn(14, dtype=torch.float64, requires_grad=True)
    places = torch.stack([torch.randint(0, size + 1, (14,)) for size in shape])  # some of them twice
    want = torch.einsum("k,kp,kq->pq", values, left[places[0]], right[places[1]])
    gradients_agree(separable_sum(values, places, left, right), want, [values])


@pytest.mark.parametrize("chunk", [1, 24, 1 << 17])
def test_differences_of_distances(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankloom.kernels.distances.CHUNK", chunk)
    p, q = (torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 8))
    apart = [(p[head, :, None] - q[head, None]).norm(dim=2) for head in (0, 1)]
    gradients_agree(distance_difference(p, q), apart[0] - apart[1], [p, q])
    same = torch.cat([p[:1], p[:1]]).detach().requires_grad_()
    coincide = distance_difference(same, same)
    assert not coincide.any()
    (slope,) = torch.autograd.grad(coincide.sum(), same)
    assert slope.isfinite().all()


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "sorted"])
def test_selection_is_exact(kind: str) -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).abs()
    values = {"ties": (4 * values).round(), "constant": 0 * values, "sorted": values.sort().values}.get(kind, values)
    ordered = values.sort().values
    for k in (1, 2, 777, 100_000, 180_000, 199_999, 200_000):
        assert kth_smallest(values, k) == ordered[k - 1]


def moved(part: Any, layer: nn.Linear) -> tuple[rankloom.Adaptation, Tensor]:
    recipe = Recipe(targets=Targets(("q_proj",)), adapter=part, init=OwnStart())
    handle = rankloom.adapt(Net(layer), recipe)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return handle, torch.randn(2, 9, layer.in_features, dtype=torch.float64, requires_grad=True)


class Net(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.q_proj = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.q_proj(x)
        return out


@pytest.mark.parametrize("forms", [True, False])
@pytest.mark.parametrize("part", [SoKA(rank=3), TLoRA(rank=2), TLoRA(rank=2, modes=2)])
@pytest.mark.parametrize("shape", [(12, 8), (7, 11)])
def test_forms_either_way(part: Any, forms: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materialized, "BLOCK", 3 * shape[1])
    monkeypatch.setattr(kronecker_adapters, "forming_kronecker_pays", lambda *_: forms)
    monkeypatch.setattr("rankloom.adapters.TLoRAAdapter.forms", lambda *_: forms)
    handle, x = moved(part, nn.Linear(shape[1], shape[0]).double())
    (binding,) = handle.bindings
    want = x @ (binding.layer.weight() + binding.adapter.delta(binding.layer)).mT + binding.layer.bias()
    gradients_agree(handle.model(x), want, [x, *handle.parameters()])


def test_few_terms_are_applied_and_many_formed() -> None:
    for terms, forms in ((1, False), (16, True)):
        of = Terms(torch.zeros(terms, 24, 24), torch.zeros(terms, 24, 24))
        assert kronecker_adapters.forming_kronecker_pays(of, contraction(of, 1024), 1024) is forms
