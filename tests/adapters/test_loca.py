"""LoCA against scipy's transforms: coefficients, learned places, alternating phases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import LoCA, LoCAAdapter
from rankloom.errors import RecipeError, TargetError
from rankloom.init import OwnStart
from rankloom.kernels import materialized
from rankloom.kernels.cosines import cosine_rows
from rankloom.layers import LinearLayer
from rankloom.targets import Target
from tests import zoo

SHAPES = [(5, 8), (8, 5), (6, 6)]
every_form = pytest.mark.parametrize("form", ["factored", "dense"])


def made(shape: tuple[int, int], n: int = 7, form: Any = "auto", **settings: Any) -> tuple[LoCAAdapter, LinearLayer]:
    layer = LinearLayer(nn.Linear(shape[1], shape[0], dtype=torch.float64).requires_grad_(False))
    adapter = LoCA(coefficients=n, scale=1.5, form=form, **settings).build(Target("x", layer, "x"))
    with torch.no_grad():
        adapter.reset(layer, torch.Generator().manual_seed(1))
    return adapter, layer


def places(adapter: LoCAAdapter) -> np.ndarray:
    """As released: clamp, scale, round."""
    u = adapter.u.detach().numpy().reshape(2, -1)
    return np.round(np.clip(u, 0, 0.999) * (np.array(adapter.shape)[:, None] - 1)).astype(int)


def spectrum(adapter: LoCAAdapter) -> np.ndarray:
    found = np.zeros(adapter.shape)
    np.add.at(found, tuple(places(adapter)), adapter.a.detach().numpy())
    return found


@every_form
@pytest.mark.parametrize("shape", SHAPES)
def test_the_update_is_the_inverse_cosine_transform(shape: tuple[int, int], form: str) -> None:
    adapter, layer = made(shape, n=20, form=form)  # 20 places of 40: some of them twice, which add up
    assert not adapter.delta(layer).any()
    nn.init.normal_(adapter.a)
    assert len(np.unique(places(adapter), axis=1).T) < 20
    want = torch.from_numpy(1.5 * idctn(spectrum(adapter), norm="ortho"))
    torch.testing.assert_close(adapter.delta(layer).detach(), want, rtol=1e-11, atol=1e-12)


@every_form
@pytest.mark.parametrize("placing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_dense_transform(
    shape: tuple[int, int], placing: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(materialized, "BLOCK", 2 * shape[1])
    adapter, layer = made(shape, form=form)
    nn.init.normal_(adapter.a)
    with torch.no_grad():  # the borders: both ends of both sides, and outside of them
        u = adapter.u.view(2, -1)
        u[:, 0], u[:, 1], u[0, 2], u[1, 2] = 0.0, 1.0, -0.3, 1.2
    adapter.placing = placing
    x = (0.3 * torch.randn(6, shape[1], dtype=torch.float64)).requires_grad_()
    out = adapter.forward(x, layer)
    dense = layer.apply(x, layer.weight() + adapter.delta(layer))
    torch.testing.assert_close(out, dense, rtol=1e-11, atol=1e-12)
    pull = torch.randn_like(out)
    (adapter.forward(x, layer) * pull).sum().backward()
    torch.testing.assert_close(x.grad, pull @ (layer.weight() + adapter.delta(layer).detach()), rtol=1e-11, atol=1e-11)
    k = 1.5 * dctn((pull.mT @ x.detach()).numpy(), norm="ortho")
    (i, j), a, (out_size, in_size) = places(adapter), adapter.a.detach().numpy(), shape
    if not placing:
        torch.testing.assert_close(adapter.a.grad, torch.from_numpy(k[i, j]), rtol=1e-10, atol=1e-11)
        assert adapter.u.grad is not None and not adapter.u.grad.any()
        return
    assert adapter.a.grad is None
    by_i = a / 2 * (k[np.minimum(i + 1, out_size - 1), j] - k[np.maximum(i - 1, 0), j])
    by_j = a / 2 * (k[i, np.minimum(j + 1, in_size - 1)] - k[i, np.maximum(j - 1, 0)])
    want = np.concatenate([np.clip(by_i, -1, 1) * (out_size - 1), np.clip(by_j, -1, 1) * (in_size - 1)])
    torch.testing.assert_close(adapter.u.grad, torch.from_numpy(want), rtol=1e-10, atol=1e-11)


def test_cosine_rows_are_orthonormal() -> None:
    for n in (1, 2, 7, 16):
        rows = cosine_rows(torch.arange(n).double(), n)
        torch.testing.assert_close(rows @ rows.mT, torch.eye(n, dtype=torch.float64), rtol=1e-13, atol=1e-13)


def test_every_update_can_be_written_with_all_places() -> None:
    adapter, layer = made((4, 6), n=24)
    wanted = torch.randn(4, 6, dtype=torch.float64)
    grid = np.stack(np.meshgrid(np.arange(4) / 3, np.arange(6) / 5, indexing="ij")).reshape(2, -1)
    with torch.no_grad():
        adapter.u.copy_(torch.from_numpy(grid.flatten()))
        adapter.a.copy_(torch.from_numpy(dctn(wanted.numpy(), norm="ortho")[tuple(places(adapter))] / 1.5))
    torch.testing.assert_close(adapter.delta(layer).detach(), wanted, rtol=1e-10, atol=1e-10)


def test_the_cheaper_form_is_chosen() -> None:
    assert not made((40, 60), n=20)[0].dense and made((40, 60), n=30)[0].dense  # n (in + out) against in * out
    assert made((40, 60), n=20, form="dense")[0].dense and not made((40, 60), n=30, form="factored")[0].dense


def recipe(**changes: Any) -> Recipe:
    form = LoCA(coefficients=12, coefficient_steps=2, place_steps=3, placing=8)
    made = Recipe(targets=Targets(("q_proj", "down_proj")), adapter=form, init=OwnStart())
    return made.with_({f"adapter.{name}": value for name, value in changes.items()})


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_one_of_the_two_learns_at_a_time_and_places_stop(form: str) -> None:
    handle = rankloom.adapt(zoo.build("llama"), recipe(form=form))
    handle.optimizer(1e-2, weight_decay=0.1)
    learned = []

    def now() -> list[Tensor]:
        return [p.detach().clone() for b in handle.bindings for p in (b.adapter.a, b.adapter.u)]

    before = now()
    for step in range(12):
        handle.model.train()(**zoo.batch("llama", step)).loss.backward()
        handle.step()
        after = now()
        moved = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
        assert moved[::2] == [moved[0]] * 4 and moved[1::2] == [moved[1]] * 4
        learned.append("a" * moved[0] + "u" * moved[1])
        before = after
    assert learned == ["a"] * 2 + ["u"] * 3 + ["a"] * 2 + ["u"] + ["a"] * 4


def test_a_run_resumes_in_the_middle_of_a_phase() -> None:
    data, results = zoo.batches("llama", 3), []
    for broken in (False, True):
        handle = rankloom.adapt(zoo.build("llama"), recipe())
        optimizer = handle.optimizer(1e-2)
        zoo.train(handle, optimizer, data, 4)
        if broken:
            saved = (
                {n: t.clone() for n, t in handle.state_dict().items()},
                handle.schedule_state(),
                optimizer.state_dict(),
            )
            handle = rankloom.adapt(zoo.build("llama"), recipe(), seed=3)
            optimizer = handle.optimizer(1e-2)
            handle.load_state_dict(saved[0])
            handle.load_schedule_state(saved[1])
            optimizer.load_state_dict(saved[2])
            assert all(b.adapter.placing for b in handle.bindings)
        zoo.train(handle, optimizer, data, 3, start=4)
        results.append(handle.state_dict())
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())


def test_impossible_settings_are_refused() -> None:
    for broken in ({"coefficients": 0}, {"place_steps": 0}, {"placing": -1}):
        with pytest.raises(RecipeError, match="coefficient_steps and place_steps >= 1"):
            recipe(**broken).check()
    with pytest.raises(RecipeError, match=r"pass its length, optimizer\(lr, total_steps=...\)"):
        rankloom.adapt(zoo.build("llama"), recipe(placing=0.5)).optimizer(1e-3)
    with pytest.raises(TargetError, match=r"1000 coefficients are more than the 256 entries of .*q_proj"):
        recipe(coefficients=1000).check(zoo.build("llama"))
