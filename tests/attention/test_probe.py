"""The probe: measured quantities against dense oracles, planted heads whose verdict is known, real layers' inputs."""

from __future__ import annotations

import json
from math import comb, factorial, log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rankloom
from rankloom.attention import probe as module
from rankloom.attention.capture import capture
from rankloom.attention.cost import MARGIN, CostModel
from rankloom.attention.figure import draw
from rankloom.attention.precondition import Preconditioner
from rankloom.attention.probe import probe, probe_head
from rankloom.attention.report import HeadReport, Report, compare, threshold
from rankloom.attention.trial import Head, Trials, errors, least_degree
from rankloom.errors import AttentionError, DataError, RecipeError, TargetError
from tests import zoo

LENGTHS = (1024, 65536)
LINE = tuple((width, 0.0, 1e-8 * width) for width in (1, 4096))  # 10 ns a token and feature, as on one CPU core
COST = CostModel((0.0, 1e-8), {"isotropic": LINE, "mehler": LINE, "anisotropic": LINE, "nystrom": LINE})
RULES: dict[str, Any] = {"lengths": LENGTHS, "eps": 1e-2, "cost": COST}


def planted(kind: str, length: int = 384, dim: int = 4, seed: int = 0) -> dict[str, Any]:
    """``small``: entries in [-1/2, 1/2]; ``large``: logits up to tens; ``plane``: logits up to 8 on a plane."""
    made = torch.Generator().manual_seed(seed)

    def cloud(rows: int) -> Tensor:
        if kind == "small":
            return torch.rand(rows, dim, generator=made) - 0.5
        if kind == "large":
            return 4 * torch.randn(rows, dim, generator=made)
        plane = torch.linalg.qr(torch.randn(dim, 2, generator=torch.Generator().manual_seed(1))).Q
        on = 2 * dim**0.25 * (2 * torch.rand(rows, 2, generator=made) - 1)
        return on @ plane.mT + 1e-3 * torch.randn(rows, dim, generator=made)

    q, k = cloud(length)[None], cloud(length)
    v, grad = torch.randn(length, dim, generator=made), torch.randn(1, length, dim, generator=made)
    return {"q": q, "k": k, "v": v, "grad": grad, "scale": dim**-0.5}


def dense(head: Head, rows: Tensor | None = None) -> list[Tensor]:
    """Output, dQ, dK, dV by autograd of the written-out softmax, in float64, for some query rows."""
    at = torch.arange(head.q.shape[1]) if rows is None else rows
    q, k, v = (x.double().requires_grad_() for x in (head.q[:, at], head.k, head.v))
    logits = head.scale * q @ k.mT
    if head.causal:
        logits = logits.masked_fill(torch.arange(len(k)) > at[:, None], -torch.inf)
    out = logits.softmax(-1) @ v
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), head.grad[:, at].double())]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("kind", "dim", "verdict"), [("small", 4, "polynomial"), ("plane", 16, "low-rank"), ("large", 4, "exact")]
)
def test_planted_heads(kind: str, dim: int, verdict: str, causal: bool) -> None:
    other = planted(kind, dim=dim, seed=7)
    report = probe_head(**planted(kind, dim=dim), causal=causal, held_out=[Head(**other, causal=causal)], **RULES)
    assert report.verdicts[65536] == verdict
    best, at = report.cheapest["gradients"], report.break_even["gradients"]
    if verdict == "exact":
        assert best is None and at is None and "reaches 0.01" in report.reason
    else:
        assert best is not None and max(best.errors) <= 1e-2 and at is not None
        assert (report.verdicts[1024] == "exact") == (at > 1024) == bool(report.reason)
        assert at == pytest.approx(MARGIN * best.width)  # 10 ns L k against 10 ns L^2
        assert report.drift is not None and report.drift > 0


def test_the_grouped_heads_are_judged_together() -> None:
    one, other = planted("small"), planted("large")
    both = {name: torch.cat([one[name], other[name]]) for name in ("q", "grad")}
    report, alone = (probe_head(**given, causal=True, **RULES) for given in (one | both, one))
    assert report.bounds["query"] == float(other["q"].abs().max()) > alone.bounds["query"]
    assert (report.degree["gradients"] or 0) > (alone.degree["gradients"] or 0) > 0
    assert report.cheapest["gradients"] != alone.cheapest["gradients"]


