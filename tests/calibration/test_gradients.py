"""Gradient sketches and their exact oracle, against plain autograd on trainable weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom import Calibration, Targets
from rankloom.calibration import exact_gradients, gradient_svd
from rankloom.calibration.sketch import AlternatingSketch
from rankloom.errors import DataError, GradientError, TargetError
from rankloom.targets import find_targets
from tests import zoo


def weight_gradient(module: nn.Module, grad: Tensor, rows: slice = slice(None)) -> Tensor:
    """A module's gradient as (out, in), told apart by what the module is."""
    if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
        grad = grad.T
    return grad.flatten(1)[rows]


def autograd_gradients(model: nn.Module, names: dict[str, str], loss: Tensor) -> dict[str, Tensor]:
    """Autograd's gradients of module weights, ``names`` target -> module."""
    modules = {t: model.get_submodule(m) for t, m in names.items()}
    grads = torch.autograd.grad(loss, [m.weight for m in modules.values()])
    return {t: weight_gradient(m, g) for (t, m), g in zip(modules.items(), grads, strict=True)}


KINDS = {
    "llama": Targets(),
    "gpt2": Targets(("c_attn", "c_proj", "c_fc", "wpe")),
    "bert": Targets(("query", "dense", "word_embeddings", "classifier")),
    "vit": Targets(("projection", "re:.*attention.*", "classifier")),
    "t5": Targets(),
    "convnet": Targets(("stem", "body", "mix", "head")),
}


@pytest.mark.parametrize("kind", zoo.MODELS)
def test_exact_equals_autograd_on_the_concatenated_batch(kind: str) -> None:
    model, parts = zoo.build(kind), zoo.batches(kind, 3)
    targets = find_targets(model, KINDS[kind])
    names = {t.name: t.module_name for t in targets}
    big = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    want = autograd_gradients(model, names, model(**big).loss)
    got, report = exact_gradients(model, targets, Calibration(parts))
    for name, gradient in got.items():
        torch.testing.assert_close(
            gradient, want[name], rtol=1e-12, atol=1e-12 * float(want[name].abs().max()), msg=name
        )
        svd = report.svds[name]
        torch.testing.assert_close((svd.U * svd.S) @ svd.V.T, want[name], rtol=1e-9, atol=1e-12)
    assert report.loss == pytest.approx(float(model(**big).loss.detach()), rel=1e-12)


def ragged(kind: str = "llama") -> list[dict[str, Tensor]]:
    """Micro-batches of unequal length, padding and ignored labels."""
    g = torch.Generator().manual_seed(3)
    made = []
    for rows, length, ignored in ((2, 7, 0), (1, 4, 2), (3, 9, 5)):
        ids = torch.randint(3, zoo.VOCAB, (rows, length), generator=g)
        labels = ids.clone()
        labels[:, : 1 + ignored] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def token_mean_loss(model: nn.Module, parts: list[dict[str, Tensor]]) -> Tensor:
    """The mean over all labelled tokens, summed by hand."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for p in parts:
        logits = model(input_ids=p["input_ids"], attention_mask=p["attention_mask"]).logits[:, :-1]
        labels = p["labels"][:, 1:]
        total = total + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def test_micro_batches_count_by_token() -> None:
    model, parts = zoo.build("llama"), ragged()
    targets = find_targets(model, Targets())
    want = autograd_gradients(model, {t.name: t.name for t in targets}, token_mean_loss(model, parts))
    got, report = exact_gradients(model, targets, Calibration(parts))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-14, msg=name)
    assert report.tokens == sum(int((p["labels"][:, 1:] != -100).sum()) for p in parts)
    assert report.loss == pytest.approx(float(token_mean_loss(model, parts).detach()), rel=1e-12)
    # A batch without any label that counts changes nothing.
    empty = {**parts[0], "labels": torch.full_like(parts[0]["labels"], -100)}
    again, _ = exact_gradients(model, targets, Calibration([parts[0], empty, *parts[1:]]))
    assert all(torch.equal(again[n], got[n]) for n in got)


def test_the_split_into_micro_batches_does_not_matter() -> None:
    model = zoo.build("llama")
    targets = find_targets(model, Targets())
    whole = zoo.batch("llama", rows=6)
    results = []
    for size in (6, 3, 2, 1):
        parts = [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, 6, size)]
        exact, _ = exact_gradients(model, targets, Calibration(parts))
        sketch = gradient_svd(model, targets, Calibration(parts), rank=3, oversample=2)
        results.append((exact, {n: (s.U * s.S) @ s.V.T for n, s in sketch.svds.items()}))
    for exact, sketch in results[1:]:
        for name in exact:
            torch.testing.assert_close(exact[name], results[0][0][name], rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(sketch[name], results[0][1][name], rtol=1e-8, atol=1e-12)


class OneMatrix(nn.Module):
    """``loss = <x W^T, D>``: the gradient of ``W`` is ``D^T x``, any matrix we like."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(fan_in, fan_out, bias=False, dtype=torch.float64)


