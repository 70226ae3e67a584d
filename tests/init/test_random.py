"""Starts without data: distributions, zeros where they belong, generators of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankloom import Recipe, Targets, adapt
from rankloom.adapters import Dense, LoRA
from rankloom.errors import CompositionError
from rankloom.init import Gaussian, Kaiming, OwnStart


def net() -> nn.Module:
    return nn.ModuleDict({"one": nn.Linear(400, 300), "two": nn.Linear(400, 300), "table": nn.Embedding(300, 400)})


def start(init: Kaiming | Gaussian, core: str = "identity", modules: tuple[str, ...] = ("one", "two")) -> list:
    recipe = Recipe(targets=Targets(modules), adapter=LoRA(rank=64, core=core), init=init)
    return [b.adapter for b in adapt(net(), recipe, seed=3).bindings]


def test_kaiming_is_uniform_with_the_papers_bound() -> None:
    one, two = start(Kaiming())
    bound = 400**-0.5
    assert one.A.abs().max() <= bound and one.A.abs().max() > 0.99 * bound
    assert float(one.A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert abs(float(one.A.detach().mean())) < bound / 50
    assert not one.B.any() and not torch.equal(one.A, two.A)


def test_kaiming_on_a_table_and_with_a_core() -> None:
    (table,) = start(Kaiming(), modules=("table",))
    assert float(table.A.detach().std()) == pytest.approx(1, rel=0.03) and not table.B.any()
    one, _ = start(Kaiming(), core="diagonal")
    assert (one.E == 1).all() and not one.B.any()


def test_gaussian_with_and_without_a_core() -> None:
    one, _ = start(Gaussian(std=0.02), core="diagonal")
    for factor in (one.A, one.B):
        assert float(factor.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert not one.E.any()
    plain, _ = start(Gaussian(std=0.02))
    assert not plain.B.any() and plain.A.any()


def test_targets_draw_independently_of_one_another() -> None:
    alone, pair = start(Kaiming(), modules=("two",)), start(Kaiming())
    assert torch.equal(alone[0].A, pair[1].A)


def test_factor_inits_need_factors_and_dense_needs_dense() -> None:
    with pytest.raises(CompositionError, match=r"init 'kaiming' needs factors, which adapter 'dense' does not have"):
        Recipe(adapter=Dense()).check()
    with pytest.raises(CompositionError, match=r"init 'own' needs own start.*works with .*adapter 'dense'"):
        Recipe(init=OwnStart()).check()