def test_a_length_that_is_too_short_is_exact_though_the_factor_is_good() -> None:
    report = probe_head(**planted("small"), causal=True, eps=1e-2, lengths=(8, 4096), cost=COST)
    assert report.verdicts == {8: "exact", 4096: "polynomial"}
    assert report.reason.startswith("exact attention is faster up to")


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_measured_is_what_it_says(causal: bool) -> None:
    given = planted("large", length=200) | {"scale": 0.1}
    q, k, v = (x + offset for x, offset in zip((given["q"], given["k"], given["v"]), (1.0, -2.0, 9.0), strict=True))
    report = probe_head(**(given | {"q": q, "k": k, "v": v}), causal=causal, **RULES)
    assert report.bounds == {"query": float(q.abs().max()), "key": float(k.abs().max()), "value": float(v.abs().max())}
    assert report.bound == max(report.bounds.values()) and not report.below(1024)
    logits = 0.1 * (q[0] - q[0].mean(0)).double() @ (k - k.mean(0)).double().mT
    assert report.logit_std == pytest.approx(float(logits.square().mean().sqrt()), rel=1e-5)
    assert report.logit_range == pytest.approx(float((logits.tril() if causal else logits).abs().max()), rel=1e-4)
    energy = torch.tensor(report.spectrum).square()
    assert sorted(report.spectrum, reverse=True) == list(report.spectrum) and len(energy) == 4
    held = energy[: report.effective_dimension].sum() / energy.sum()
    assert held >= 0.99 > energy[: report.effective_dimension - 1].sum() / energy.sum()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("eps", [1e-1, 1e-3])
def test_the_least_degree_is_the_least(causal: bool, eps: float) -> None:
    given = planted("small", length=160) | {"causal": causal}
    head = Head(**(given | {"q": 3 * given["q"]}))
    fitted = Preconditioner.fit(head.q[0], head.k, head.scale)
    found = least_degree(head, fitted, eps)
    wanted = dense(head)

    def wrong(degree: int) -> list[float]:
        q, k, v = (x.double().requires_grad_() for x in (head.q, head.k, head.v))
        centre, mean = head.q[0].double().mean(0), head.k.double().mean(0)
        logits = head.scale * (q - centre) @ (k - mean).mT
        kernel = sum(logits**j / factorial(j) for j in range(degree + 1)) * (head.scale * (k - mean) @ centre).exp()
        kernel = kernel.tril() if causal else kernel
        out = kernel / kernel.sum(-1, keepdim=True) @ v
        got = [out.detach(), *torch.autograd.grad(out, (q, k, v), head.grad.double())]
        return [float((x - y).norm() / y.norm()) for x, y in zip(got, wanted, strict=True)]

    for need, at in found.items():
        assert at is not None
        which = slice(1) if need == "output" else slice(4)
        assert max(wrong(at)[which]) <= eps < max(wrong(at - 1)[which])
    report = probe_head(**given, eps=eps, lengths=LENGTHS, cost=COST)
    assert all(report.features[need] == comb(4 + g, g) for need, g in report.degree.items() if g is not None)


def test_out_of_reach_has_no_degree() -> None:
    given = planted("large") | {"scale": 20.0}
    assert least_degree(Head(**given, causal=True), Preconditioner.fit(given["q"][0], given["k"], 20.0), 1e-2) == {
        "output": None,
        "gradients": None,
    }


@pytest.mark.parametrize("causal", [True, False])
def test_errors_are_those_of_all_rows(causal: bool) -> None:
    head = Head(**planted("small"), causal=causal)
    trials = Trials([head], Preconditioner.fit(head.q[0], head.k, head.scale), 1e-2)
    approximation = trials.approximation("isotropic", 1)
    q, k, v = (x.clone().requires_grad_() for x in (head.q, head.k, head.v))
    out, _ = approximation(q, k, v)
    got = [out.detach(), *torch.autograd.grad(out, (q, k, v), head.grad)]
    wrong = [float((x - y).norm() / y.norm()) for x, y in zip(got, dense(head), strict=True)]
    assert errors(approximation, head) == pytest.approx((wrong[0], max(wrong[1:])), rel=1e-3)


