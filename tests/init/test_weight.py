"""Starts from the weight (PiSSA, MiLoRA, OLoRA, LoRA-XS): the cards' invariants in float64, PEFT as the oracle."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankloom import Recipe, Targets, adapt
from rankloom.adapters import LoRA
from rankloom.errors import RecipeError
from rankloom.init import WeightQR, WeightSubspace, WeightSVD
from rankloom.linalg import leading_svd
from rankloom.linalg import svd as implementation
from tests import zoo

RANK, ALPHA = 3, 7.0


def started(init: Any, kind: str = "llama", modules: Any = "all-linear", **adapter: Any) -> Any:
    recipe = Recipe(targets=Targets(modules), adapter=LoRA(**{"rank": RANK, "alpha": ALPHA, **adapter}), init=init)
    return adapt(zoo.build(kind), recipe)


def weights(handle: Any) -> list[tuple[Any, Tensor, Tensor, Tensor, Tensor]]:
    """Every adapter with its weight's own decomposition."""
    found = []
    for b in handle.bindings:
        w = b.layer.weight()
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        found.append((b.adapter, w, u, s, vh))
    return found


KINDS = [
    ("llama", "all-linear"),
    ("gpt2", ("c_attn", "c_proj")),
    ("gpt2", ("c_attn[q]",)),
    ("convnet", ("stem", "mix")),
]