def matrix_with(singular: Tensor, fan_out: int, fan_in: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(n, len(singular), generator=g, dtype=torch.float64)).Q for n in (fan_out, fan_in)
    )
    return (u * singular) @ v.T


def given_gradient(gradient: Tensor, parts: int = 3, seed: int = 1) -> tuple[OneMatrix, list[Any], Calibration]:
    """A model whose mean-loss gradient is exactly ``gradient``, spread over micro-batches."""
    fan_out, fan_in = gradient.shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * fan_in, fan_in, generator=g, dtype=torch.float64)
    pulls = (gradient @ torch.linalg.pinv(x)).T  # (tokens, out): pulls^T x = gradient
    batches = list(zip(x.chunk(parts), pulls.chunk(parts), strict=True))
    model = OneMatrix(fan_in, fan_out)

    def loss(model: OneMatrix, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
        rows, pull = batch
        weight = len(rows) / len(x)
        return (model.layer(rows) * pull).sum() / weight, weight

    return model, find_targets(model, Targets(("layer",))), Calibration(batches, loss)


def captured_energy(gradient: Tensor, u: Tensor, v: Tensor, rank: int) -> tuple[float, float]:
    """Share of the best rank-r energy inside the found left and right subspaces."""
    best = float(torch.linalg.svdvals(gradient)[:rank].square().sum())
    return float((u.T @ gradient).square().sum()) / best, float((gradient @ v).square().sum()) / best


SPECTRA = {
    "decaying": 2.0 ** -torch.arange(40, dtype=torch.float64),
    "power law": 1 / torch.arange(1, 41, dtype=torch.float64),
    "flat": torch.ones(40, dtype=torch.float64) + 0.01 * torch.arange(40, dtype=torch.float64).flip(0),
    "low rank": torch.cat([torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), torch.zeros(37, dtype=torch.float64)]),
}


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("shape", [(60, 48), (48, 60)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_sketch_against_exact_subspaces(spectrum: str, shape: tuple[int, int], lean: bool) -> None:
    rank, gradient = 4, matrix_with(SPECTRA[spectrum], *shape)
    model, targets, data = given_gradient(gradient)
    exact, _ = exact_gradients(model, targets, data)
    torch.testing.assert_close(exact["layer"], gradient, rtol=1e-9, atol=1e-12)
    passes = 6 if lean else 4  # one side a pass gains half as much
    report = gradient_svd(model, targets, data, rank=rank, oversample=8, passes=passes, lean=lean)
    svd = report.svds["layer"]
    u, s, v = svd.top(rank)
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(v.T @ v, identity, rtol=0, atol=1e-12)
    true = torch.linalg.svdvals(gradient)
    assert (s <= true[:rank] * (1 + 1e-3) + 1e-12).all()  # not Ritz values of a compression, but as good as
    left, right = captured_energy(gradient, u, v, rank)
    assert 0 < svd.captured <= 1
    if spectrum in ("decaying", "low rank"):
        live = 3 if spectrum == "low rank" else rank
        exact_u = torch.linalg.svd(gradient).U[:, :live]
        angle = math.asin(
            min(1.0, float(torch.linalg.matrix_norm(exact_u - u[:, :live] @ (u[:, :live].T @ exact_u), 2)))
        )
        assert angle < 1e-6
        torch.testing.assert_close(s[:live], true[:live], rtol=1e-9, atol=1e-12)
        assert svd.captured == pytest.approx(1, abs=1e-6)
    else:
        assert min(left, right) > 0.9
    assert svd.captured == pytest.approx(max(left, right), abs=0.08)  # the flat one converges too slowly to be seen
    assert svd.passes == report.passes == passes


def test_one_side_a_pass_holds_half_and_ends_as_well_a_pass_later() -> None:
    gradient = matrix_with(SPECTRA["power law"], 60, 48)
    model, targets, data = given_gradient(gradient)
    sketch = AlternatingSketch(targets[0], 4, 12, seed=0)
    for turn in range(4):
        sketch.start_pass()
        held = [t for t in vars(sketch).values() if isinstance(t, Tensor) and t.numel()]
        storages = {t.untyped_storage().data_ptr(): t.numel() for t in held}
        assert sum(storages.values()) == 12 * (60 + 48), turn  # one basis and one sum, on the two sides
        x, pull = (torch.cat(t) for t in zip(*data.batches, strict=True))
        sketch.add(x, pull, 1.0)
        sketch.finish_pass(1.0)
    u, _, v = sketch.result.top(4)
    both = gradient_svd(model, targets, data, rank=4, oversample=8, passes=3).svds["layer"].top(4)
    lean, two = (min(captured_energy(gradient, a, b, 4)) for a, b in ((u, v), (both[0], both[2])))
    assert lean > two - 0.01


def test_the_triplets_are_of_the_gradient_not_of_its_negative() -> None:
    gradient = matrix_with(SPECTRA["decaying"], 44, 50)
    model, targets, data = given_gradient(gradient)
    svd = gradient_svd(model, targets, data, rank=2).svds["layer"]
    assert float(svd.U[:, 0] @ gradient @ svd.V[:, 0]) > 0
    assert (svd.S > 0).all()


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("passes", [3, 4, 5])
@pytest.mark.parametrize("spectrum", ["decaying", "power law", "flat"])
def test_estimates_against_the_truth(spectrum: str, passes: int, lean: bool) -> None:
    """Averaged over starts: ``captured`` is close where the sketch has converged, and over by a few points at most where not;
    ``explained`` is close to the share of the whole energy that the true leading triplets hold."""
    rank, gradient = 4, matrix_with(SPECTRA[spectrum], 60, 48)
    model, targets, data = given_gradient(gradient)
    energies = torch.linalg.svdvals(gradient).square()
    captured, explained, truth = [], [], []
    for seed in range(8):
        report = gradient_svd(model, targets, data, rank=rank, oversample=8, passes=passes, lean=lean, seed=seed)
        svd = report.svds["layer"]
        captured.append(svd.captured)
        explained.append(svd.explained)
        u, _, v = svd.top(rank)
        truth.append(max(captured_energy(gradient, u, v, rank)))
    assert sum(captured) / 8 <= sum(truth) / 8 + 0.08
    if spectrum != "flat":
        assert sum(captured) / 8 == pytest.approx(sum(truth) / 8, abs=0.03)
    share = float(energies[:rank].sum() / energies.sum())
    assert sum(explained) / 8 == pytest.approx(share, rel=0.25)


def test_tolerance_asks_for_more_passes() -> None:
    gradient = matrix_with(SPECTRA["power law"], 60, 48)
    model, targets, data = given_gradient(gradient)
    few = gradient_svd(model, targets, data, rank=4, oversample=2, passes=3)
    more = gradient_svd(model, targets, data, rank=4, oversample=2, passes=3, tolerance=0.9999, max_passes=12)
    assert few.captured < 0.9999
    assert 3 < more.passes <= 12
    assert more.captured >= 0.9999
    true = torch.linalg.svdvals(gradient)[:4]

    def share(report: Any) -> float:
        return float(report.svds["layer"].top(4)[1].square().sum() / true.square().sum())

    assert share(few) < share(more)
    assert share(more) > 0.999
    bounded = gradient_svd(model, targets, data, rank=4, oversample=2, passes=2, tolerance=1.0, max_passes=5)
    assert bounded.passes == 5


def test_only_the_targets_that_fall_short_are_seen_again() -> None:
    model = zoo.build("llama")
    targets = find_targets(model, Targets())
    data = Calibration(zoo.batches("llama"))
    report = gradient_svd(model, targets, data, rank=1, oversample=6, passes=3, tolerance=0.999, max_passes=9)
    passes = {s.passes for s in report.svds.values()}
    assert len(passes) > 1 and min(passes) == 3
    assert all(s.captured >= 0.999 or s.passes == 9 for s in report.svds.values())


def test_results_do_not_depend_on_other_targets_and_repeat_by_seed() -> None:
    model, data = zoo.build("llama"), Calibration(zoo.batches("llama"))
    targets = find_targets(model, Targets())
    one = gradient_svd(model, targets[3:4], data, rank=2, oversample=2)
    every = gradient_svd(model, targets, data, rank=2, oversample=2)
    name = targets[3].name
    assert torch.equal(one.svds[name].U, every.svds[name].U)
    other = gradient_svd(model, targets[3:4], data, rank=2, oversample=2, seed=1)
    assert not torch.equal(one.svds[name].U, other.svds[name].U)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("kind", zoo.MODELS)
def test_sketch_of_every_layer_kind(kind: str, lean: bool) -> None:
    """As wide as the space, so it has to be exact whatever the spectrum."""
    model, data = zoo.build(kind), Calibration(zoo.batches(kind))
    targets = find_targets(model, KINDS[kind])
    exact, _ = exact_gradients(model, targets, data)
    report = gradient_svd(model, targets, data, rank=3, oversample=200, passes=2, lean=lean)
    for name, svd in report.svds.items():
        scale = float(exact[name].abs().max())
        torch.testing.assert_close((svd.U * svd.S) @ svd.V.T, exact[name], rtol=1e-8, atol=1e-9 * scale, msg=name)
        assert svd.captured == 1.0
    assert report.captured == 1.0


def test_slices_of_a_fused_projection() -> None:
    model, data = zoo.build("gpt2"), Calibration(zoo.batches("gpt2"))
    whole, _ = exact_gradients(model, find_targets(model, Targets(("h.0.attn.c_attn",))), data)
    parts, _ = exact_gradients(model, find_targets(model, Targets(("h.0.attn.c_attn[q]", "h.0.attn.c_attn[v]"))), data)
    full = whole["transformer.h.0.attn.c_attn"]
    assert torch.equal(parts["transformer.h.0.attn.c_attn[0:16]"], full[:16])
    assert torch.equal(parts["transformer.h.0.attn.c_attn[32:48]"], full[32:])


def test_a_module_used_twice_sums_its_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model, x = Twice(), torch.randn(5, 6, dtype=torch.float64)
    got, _ = exact_gradients(
        model, find_targets(model, Targets(("layer",))), Calibration([x], lambda m, b: (m(b).square().mean(), 1.0))
    )
    (want,) = torch.autograd.grad(model(x).square().mean(), model.layer.weight)
    torch.testing.assert_close(got["layer"], want, rtol=1e-12, atol=1e-14)


def test_frozen_and_half_precision_bases() -> None:
    data = Calibration(zoo.batches("llama"))
    model = zoo.build("llama")
    want, _ = exact_gradients(model, find_targets(model, Targets()), data)
    frozen = zoo.build("llama").requires_grad_(False)
    got, _ = exact_gradients(frozen, find_targets(frozen, Targets()), data)
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert not any(p.requires_grad for p in frozen.parameters())
    half = zoo.build("llama", dtype=torch.bfloat16)
    rough, _ = exact_gradients(half, find_targets(half, Targets()), data)
    for name in want:
        assert rough[name].dtype == torch.float32
        assert float((rough[name] - want[name]).norm() / want[name].norm()) < 0.15, name


def test_flags_modes_hooks_and_grads_are_as_before() -> None:
    model = zoo.build("llama").train()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.model.layers[0].eval()
    before = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    gradient_svd(model, find_targets(model, Targets()), Calibration(zoo.batches("llama")), rank=2)
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == before
    assert not frozen.requires_grad
    assert sum(not p.requires_grad for p in model.parameters()) == 1
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off_during_calibration() -> None:
    model = zoo.build("gpt2", resid_pdrop=0.5).train()
    targets = find_targets(model, Targets(("c_fc",)))
    data = Calibration(zoo.batches("gpt2"))
    first, second = (exact_gradients(model, targets, data)[0] for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_an_in_place_activation_may_follow_a_target() -> None:
    model = zoo.build("convnet")
    targets = find_targets(model, Targets(("stem", "body")))
    got, _ = exact_gradients(model, targets, Calibration(zoo.batches("convnet", 1)))
    model.act.inplace = False
    want, _ = exact_gradients(model, targets, Calibration(zoo.batches("convnet", 1)))
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_grouped_convolution_is_exact_only() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, dtype=torch.float64), nn.Flatten())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    data = Calibration([x], lambda m, b: (m(b).square().mean(), 1.0))
    targets = find_targets(model, Targets(("0",)))
    with pytest.raises(TargetError, match=r"grouped convolution.*exact"):
        gradient_svd(model, targets, data, rank=2)
    got, _ = exact_gradients(model, targets, data)
    (want,) = torch.autograd.grad(model(x).square().mean(), model[0].weight)
    torch.testing.assert_close(got["0"], want.flatten(1), rtol=1e-12, atol=1e-14)


def test_bad_data_is_named() -> None:
    model = zoo.build("llama")
    targets = find_targets(model, Targets())
    with pytest.raises(DataError, match="empty"):
        gradient_svd(model, targets, Calibration([]), rank=2)
    with pytest.raises(DataError, match="not an iterator"):
        Calibration(iter([zoo.batch("llama")]))
    with pytest.raises(DataError, match="labels"):
        gradient_svd(model, targets, Calibration([{"input_ids": torch.ones(1, 3, dtype=torch.long)}]), rank=2)
    ignored = {**zoo.batch("llama"), "labels": torch.full((4, 7), -100)}
    with pytest.raises(DataError, match="-100"):
        gradient_svd(model, targets, Calibration([ignored]), rank=2)
    with pytest.raises(GradientError, match=r"batch 1 has loss nan"):
        good = zoo.batch("llama")
        bad = Calibration([good, good], _nan_on_second())
        gradient_svd(model, targets, bad, rank=2)
    assert all(not m._forward_hooks for m in model.modules())


def _nan_on_second() -> Any:
    calls = []

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        calls.append(1)
        value = model(**batch).loss
        return value * (float("nan") if len(calls) == 2 else 1.0), 1.0

    return loss