def batch(length: int = 96, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, zoo.VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.fixture
def llama() -> Any:
    return zoo.build("llama", dtype=torch.float32, max_position_embeddings=128)


def state_of(model: Any) -> tuple[Any, ...]:
    return model.config._attn_implementation, model.training, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_is_captured_is_what_the_layer_computes_with(llama: Any, implementation: str) -> None:
    llama.set_attn_implementation(implementation)
    rankloom.adapt(llama, rankloom.methods.get("lora"))
    for parameter in llama.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    llama.train()
    before = state_of(llama)
    calls = capture(llama, batch())
    assert state_of(llama) == before and all(p.grad is None for p in llama.parameters())
    assert [call.name for call in calls] == [f"model.layers.{i}.self_attn" for i in range(2)]
    seen, outs = {}, []

    def keep(layer: Any, args: Any, out: Tensor) -> None:
        args[0].retain_grad()
        seen[layer] = args[0]

    llama.eval()
    hooks = [layer.self_attn.o_proj.register_forward_hook(keep) for layer in llama.model.layers]
    llama(**batch()).loss.backward()
    for hook in hooks:
        hook.remove()
    for call, layer in zip(calls, llama.model.layers, strict=True):
        assert (call.q.shape, call.k.shape, call.causal, call.unsupported) == ((4, 96, 4), (2, 96, 4), True, "")
        k, v = (x.repeat_interleave(2, 0) for x in (call.k, call.v))
        out = F.scaled_dot_product_attention(call.q, k, v, scale=call.scale, is_causal=True)
        wanted = seen[layer.self_attn.o_proj]
        outs.append(wanted)
        torch.testing.assert_close(out.transpose(0, 1).reshape(1, 96, 16), wanted.detach(), rtol=1e-4, atol=1e-5)
        assert call.grad is not None
        torch.testing.assert_close(call.grad.transpose(0, 1).reshape(1, 96, 16), wanted.grad, rtol=1e-4, atol=1e-7)


def test_every_head_of_a_model(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "calibrate", lambda *dims, **how: asked.append({"dims": dims, **how}) or COST)
    said: list[str] = []
    report = probe(llama, [batch(), batch(seed=1)], lengths=LENGTHS, eps=1e-2, progress=said.append)
    assert [(head.layer, head.head, head.group) for head in report.heads] == [
        (layer, head, head // 2) for layer in range(2) for head in range(4)
    ]
    assert asked[0]["dims"] == (4, 4) and asked[0]["group"] == 2 and asked[0]["causal"] and len(said) == 2
    assert (report.tokens, report.samples, report.held_out, report.loss, report.trained_length) == (
        96,
        2,
        True,
        True,
        128,
    )
    call = [capture(llama, batch(seed=seed))[1] for seed in (0, 1)]
    assert report.heads[5].bounds["query"] == max(float(c.q[1].abs().max()) for c in call)
    assert report.heads[6].bounds["key"] == max(float(c.k[1].abs().max()) for c in call)
    notes = " ".join(report.notes())
    assert "lengths 1,024, 65,536 are longer than the probed text" in notes and "made for 128 tokens" in notes
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_an_encoder_without_labels_is_probed_with_random_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "calibrate", lambda *dims, **how: COST)
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=zoo.VOCAB, max_position_embeddings=96, **shape))
    ids = torch.randint(3, zoo.VOCAB, (1, 96))
    assert not capture(bert, {"input_ids": ids})[0].causal
    report = probe(bert, [{"input_ids": ids}], lengths=LENGTHS, eps=1e-2)
    assert not report.loss and not report.held_out and "random numbers" in report.notes()[0]


