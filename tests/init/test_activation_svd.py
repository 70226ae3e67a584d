"""EVA's start and its redistribution of ranks (2410.07170): the card's invariants in float64, PEFT as the oracle."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rankloom
from rankloom import Calibration, Recipe, Targets, adapt
from rankloom.adapters import LoRA
from rankloom.errors import CompositionError, RecipeError
from rankloom.init import ActivationSVD
from rankloom.init.activation_svd import redistribute
from tests import zoo

RANK = 3


def recipe(rho: float = 1.0, modules: Any = "all-linear", **init: Any) -> Recipe:
    return Recipe(targets=Targets(modules), adapter=LoRA(rank=RANK, alpha=12), init=ActivationSVD(rho=rho, **init))


@torch.no_grad()
def inputs_of(kind: str, names: list[str], data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every row that counts, by hand."""
    model, rows = zoo.build(kind), {n: [] for n in names}
    counted: list[Tensor] = []
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, n=name: rows[n].append(args[0][counted[-1]])
        )
    for batch in data:
        keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        counted.append(keep & (batch["labels"] != -100))
        model(**batch)
    return {n: torch.cat(found) for n, found in rows.items()}


@pytest.mark.parametrize("center", [True, False])
def test_rows_span_the_leading_directions(center: bool) -> None:
    """Invariants 1 and 2: exact PCA of all tokens, at a rank for which one batch is decomposed exactly."""
    data, rank = [zoo.batch("llama", 3, rows=8)], 6
    model, inputs = zoo.build("llama"), zoo.batch("llama", 9)
    before = zoo.logits(model, inputs)
    made = recipe(modules=("q_proj", "o_proj", "up_proj"), center=center).with_({"adapter.rank": rank})
    handle = adapt(model, made, Calibration(data))
    assert torch.equal(before, zoo.logits(model, inputs))
    rows = inputs_of("llama", [b.name for b in handle.bindings], data)
    for b in handle.bindings:
        x = rows[b.name] - rows[b.name].mean(0) * center
        v = torch.linalg.svd(x, full_matrices=False).Vh[:rank]
        a = b.adapter.A.detach()
        torch.testing.assert_close(a @ a.T, torch.eye(rank, dtype=a.dtype), rtol=0, atol=1e-10)
        torch.testing.assert_close(a.T @ a, v.T @ v, rtol=0, atol=1e-9)
        assert not b.adapter.B.any()


def test_layers_of_one_input_share_directions() -> None:
    handle = adapt(zoo.build("llama"), recipe(), Calibration(zoo.batches("llama")))
    by_name = {b.name: b.adapter.A for b in handle.bindings}
    for layer in ("model.layers.0", "model.layers.1"):
        q = by_name[f"{layer}.self_attn.q_proj"]
        assert all(torch.equal(by_name[f"{layer}.self_attn.{n}_proj"], q) for n in "kv")
        assert torch.equal(by_name[f"{layer}.mlp.gate_proj"], by_name[f"{layer}.mlp.up_proj"])


def test_masked_tokens_do_not_count() -> None:
    def batch(pad: int) -> dict[str, Tensor]:
        ids = zoo.batch("llama", 3)["input_ids"].clone()
        ids[:, -3:] = pad
        mask = torch.ones_like(ids)
        mask[:, -3:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    one, other = (adapt(zoo.build("llama"), recipe(), Calibration([batch(pad)])).state_dict() for pad in (1, 7))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-10, atol=1e-12)


def test_whitening_divides_by_the_root_of_the_singular_values() -> None:
    plain, white = (adapt(zoo.build("llama"), recipe(whiten=w), Calibration(zoo.batches("llama"))) for w in (0, 1))
    for p, w in zip(plain.bindings, white.bindings, strict=True):
        ratio = p.adapter.A.norm(dim=1) / w.adapter.A.norm(dim=1)  # sqrt(S), descending
        assert (ratio[:-1] >= ratio[1:]).all()
        torch.testing.assert_close(w.adapter.A * ratio[:, None], p.adapter.A, rtol=1e-9, atol=1e-12)


