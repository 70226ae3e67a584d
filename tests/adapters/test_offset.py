"""The family's effective factors: offsets, cores and frozen tensors against the dense formula, in float64 and below."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankloom.adapters import LowRankAdapter
from rankloom.layers import LinearLayer

CORES, TRAINED = ("identity", "diagonal", "square"), ("all", "A", "B", "core", "B+core")


def made(core: Any, train: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> LowRankAdapter:
    """An adapter with an offset, started anywhere."""
    generator = torch.Generator().manual_seed(seed)
    layer = LinearLayer(nn.Linear(7, 6, dtype=dtype))
    adapter = LowRankAdapter(layer, 3, 1.7, core=core, train=train, dropout=0.0, dtype=dtype)
    adapter.subtract_start()
    b, a = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((6, 3), (3, 7)))
    adapter.write(b, a, torch.rand(3, generator=generator, dtype=dtype) + 0.1)
    adapter.initialized(layer)
    return adapter


def dense(adapter: LowRankAdapter) -> Tensor:
    """``s B C A`` written out."""
    core = torch.eye(3, dtype=torch.float64)
    if adapter.E is not None:
        core = torch.diag(adapter.E.detach().double() * adapter.mask)
    if adapter.R is not None:
        core = adapter.R.detach().double()
    return adapter.scale * adapter.B.detach().double() @ core @ adapter.A.detach().double()


def move(adapter: LowRankAdapter, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


IMPOSSIBLE = [("identity", "core"), ("identity", "B+core"), ("diagonal", "A"), ("square", "A")]
COMBINATIONS = [(c, t) for c in CORES for t in TRAINED if (c, t) not in IMPOSSIBLE]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(COMBINATIONS), st.floats(1e-6, 10), st.integers(0, 1000))
def test_the_update_is_the_difference_of_two_products(combination: tuple[str, str], size: float, seed: int) -> None:
    adapter = made(*combination, seed=seed)
    start = dense(adapter)
    assert not adapter.delta(None).any()
    move(adapter, size, seed + 1)
    want = dense(adapter) - start
    torch.testing.assert_close(adapter.delta(None).detach(), want, rtol=1e-9, atol=1e-10 * (1 + size) ** 3)
    b, a = adapter.factors()
    torch.testing.assert_close((b @ a).detach(), adapter.delta(None).detach(), rtol=1e-12, atol=1e-12)
    # Both sides move: twice the rank. One side: none of it is paid for.
    both = combination[1] == "all" or combination == ("diagonal", "B+core")  # a diagonal core belongs to A's side
    assert len(a) == b.shape[1] == (6 if both else 3)


@pytest.mark.parametrize(("core", "train"), COMBINATIONS)
def test_only_what_is_trained_is_a_parameter_and_has_a_start(core: str, train: str) -> None:
    adapter = made(core, train)
    names = {"identity": "AB", "diagonal": "ABE", "square": "ABR"}[core]
    trained = {"all": names, "A": "A", "B": "B", "core": names[2:], "B+core": f"B{names[2:]}"}[train]
    assert set(dict(adapter.named_parameters())) == set(trained)
    expected = {*names, *(f"{n}0" for n in trained), *(["mask"] if core == "diagonal" else [])}
    assert adapter.state_dict().keys() == expected
    assert all(not adapter.get_buffer(f"{n}0").requires_grad for n in trained)


@pytest.mark.parametrize(("core", "train"), COMBINATIONS)
def test_small_moves_keep_their_digits_in_float32(core: str, train: str) -> None:
    """The difference is formed from what moved: a naive ``B A - B0 A0`` loses the update in the start's rounding."""
    adapter = made(core, train, torch.float32)
    start = dense(adapter)
    move(adapter, 1e-5, 3)
    want = dense(adapter) - start
    assert float((adapter.delta(None).detach() - want).norm() / want.norm()) < 1e-6
    b, a = adapter.B.detach() * (1 if adapter.E is None else adapter.E.detach()), adapter.A.detach()
    naive = (adapter.scale * (b if adapter.R is None else b @ adapter.R.detach()) @ a).double() - start
    assert float((naive - want).norm() / want.norm()) > 1e-3


@pytest.mark.parametrize(("core", "train"), COMBINATIONS)
def test_values_and_zeros_of_a_start(core: str, train: str) -> None:
    """``start`` writes ``left diag(values) right``, and a component of value zero has a gradient."""
    layer = LinearLayer(nn.Linear(7, 6, dtype=torch.float64))
    adapter = LowRankAdapter(layer, 3, 2.0, core=core, train=train, dropout=0.0, dtype=torch.float64)  # type: ignore[arg-type]
    left, right = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    adapter.start(left, torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64), right)
    want = 2 * (left[:, :2] * torch.tensor([4.0, 1.0])) @ right[:2]
    torch.testing.assert_close(adapter.delta(layer), want, rtol=1e-12, atol=1e-12)
    (adapter.delta(layer) * torch.randn(6, 7, dtype=torch.float64)).sum().backward()
    third = {n: p.grad[2] if n == "A" else p.grad[..., 2] for n, p in adapter.named_parameters()}
    live = sum(float(grad.abs().sum()) for n, grad in third.items() if n != "A" or train == "A")
    assert live > 0