@pytest.mark.parametrize(("kind", "modules"), KINDS)
def test_pissa_takes_the_principal_part(kind: str, modules: Any) -> None:
    """``s B A = W_r``, the residual's singular values are the rest, the factors are balanced."""
    for a, w, u, s, vh in weights(started(WeightSVD(), kind, modules)):
        start = a.scale * a.B @ a.A
        torch.testing.assert_close(start, (u[:, :RANK] * s[:RANK]) @ vh[:RANK], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.linalg.svdvals(w - start)[: len(s) - RANK], s[RANK:], rtol=0, atol=1e-11)
        torch.testing.assert_close(a.B.T @ a.B, torch.diag(s[:RANK] / a.scale), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(a.A @ a.A.T, a.B.T @ a.B, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("kind", "modules"), KINDS)
def test_milora_takes_the_minor_part(kind: str, modules: Any) -> None:
    for a, w, u, s, vh in weights(started(WeightSVD("minor"), kind, modules)):
        start = a.scale * a.B @ a.A
        torch.testing.assert_close(start, (u[:, -RANK:] * s[-RANK:]) @ vh[-RANK:], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.linalg.svdvals(w - start)[: len(s) - RANK], s[:-RANK], rtol=0, atol=1e-11)


@pytest.mark.parametrize(("kind", "modules"), KINDS)
def test_olora_takes_the_leading_rows_of_qr(kind: str, modules: Any) -> None:
    """``B^T B = I``, ``B A = Q_r R_r`` of the full decomposition, not divided by the scale."""
    for a, w, *_ in weights(started(WeightQR(), kind, modules)):
        q, r = torch.linalg.qr(w)
        torch.testing.assert_close(a.B, q[:, :RANK], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(a.A, r[:RANK], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(a.B.T @ a.B, torch.eye(RANK, dtype=w.dtype), rtol=0, atol=1e-12)


def test_xs_spans_the_singular_subspaces() -> None:
    """``B A = W_r``; only the core trains, near zero; the move is its size."""
    handle = started(WeightSubspace(), core="square", train="core")
    for a, _, u, s, vh in weights(handle):
        torch.testing.assert_close(a.B @ a.A, (u[:, :RANK] * s[:RANK]) @ vh[:RANK], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(a.B.T @ a.B, torch.eye(RANK, dtype=a.B.dtype), rtol=0, atol=1e-12)
        assert 0 < a.R.abs().max() < 6e-5
    assert {t.role for t in handle.trainables()} == {"core"}
    assert sum(p.numel() for p in handle.parameters()) == len(handle.bindings) * RANK**2
    exact = started(WeightSubspace(std=0.0), core="square", train="core")
    assert not exact.recipe.init.moves_output and not any(b.adapter.R.any() for b in exact.bindings)


def test_a_core_takes_the_singular_values() -> None:
    for core, train in (("square", "core"), ("square", "all"), ("diagonal", "all")):
        for a, _, u, s, vh in weights(started(WeightSVD(), core=core, train=train)):
            sign = torch.sign((a.B * u[:, :RANK]).sum(0))
            torch.testing.assert_close(a.B, u[:, :RANK] * sign, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(a.A, vh[:RANK] * sign[:, None], rtol=1e-9, atol=1e-11)
            own = torch.diagonal(a.R) if core == "square" else a.E
            torch.testing.assert_close(own, s[:RANK] / a.scale, rtol=1e-10, atol=1e-12)
            assert not a.delta(None).any()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**31), st.booleans())
def test_leading_triplets_of_any_matrix(rows: int, columns: int, rank: int, seed: int, thin: bool) -> None:
    """The Gram route against the full decomposition, also for matrices of lower rank than asked for."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, rows, columns)
    inner = max(1, rank - 2) if thin else min(rows, columns)
    left = torch.randn(rows, inner, generator=generator, dtype=torch.float64)
    matrix = left @ torch.randn(inner, columns, generator=generator, dtype=torch.float64)
    u, s, v, captured = leading_svd(matrix, rank)
    want = torch.linalg.svdvals(matrix)[:rank]
    assert captured == 1.0 and u.shape == (rows, rank) and v.shape == (columns, rank)
    torch.testing.assert_close(s, want, rtol=1e-9, atol=1e-10 * float(want[0]))
    torch.testing.assert_close(u.T @ u, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(v.T @ v, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-9)
    lost = torch.linalg.matrix_norm(matrix - (u * s) @ v.T)
    best = torch.linalg.svdvals(matrix)[rank:].norm()
    assert float(lost - best) <= 1e-8 * float(want[0])


def test_large_matrices_are_iterated_until_their_energy_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "_GRAM_UP_TO", 8)
    generator = torch.Generator().manual_seed(0)
    for decay in (0.0, 0.3, 1.0):
        matrix = torch.randn(220, 160, generator=generator) * torch.arange(1, 161.0) ** -decay
        best = torch.linalg.svdvals(matrix)[:8].square().sum()
        for tolerance in (1e-2, 1e-3):
            u, s, v, captured = leading_svd(matrix, 8, tolerance=tolerance, generator=generator)
            true = float((u.T @ matrix @ v).square().sum() / best)
            assert captured >= 1 - tolerance and true >= 1 - 1.5 * tolerance, (decay, tolerance, true)
            torch.testing.assert_close(s.square().sum(), (u.T @ matrix @ v).square().sum(), rtol=1e-4, atol=0)


def by_peft(start: str, model: nn.Module, modules: list[str], **config: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"r": RANK, "lora_alpha": ALPHA, **config}
        return peft.get_peft_model(
            model, peft.LoraConfig(target_modules=modules, init_lora_weights=start, **settings)
        ).eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("start", "init"), [("pissa", WeightSVD()), ("olora", WeightQR())])
def test_the_factors_are_pefts(start: str, init: Any, rslora: bool) -> None:
    """PEFT computes in float32 and needs float32 weights; signs of singular vectors are free."""
    modules = ["q_proj", "up_proj", "down_proj"]
    model = zoo.build("llama", dtype=torch.float32)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    theirs = dict(by_peft(start, model, modules, use_rslora=rslora).named_modules())
    form = LoRA(rank=RANK, alpha=ALPHA, scaling="rslora" if rslora else "standard")
    recipe = Recipe(targets=Targets(tuple(modules)), adapter=form, init=init)
    ours = adapt(zoo.build("llama", dtype=torch.float32), recipe)
    assert len(ours.bindings) == 6
    for b in ours.bindings:
        module = theirs[f"base_model.model.{b.name}"]
        a, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        sign = torch.sign((b.adapter.A * a).sum(1))
        torch.testing.assert_close(b.adapter.A * sign[:, None], a, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(b.adapter.B * sign, up, rtol=1e-3, atol=1e-4)
        # Where PEFT edits the weight in place, ours is the original to the bit.
        assert torch.equal(b.layer.weight(), base[f"{b.name}.weight"])
        gap = (module.base_layer.weight + b.adapter.scale * up @ a - base[f"{b.name}.weight"]).abs().max()
        assert 0 < gap < 1e-5  # the deviation: their step 0 is off by rounding


def test_adapting_the_same_base_twice_starts_the_same() -> None:
    """PEFT's second adapter sees the first one's residual; here the base was never touched."""
    model = zoo.build("llama")
    recipe = Recipe(adapter=LoRA(rank=RANK, alpha=ALPHA), init=WeightSVD())
    first = adapt(model, recipe)
    state = {n: t.clone() for n, t in first.state_dict().items()}
    zoo.perturb(first)
    first.detach()
    second = adapt(model, recipe)
    assert all(torch.equal(t, state[n]) for n, t in second.state_dict().items())


def test_fused_slices_start_from_their_own_rows() -> None:
    handle = started(WeightSVD(), "gpt2", ("c_attn[q]", "c_attn[v]"))
    for b in handle.bindings:
        rows = slice(*b.layer.rows)
        w = b.layer.module.weight.T[rows]
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        start = b.adapter.scale * b.adapter.B @ b.adapter.A
        torch.testing.assert_close(start, (u[:, :RANK] * s[:RANK]) @ vh[:RANK], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("init", "message"),
    [(WeightSVD(tolerance=0.0), "tolerance"), (WeightSubspace(std=-1.0), "std")],
)
def test_settings_that_make_no_sense(init: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(Recipe(), init=init).check()