def test_a_sliding_window_is_exact_whatever_its_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    monkeypatch.setattr(module, "calibrate", lambda *dims, **how: COST)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MistralForCausalLM(
        MistralConfig(vocab_size=zoo.VOCAB, num_key_value_heads=1, head_dim=8, sliding_window=32, **shape)
    )
    report = probe(model, [batch()], lengths=LENGTHS, eps=0.5)
    for head in report.heads:
        assert set(head.verdicts.values()) == {"exact"} and "sliding window" in head.reason


def test_bad_input_is_refused_in_one_line_and_the_model_left_as_it_was(llama: Any) -> None:
    before = state_of(llama)
    for settings, said in (
        ({"lengths": (), "eps": 0.1}, "lengths"),
        ({"lengths": (1,), "eps": 0.1}, "lengths"),
        ({"lengths": (64,), "eps": 0.0}, "eps"),
        ({"lengths": (64,), "eps": float("nan")}, "eps"),
    ):
        with pytest.raises(RecipeError, match=said):
            probe(llama, [batch()], **settings)
    fine: dict[str, Any] = {"lengths": (64,), "eps": 0.1}
    for batches, said in (
        ([], "at least one batch"),
        ([{"input_ids": torch.ones(2, 70, dtype=torch.long)}], "one sequence"),
        ([batch(), batch(80)], "differ in length"),
        ([batch(40)], "at least 64 tokens"),
    ):
        with pytest.raises(DataError, match=said):
            probe(llama, batches, **fine)
    with pytest.raises(TargetError, match="registry of attention functions"):
        probe(zoo.build("convnet"), zoo.batches("convnet", count=1, rows=1), **fine)
    llama.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(DataError, match="loss of the probed text is nan"):
        probe(llama, [batch()], **fine)
    with pytest.raises(AttentionError, match=r"layers\.1\.self_attn: queries"):
        probe(llama, [{"input_ids": batch()["input_ids"]}], **fine)
    assert state_of(llama) == before
    from transformers import AttentionInterface

    assert not any("rankloom_capture" in name for name in AttentionInterface._global_mapping)


def head_report(layer: int, bound: float, verdict: str) -> HeadReport:
    given = planted("small", length=64)
    report = probe_head(**given, causal=True, eps=1e-2, lengths=(1024,), cost=COST)
    changes: dict[str, Any] = {
        "bounds": {"query": bound, "key": 0.1, "value": 0.1},
        "verdicts": {1024: verdict},
        "layer": layer,
    }
    return HeadReport(**{**{name: getattr(report, name) for name in report.__dataclass_fields__}, **changes})


def model_report(*heads: HeadReport, eps: float = 1e-2) -> Report:
    return Report(heads, (1024,), eps, "planted", 64, 1, False, False, None, "cpu")


def test_compare_counts_who_crossed() -> None:
    assert threshold(1024) == sqrt(log(1024))
    low, high = 0.9 * threshold(1024), 1.1 * threshold(1024)
    before = model_report(
        head_report(0, low, "polynomial"), head_report(1, high, "exact"), head_report(2, high, "exact")
    )
    after = model_report(head_report(0, high, "exact"), head_report(1, low, "low-rank"), head_report(2, high, "exact"))
    comparison = compare(before, after)
    assert comparison.summary() == {1024: {"rose": 1, "fell": 1, "lost": 1, "gained": 1}}
    assert comparison.changes[0].bound == (low, high) and comparison.changes[0].verdicts == {
        1024: ("polynomial", "exact")
    }
    assert compare(before, before).summary() == {1024: {"rose": 0, "fell": 0, "lost": 0, "gained": 0}}
    for other, said in ((model_report(*after.heads, eps=0.1), "eps"), (model_report(*after.heads[:2]), "models")):
        with pytest.raises(RecipeError, match=said):
            compare(before, other)
    with pytest.raises(RecipeError, match="not the report of a probe"):
        Report.from_dict({"heads": []})


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_figure_is_written(suffix: str, tmp_path: Path) -> None:
    report = model_report(head_report(0, 0.5, "polynomial"), head_report(1, 5.0, "exact"))
    draw(report, tmp_path / f"heads.{suffix}")
    written = (tmp_path / f"heads.{suffix}").read_bytes()
    assert written[:5] in (b"<?xml", b"\x89PNG\r"[:5]) and len(written) > 5000