def test_the_expected_gradient_of_b_is_largest_on_these_rows() -> None:
    """Invariant 6: with output gradients independent of the input, ``E ||dB||^2 ~ ||X A^T||^2``, largest for EVA's rows."""
    data = [zoo.batch("llama", 3, rows=8)]
    handle = adapt(zoo.build("llama"), recipe(center=False), Calibration(data))
    rows = inputs_of("llama", [b.name for b in handle.bindings], data)
    generator = torch.Generator().manual_seed(0)
    for b in handle.bindings:
        x = rows[b.name]
        mine = float((x @ b.adapter.A.detach().T).square().sum())
        for _ in range(20):
            q = torch.linalg.qr(torch.randn(x.shape[1], RANK, generator=generator, dtype=x.dtype)).Q
            assert mine >= float((x @ q).square().sum())


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text("abc", min_size=1), st.lists(st.floats(0, 1), min_size=1, max_size=6), min_size=1),
    st.integers(0, 20),
)
def test_the_budget_goes_to_the_largest_ratios(ratios: dict[str, list[float]], budget: int) -> None:
    """Invariant 4."""
    ratios = {name: sorted(own, reverse=True) for name, own in ratios.items()}
    ranks = redistribute(ratios, budget)
    assert sum(ranks.values()) == min(budget, sum(map(len, ratios.values())))
    winners = [r for n, own in ratios.items() for r in own[: ranks[n]]]
    losers = [r for n, own in ratios.items() for r in own[ranks[n] :]]
    assert not winners or not losers or min(winners) >= max(losers)
    if len({r for own in ratios.values() for r in own}) == sum(map(len, ratios.values())):  # no ties
        assert redistribute(dict(reversed(ratios.items())), budget) == ranks


def test_redistributed_ranks_are_in_the_recipe_and_survive_saving(tmp_path: Any) -> None:
    model = zoo.build("llama")
    made = recipe(rho=2.0).with_({"adapter.rank": 2})
    handle = adapt(model, made, Calibration(zoo.batches("llama")))
    ranks = handle.report["ranks"]
    assert sum(ranks.values()) == 2 * 14 and len(set(ranks.values())) > 1
    for b in handle.bindings:
        assert b.adapter.rank == ranks[b.name] <= 4
        assert b.adapter.scale == pytest.approx(12 / 2)  # alpha follows the rank
        assert handle.recipe.adapter.rank_of(b.name) == ranks[b.name]
    zoo.perturb(handle)
    inputs = zoo.batch("llama")
    expected = zoo.logits(model, inputs)
    handle.save(tmp_path / "adapter")
    again = rankloom.load(zoo.build("llama"), tmp_path / "adapter")
    assert again.recipe == handle.recipe and torch.equal(zoo.logits(again.model, inputs), expected)


def test_targets_that_win_nothing_are_left_out() -> None:
    """Inputs of two layers, one of a single direction and one without any variance."""
    model = torch.nn.ModuleDict({n: torch.nn.Linear(6, 6) for n in ("wide", "flat")}).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)

    def loss(m: Any, batch: Tensor) -> tuple[Tensor, float]:
        return m["wide"](batch).sum() + m["flat"](torch.ones_like(batch)).sum(), 1.0

    made = Recipe(adapter=LoRA(rank=2, alpha=4), init=ActivationSVD(rho=2.0))
    handle = adapt(model, made, Calibration([x], loss))
    assert [b.name for b in handle.bindings] == ["wide"] and handle.bindings[0].adapter.rank == 4
    assert handle.recipe.targets.modules == ("wide",)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_components_and_ranks_are_pefts(rho: float) -> None:
    """On data that repeats, PEFT's cycling adds nothing, so one pass here and its converged state agree."""
    peft = pytest.importorskip("peft")
    modules = ["q_proj", "o_proj", "down_proj"]
    data = [zoo.batch("llama", 3, rows=8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = zoo.build("llama", dtype=torch.float32)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=12, target_modules=modules, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho)
        )
        theirs = peft.get_peft_model(model, config)
        peft.initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    ours = adapt(zoo.build("llama", dtype=torch.float32), recipe(rho, tuple(modules)), Calibration(data))
    assert {b.name: b.adapter.rank for b in ours.bindings} == {
        n: len(m.lora_A["default"].weight) for n, m in layers.items()
    }
    rows = inputs_of("llama", [b.name for b in ours.bindings], data)
    for b in ours.bindings:
        x = (rows[b.name] - rows[b.name].mean(0)).float()
        best = float(torch.linalg.svdvals(x)[: b.adapter.rank].square().sum())
        both = (layers[b.name].lora_A["default"].weight.detach(), b.adapter.A.detach())
        theirs_, own = (float((x @ a.T).square().sum()) / best for a in both)
        # Both decompose at random with the width of twice the rank, which leaves some of a flat tail in.
        assert own > 0.98 and abs(own - theirs_) < 0.02, (b.name, own, theirs_)
        assert b.adapter.scale == pytest.approx(layers[b.name].scaling["default"])


def test_settings_and_forms_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match="rho must be at least 1"):
        ActivationSVD(rho=0.5).check()
    with pytest.raises(CompositionError, match=r"activations on data: pass calibration"):
        adapt(zoo.build("llama"), recipe())
    with pytest.raises(CompositionError, match="leaves no target"):
        recipe().with_ranks({"a": 0})
