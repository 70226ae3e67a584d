"""SoKA: its terms are the weight's own, the start is subtracted exactly, and the spectrum decides how many there are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe
from rankloom.adapters import SoKA
from rankloom.errors import CompositionError, RecipeError, TargetError
from rankloom.init import KroneckerSVD, OwnStart
from rankloom.kernels import contraction
from rankloom.linalg import kronecker_sum, rearranged
from tests import zoo


def adapted(layer: nn.Module, init: Any = None, **settings: Any) -> rankloom.Adaptation:
    recipe = Recipe(adapter=SoKA(**settings), init=init or KroneckerSVD("fixed"))
    return rankloom.adapt(nn.Sequential(layer.double()), recipe.with_(targets={"modules": ("0",)}))


def kron(left: Tensor, right: Tensor) -> Tensor:
    return sum(torch.kron(u, v) for u, v in zip(left, right, strict=True))


def test_it_starts_at_the_weights_best_terms() -> None:
    layer = nn.Linear(20, 12)
    adapter = adapted(layer, rank=4).bindings[0].adapter
    (_, m, n), (_, p, q) = adapter.U.shape, adapter.V.shape
    assert (m * p, n * q) == (12, 20) and sum(t.numel() for t in adapter.parameters()) == 4 * (m * n + p * q)
    s = torch.linalg.svdvals(rearranged(layer.weight, m, n))
    missed = (layer.weight - kron(adapter.U, adapter.V)).square().sum()
    torch.testing.assert_close(missed, s[4:].square().sum())
    for factor in (adapter.U, adapter.V):  # orthogonal among themselves, with the root of the value each
        gram = factor.flatten(1) @ factor.flatten(1).mT
        torch.testing.assert_close(gram, torch.diag(s[:4]))


@pytest.mark.parametrize("train", ["uv", "sigma"])
@pytest.mark.parametrize("size", [0.0, 1e-9, 0.3])
def test_the_update_is_the_difference_of_two_sums_without_cancellation(train: str, size: float) -> None:
    layer = nn.Linear(20, 12)
    handle = adapted(layer, rank=3, train=train)
    adapter = handle.bindings[0].adapter

    def total() -> Tensor:
        weights = adapter.sigma if train == "sigma" else torch.ones(3, dtype=torch.float64)
        return kron(weights[:, None, None] * adapter.U, adapter.V).detach()

    x = torch.randn(2, 20, dtype=torch.float64)
    before, start = layer(x), total()
    with torch.no_grad():
        for p in handle.parameters():
            p += size * torch.randn_like(p)
    delta = adapter.delta(handle.bindings[0].layer)
    if not size:
        assert not delta.any() and torch.equal(handle.model(x), before)
    torch.testing.assert_close(delta, total() - start, rtol=1e-5, atol=1e-14)
    torch.testing.assert_close(handle.model(x), before + x @ (total() - start).mT)
    assert {name for name, _ in adapter.named_parameters()} == ({"sigma"} if train == "sigma" else {"U", "V"})


def test_frozen_factors_keep_no_input() -> None:
    handle = adapted(nn.Linear(20, 12), rank=2, train="sigma")
    kept: list[Tensor] = []
    x = torch.randn(1000, 20, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        handle.model(x)
    left_first = contraction(handle.bindings[0].adapter.terms(), 1000)[0].left
    assert any(t.data_ptr() == x.data_ptr() for t in kept) is left_first  # sigma rides on the left factor


def spectrum(*values: float) -> nn.Linear:
    """A linear whose rearranged weight has these singular values and no others."""
    layer = nn.Linear(16, 16, bias=False, dtype=torch.float64)
    basis = [torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q[: len(values)] for _ in range(2)]
    left, right = (b.reshape(-1, 4, 4) for b in basis)
    layer.weight.data = kronecker_sum(torch.tensor(values, dtype=torch.float64)[:, None, None] * left, right)
    return layer


@pytest.mark.parametrize(("terms", "want"), [("energy", 5), ("elbow", 3), ("both", 3), ("fixed", 6)])
def test_the_spectrum_decides_how_many_terms(terms: Any, want: int) -> None:
    layer = spectrum(10, 9, 2, 1.9, 1.8, 1.7, 1.6)
    handle = adapted(layer, KroneckerSVD(terms, energy=0.96), rank=6)
    assert len(handle.bindings[0].adapter.U) == want == handle.report["terms"]["0"]
    assert handle.recipe.adapter.rank_of("0") == want
    assert not handle.bindings[0].adapter.delta(handle.bindings[0].layer).any()


def test_the_rank_bounds_what_the_spectrum_asks_for() -> None:
    handle = adapted(spectrum(3, 2.9, 2.8, 2.7, 2.6, 2.5), KroneckerSVD("energy"), rank=2)
    assert len(handle.bindings[0].adapter.U) == 2


def test_the_zero_start() -> None:
    for train, dead in (("uv", "V"), ("sigma", "sigma")):
        handle = adapted(nn.Linear(20, 12), OwnStart(), rank=2, train=train)
        named = dict(handle.bindings[0].adapter.named_parameters())
        assert [name for name, p in named.items() if not p.any()] == [dead]
        assert not handle.bindings[0].adapter.delta(handle.bindings[0].layer).any()
        handle.model(torch.randn(3, 20, dtype=torch.float64)).square().sum().backward()
        assert named[dead].grad is not None and named[dead].grad.any()


def test_primes_leave_columns_and_rows() -> None:
    adapter = adapted(nn.Linear(13, 17), rank=2).bindings[0].adapter
    assert adapter.U.shape[1:] + adapter.V.shape[1:] in ((1, 13, 17, 1), (17, 1, 1, 13))


INITS = {"own": OwnStart(), "subtracted": KroneckerSVD("fixed")}


def moved(init: str, **settings: Any) -> rankloom.Adaptation:
    handle = adapted(nn.Linear(20, 12), INITS[init], rank=4, **settings)
    zoo.perturb(handle, 0.3)
    return handle


@pytest.mark.parametrize("init", INITS)
def test_retruncation_at_full_energy_keeps_the_update(init: str) -> None:
    """The same update, the leading terms trained and balanced, whatever is beyond the rank frozen."""
    handle = moved(init)
    binding = handle.bindings[0]
    adapter, before = binding.adapter, binding.adapter.delta(binding.layer).detach()
    s = torch.linalg.svdvals(rearranged(before, *adapter.U.shape[1:]))
    assert int((s > 1e-10).sum()) == (4 if init == "own" else 8)
    adapter.retruncate(1.0)
    torch.testing.assert_close(adapter.delta(binding.layer), before, rtol=1e-12, atol=1e-13)
    for factor in (adapter.U, adapter.V):
        torch.testing.assert_close(factor.flatten(1) @ factor.flatten(1).mT, torch.diag(s[:4]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kron(adapter.U, adapter.V), before - (0 if init == "own" else frozen(adapter)))


def frozen(adapter: Any) -> Tensor:
    return -kron(adapter.U0, adapter.V0)


def live(adapter: Any) -> int:
    """How many terms are not zero."""
    return int((adapter.U.flatten(1).any(1) & adapter.V.flatten(1).any(1)).sum())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_what_is_dropped_is_the_energy_beyond_the_share(init: str, energy: float) -> None:
    handle = moved(init)
    binding = handle.bindings[0]
    adapter, before = binding.adapter, binding.adapter.delta(binding.layer).detach()
    values = torch.linalg.svdvals(rearranged(before, *adapter.U.shape[1:])).square()
    kept = next(r for r in range(1, 9) if values[:r].sum() >= energy * values.sum())
    adapter.retruncate(energy)
    dropped = (adapter.delta(binding.layer) - before).square().sum()
    torch.testing.assert_close(dropped, values[kept:].sum(), rtol=1e-9, atol=1e-12)
    assert live(adapter) == min(kept, 4)


@pytest.mark.parametrize("init", INITS)
def test_dropped_terms_are_dead_and_ranks_only_fall(init: str) -> None:
    """No gradient reaches them, to the bit; momentum and decay find nothing to move."""
    handle = moved(init, truncate_every=3, truncate_energy=0.5)
    adapter = handle.bindings[0].adapter
    optimizer = handle.optimizer(1e-2, weight_decay=0.1)
    x = torch.randn(30, 20, dtype=torch.float64)
    counts = []
    for _ in range(9):
        handle.model(x).pow(3).mean().backward()
        for factor, other in ((adapter.U, adapter.V), (adapter.V, adapter.U)):
            dead = ~other.flatten(1).any(1)
            assert not factor.grad[dead].any() and not factor[dead].any()
            assert factor.grad[~dead].flatten(1).any(1).all()
        handle.step()
        counts.append(live(adapter))
    assert optimizer.param_groups and counts == sorted(counts, reverse=True)
    assert counts[:2] == [4, 4] and counts[2] == counts[3] < 4 and counts[-1] >= 1


def test_moments_of_the_old_terms_are_dropped_and_no_others() -> None:
    handle = adapted(nn.Linear(20, 12), OwnStart(), rank=2, truncate_every=2)
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 3)).double()
    recipe = handle.recipe.with_(targets={"modules": ("0",), "train": ("1",)})
    handle = rankloom.adapt(model, recipe)
    optimizer = handle.optimizer(1e-2)
    seen = []
    for _ in range(3):
        model(torch.randn(5, 20, dtype=torch.float64)).square().mean().backward()
        handle.step()
        seen.append([int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in handle.parameters()])
    assert seen == [[1, 1, 1, 1], [0, 0, 2, 2], [1, 1, 3, 3]]


@pytest.mark.parametrize("stop", [2, 3, 4, 7])
def test_resuming_across_a_retruncation_is_bit_exact(stop: int) -> None:
    changes = {"adapter.truncate_every": 3, "adapter.truncate_energy": 0.8}
    recipe, data = zoo.recipe_of("soka").with_(changes), zoo.batches("llama", 3)

    def start(seed: int) -> tuple[rankloom.Adaptation, torch.optim.Optimizer]:
        handle = zoo.adapted(recipe, zoo.build("llama"), "llama", seed=seed)
        return handle, handle.optimizer(1e-2, max_grad_norm=1.0)

    straight, optimizer = start(0)
    losses = zoo.train(straight, optimizer, data, 8)
    assert min(live(b.adapter) for b in straight.bindings) < 3

    broken, optimizer = start(0)
    zoo.train(broken, optimizer, data, stop)
    saved = copy.deepcopy((broken.state_dict(), broken.schedule_state(), optimizer.state_dict()))
    resumed, optimizer = start(1)
    resumed.load_state_dict(saved[0])
    resumed.load_schedule_state(saved[1])
    optimizer.load_state_dict(saved[2])
    assert zoo.train(resumed, optimizer, data, 8 - stop, start=stop) == losses[stop:]
    assert all(torch.equal(t, resumed.state_dict()[n]) for n, t in straight.state_dict().items())


def test_an_update_of_zero_is_left_alone() -> None:
    for init in INITS.values():
        handle = adapted(nn.Linear(20, 12), init, rank=3)
        adapter = handle.bindings[0].adapter
        before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        adapter.retruncate(0.5)
        assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())


def test_what_cannot_be() -> None:
    for changes in ({"truncate_every": -1}, {"truncate_energy": 0.0}, {"truncate_energy": 1.1}):
        with pytest.raises(RecipeError, match=r"truncate_every is a number of steps.*share in \(0, 1\]"):
            Recipe(adapter=SoKA(**changes), init=OwnStart()).check()
    with pytest.raises(RecipeError, match=r"train='sigma' freezes: set adapter.train to 'uv'"):
        Recipe(adapter=SoKA(train="sigma", truncate_every=5), init=OwnStart()).check()
    with pytest.raises(TargetError, match=r"17 Kronecker terms are more than 0 \(16, 16\) has, 16 of 4 x 4"):
        adapted(nn.Linear(16, 16), rank=17)
    with pytest.raises(RecipeError, match="rank must be at least 1"):
        Recipe(adapter=SoKA(rank=0), init=OwnStart()).check()
    with pytest.raises(RecipeError, match="energy is a share"):
        Recipe(adapter=SoKA(), init=KroneckerSVD(energy=0)).check()
    with pytest.raises(CompositionError, match=r"needs kronecker terms.*soka"):
        Recipe(init=KroneckerSVD()).check()
