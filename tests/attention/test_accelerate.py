"""Accelerated attention inside models: exact to the bit where it must be, within eps where it may not be, and removable."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import methods
from rankloom.attention import accelerate, heads
from rankloom.attention.accelerate import AcceleratedAttention, accelerate_attention
from rankloom.attention.cost import KINDS, CostModel
from rankloom.attention.fitting import Fit
from rankloom.errors import ArtifactError, AttentionError
from tests import zoo

LENGTH = 96
EPS = 1e-2
# Wider factors are slower, all kinds alike, and those of up to 2.7 features a token faster than exact attention.
CHEAP = CostModel((0.0, 2.7e-3), dict.fromkeys(KINDS, ((1, 0.0, 1e-3), (10_000, 0.0, 10.0))))


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal attention is exact inside a chunk: with the usual ones nothing here would be approximate."""
    monkeypatch.setattr("rankloom.attention.factored.default_chunk", lambda *_, **__: 32)


def llama(small: tuple[int, ...] = (0, 1), dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """A Llama with 2 key heads of 4 dimensions; those in ``small`` get queries and keys of small norm, the others large."""
    model = zoo.build("llama", dtype=dtype, max_position_embeddings=2 * LENGTH, **changes)
    for layer in model.model.layers:
        for head in (0, 1):
            size = 0.3 if head in small else 30.0
            layer.self_attn.k_proj.weight.data[4 * head : 4 * head + 4] *= size
            layer.self_attn.q_proj.weight.data[8 * head : 8 * head + 8] *= size
    return model.train()


def bert(dtype: torch.dtype = torch.float64) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=zoo.VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=2 * LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        num_labels=3,
    )
    model = BertForSequenceClassification(config)
    for layer in model.bert.encoder.layer:
        for part in (layer.attention.self.query, layer.attention.self.key):
            part.weight.data *= 0.4
    return model.to(dtype).train()


def tokens(rows: int = 2, seed: int = 0, length: int = LENGTH) -> dict[str, Tensor]:
    ids = torch.randint(3, zoo.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def accelerated(model: nn.Module, **changes: Any) -> AcceleratedAttention:
    """With a budget that lets every head be measured at once."""
    return accelerate_attention(model, **{"eps": EPS, "min_length": 16, "cost": CHEAP, "budget": 1e9, **changes})


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return {"loss": out.loss.detach(), "logits": out.logits.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The worst relative error; of gradients that vanish (a key bias has none) relative to the largest."""
    norms = {key: float(value.norm()) for key, value in wanted.items()}
    least = 1e-3 * max(norms.values())
    return max(float((got[key] - wanted[key]).norm()) / max(norms[key], least) for key in wanted)


def measured(handle: AcceleratedAttention, batch: dict[str, Tensor]) -> None:
    """Let the first step measure and its fits come into force, without moving a weight."""
    gradients(handle.model, batch)
    handle.stepped()


def kinds(handle: AcceleratedAttention) -> set[str]:
    """What ran, without the sizes of the factors."""
    return {what.split()[0] for what in handle.totals}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("build", [llama, bert])
def test_first_step_is_exact_and_the_next_within_eps(build: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    batch = tokens()
    batch["labels"] = batch["labels"] if build is llama else torch.tensor([0, 2])
    wanted = gradients(model, batch)
    with accelerated(model) as handle:
        assert same(gradients(model, batch), wanted)
        assert kinds(handle) == {"not"}
        handle.stepped()
        got = gradients(model, batch)
        assert 0 < error(got, wanted) < 3 * EPS
        assert any(what.startswith(KINDS) for what in handle.totals)
        assert all(head["error"] <= EPS for head in handle.report()["heads"])
    assert same(gradients(model, batch), wanted)


def test_heads_above_the_threshold_stay_exact_beside_accelerated_ones() -> None:
    model, batch = llama(small=(1,)), tokens()
    seen: list[Tensor] = []
    with accelerated(model) as handle:
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda _m, args: seen.append(args[0].clone())
        )
        measured(handle, batch)
        gradients(model, batch)
        hook.remove()
        exact, mixed = seen
        assert torch.equal(exact[..., :8], mixed[..., :8])
        assert not torch.equal(exact[..., 8:], mixed[..., 8:])
        torch.testing.assert_close(exact, mixed, rtol=0, atol=EPS)
        by_head = {(h["layer"], h["head"]): h["choice"] for h in handle.report()["heads"]}
        assert by_head["model.layers.0.self_attn", 0] == "certificate"
        assert handle.log["model.layers.0.self_attn"]["certificate"] == 1
    assert "1 of 2" in handle.summary() or "2 of 4" in handle.summary()


def test_a_model_of_large_norms_never_changes_a_bit() -> None:
    model, batch = llama(small=()), tokens()
    wanted = gradients(model, batch)
    with accelerated(model) as handle:
        measured(handle, batch)
        assert same(gradients(model, batch), wanted)
        assert set(handle.totals) == {"not measured yet", "certificate"}


def test_removal_leaves_no_trace() -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = llama()
    before = (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS), len(_global_optimizer_post_hooks))
    handle = accelerated(model)
    assert model.config._attn_implementation != "sdpa"
    handle.remove()
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert before == (
        set(ALL_ATTENTION_FUNCTIONS),
        set(ALL_MASK_ATTENTION_FUNCTIONS),
        len(_global_optimizer_post_hooks),
    )


def padded(side: str) -> dict[str, Tensor]:
    batch = tokens()
    mask = torch.ones_like(batch["input_ids"])
    mask[1, slice(70, None) if side == "right" else slice(0, 26)] = 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("build", [llama, bert])
def test_padding_is_accelerated(build: Callable[..., nn.Module], side: str) -> None:
    model, batch = build(), padded(side)
    if build is bert:
        batch["labels"] = torch.tensor([0, 2])
        batch["attention_mask"][:, 0] = 1 if side == "right" else batch["attention_mask"][:, 0]
    wanted = gradients(model, batch)
    with accelerated(model) as handle:
        measured(handle, batch)
        got = gradients(model, batch)
        assert "mask" not in handle.totals and kinds(handle) != {"not"}
    if build is llama:
        here = batch["attention_mask"].bool()
        got, wanted = ({**each, "logits": each["logits"][here]} for each in (got, wanted))
        assert 0 < error(got, wanted) < 3 * EPS
    else:
        assert 0 < float((got["logits"] - wanted["logits"])[0].norm()) < 3 * EPS * float(wanted["logits"][0].norm())


def packed(model: nn.Module) -> dict[str, Tensor]:
    model.config.use_cache = False
    return {**tokens(), "position_ids": (torch.arange(LENGTH) % 50)[None].expand(2, -1)}


def custom_mask(_model: nn.Module) -> dict[str, Tensor]:
    return {**tokens(), "attention_mask": torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.float64).tril().log()}


@pytest.mark.parametrize(
    ("reason", "settings", "given"),
    [
        ("dropout", {"attention_dropout": 0.1}, None),
        ("short", {}, lambda _: tokens(length=12)),
        ("mask", {}, packed),
    ],
)
def test_what_cannot_be_approximated_is_bitwise_exact(reason: str, settings: dict[str, Any], given: Any) -> None:
    model = llama(**settings)
    batch = given(model) if given else tokens()
    torch.manual_seed(1)
    wanted = gradients(model, batch)
    with accelerated(model) as handle:
        measured(handle, tokens())
        torch.manual_seed(1)
        assert same(gradients(model, batch), wanted)
        assert handle.totals[reason] >= 4


def test_additive_causal_masks_are_understood() -> None:
    model = llama()
    batch = custom_mask(model)
    wanted = gradients(model, batch)
    with accelerated(model) as handle:
        measured(handle, batch)
        assert 0 < error(gradients(model, batch), wanted) < 3 * EPS
        assert "mask" not in handle.totals


def test_evaluation_and_generation_are_exact_unless_asked_for() -> None:
    model, batch = llama(), tokens(rows=1)
    ids = batch["input_ids"]
    model.eval()
    wanted, text = model(ids).logits.detach(), model.generate(ids, max_new_tokens=4, do_sample=False)
    with accelerated(model) as handle:
        measured_in_training(handle, batch)
        assert torch.equal(model(ids).logits, wanted)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), text)
        assert handle.totals["evaluation"] > 0
    with accelerated(model, evaluate=True) as handle:
        measured_in_training(handle, batch)
        got = model(ids).logits.detach()
        assert 0 < float((got - wanted).norm() / wanted.norm()) < EPS
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert handle.totals["cache"] == 2 * 2 * 2


def measured_in_training(handle: AcceleratedAttention, batch: dict[str, Tensor]) -> None:
    handle.model.train()
    measured(handle, batch)
    gradients(handle.model, batch)
    handle.model.eval()


@pytest.mark.parametrize(
    ("reason", "kwargs"),
    [
        ("softcap", {"softcap": 30.0}),
        ("attention bias", {"position_bias": torch.zeros(1, 4, LENGTH, LENGTH)}),
        ("sliding window", {"sliding_window": LENGTH}),
        ("argument s_aux", {"s_aux": torch.zeros(4)}),
        ("cache", {}),
        ("mask", {}),
    ],
)
def test_reasons_of_a_single_call(monkeypatch: pytest.MonkeyPatch, reason: str, kwargs: dict[str, Any]) -> None:
    """What tiny models do not pass is passed by hand; the model's own function is called with exactly that."""
    model = llama()
    module = model.model.layers[0].self_attn
    q, k, v = torch.randn(1, 4, LENGTH, 4), torch.randn(1, 2, LENGTH, 4), torch.randn(1, 2, LENGTH, 4)
    mask: Any = "a mask of blocks" if reason == "mask" else None
    q = q[:, :, -1:] if reason == "cache" else q
    calls: list[tuple[Any, ...]] = []
    with accelerated(model) as handle:
        monkeypatch.setattr(handle._replaced, "exact", lambda *args, **named: calls.append((args, named)) or (q, None))
        handle._attend(module, q, k, v, mask, dropout=0.0, scaling=0.5, **kwargs)
        assert handle.log["model.layers.0.self_attn"] == {reason: 2}
    ((args, named),) = calls
    assert args[0] is module and args[1] is q and args[2] is k and args[3] is v and args[4] is mask
    assert named == {"dropout": 0.0, "scaling": 0.5, **kwargs}


def test_a_denominator_that_is_not_positive_falls_back_and_drops_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankloom.attention.factored import Factored

    model, batch = llama(), tokens()
    wanted = gradients(model, batch)
    with accelerated(model) as handle:
        measured(handle, batch)
        gradients(model, batch)  # accelerated
        whole = Factored.__call__
        with monkeypatch.context() as patch:
            patch.setattr(Factored, "__call__", lambda *args: (lambda out, den: (out, den - den.max()))(*whole(*args)))
            assert same(gradients(model, batch), wanted)
        assert handle.totals["denominator"] == 4
        gradients(model, batch)  # the same step still: what is in force does not change
        assert handle.totals["denominator"] == 4
        handle.stepped()
        assert same(gradients(model, batch), wanted)
        assert handle.totals["denominator"] == 8


@pytest.mark.parametrize(("reentrant", "together"), [(False, False), (False, True), (True, False)])
def test_checkpointing_decides_as_the_first_pass_did(reentrant: bool, together: bool) -> None:
    """Bit for bit, over measuring steps and those after them, for micro-batches one after another and in one backward pass."""

    def run(checkpointed: bool) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        model = llama(small=(1,))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with accelerated(model, refresh=2) as handle:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            results = []
            for step in range(4):
                model.zero_grad()
                losses = []
                for micro in (0, 1):
                    losses.append(model(**tokens(seed=10 * step + micro)).loss)
                    if not together:
                        losses.pop().backward()
                if together:
                    sum(losses).backward()
                results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
                optimizer.step()
            assert [head["due"] for head in handle.report()["heads"]] == [8, 4, 8, 4]  # those that fail back off
            return results, handle.report()

    plain, report = run(False)
    again, other = run(True)
    assert all(same(a, b) for a, b in zip(plain, again, strict=True))
    assert report["ran"] == other["ran"] and report["ran"]["certificate"] == 3 * 2 * 2
    if not together:  # which micro-batch comes back first, and is measured, is autograd's choice
        errors = [[head.pop("error") for head in each["heads"]] for each in (report, other)]
        assert report == other
        assert errors[0] == pytest.approx(errors[1], rel=1e-9)  # products of recomputed tensors may round otherwise


def test_autocast_and_half_precision() -> None:
    model, batch = llama(dtype=torch.float32), tokens()
    for cast in (False, True):
        if cast:
            model = llama(dtype=torch.bfloat16)
        with accelerated(model) as handle, torch.autocast("cpu", torch.bfloat16, enabled=not cast):
            out = model(**batch)
            out.loss.backward()
            wanted = out.logits.detach()
            handle.stepped()
            out = model(**batch)
        out.loss.backward()
        assert any(what.startswith(KINDS) for what in handle.totals)
        got = out.logits.detach()
        assert got.dtype == wanted.dtype
        assert float((got - wanted).norm() / wanted.norm()) < 2e-2
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_no_token_sees_its_future() -> None:
    model, batch = llama(), tokens(rows=1)
    changed = {key: value.clone() for key, value in batch.items()}
    changed["input_ids"][:, 60:] = tokens(rows=1, seed=5)["input_ids"][:, 60:]
    with accelerated(model, refresh=1) as handle:  # every step measures
        measured(handle, tokens(seed=9))
        a, b = model(**batch).logits.detach(), model(**changed).logits.detach()
        assert any(what.startswith(KINDS) for what in handle.totals)
    torch.testing.assert_close(a[:, :60], b[:, :60], rtol=0, atol=1e-12)
    assert float((a[:, 60:] - b[:, 60:]).abs().max()) > 1e-3


def test_refresh_follows_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = llama(), tokens()
    at: list[int] = []
    real = heads.fit
    monkeypatch.setattr(heads, "fit", lambda *args, **named: at.append(handle.steps) or real(*args, **named))
    with accelerated(model, refresh=3) as handle:
        optimizer = torch.optim.SGD([model.lm_head.weight], lr=1e-3)
        stranger = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        for _ in range(8):
            for _ in range(2):
                gradients(model, batch)
            stranger.step()
            model.eval()
            model(**batch)
            model.train()
            optimizer.step()
    assert at == [0] * 4 + [3] * 4 + [6] * 4
    assert handle.steps == 7


def test_a_gradient_that_is_not_finite_is_no_measurement() -> None:
    model, batch = llama(), tokens()
    with accelerated(model) as handle:
        (model(**batch).loss * float("nan")).backward()
        handle.stepped()
        gradients(model, batch)
        assert set(handle.totals) == {"not measured yet"}
        handle.stepped()
        gradients(model, batch)
        assert len(handle.totals) > 1


def test_layers_without_a_gradient_are_measured_by_their_output() -> None:
    model, batch = llama(), tokens()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head"))
    wanted = gradients(model, batch)["logits"]
    with accelerated(model) as handle:
        measured(handle, batch)
        got = gradients(model, batch)["logits"]
    assert 0 < float((got - wanted).norm() / wanted.norm()) < EPS


@pytest.mark.parametrize("budget", [1e9, 20.0])
def test_continues_to_the_same_bits_from_its_state(budget: float) -> None:
    """Saved in the middle of a back-off (and, with the smaller budget, of a queue) that ends after the resumption."""

    def start() -> tuple[nn.Module, AcceleratedAttention, torch.optim.Optimizer]:
        model = llama(small=(1,), dtype=torch.float32)
        handle = accelerated(model, refresh=2, budget=budget)
        return model, handle, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, handle, optimizer = start()
    other, resumed, later = start()
    with handle, resumed:
        for step in range(10):
            if step == 3:  # a step after a measurement that is not in force yet
                queue = handle.report()["heads"]
                assert {"back-off"} <= {head["put_off"] for head in queue} <= {"", "back-off", "budget"}
                backed_off = sum(head["measurements"] for head in queue if head["put_off"])
                buffer = io.BytesIO()
                torch.save({"a": handle.state_dict(), "m": model.state_dict(), "o": optimizer.state_dict()}, buffer)
                buffer.seek(0)
                state = torch.load(buffer, weights_only=True)
                other.load_state_dict(state["m"])
                later.load_state_dict(state["o"])
                resumed.load_state_dict(state["a"])
            for each, stepper in ((model, optimizer), (other, later)):
                if each is model or step >= 3:
                    gradients(each, tokens(seed=step))
                    stepper.step()
        assert same(dict(model.state_dict()), dict(other.state_dict()))
        assert handle.report() == resumed.report()
        assert {"certificate"} < set(handle.totals)
        assert sum(head["measurements"] for head in handle.report()["heads"] if head["head"] == 0) > backed_off


def test_a_state_without_an_account_is_refused() -> None:
    with accelerated(llama()) as handle, pytest.raises(ArtifactError, match="before measurements had a budget"):
        handle.load_state_dict({"steps": 1, "stepped": False, "layers": {}, "costs": [], "log": {}})


def test_measurements_wait_for_the_budget_and_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lent to heads of large norms; each is measured once 1.6 times exact attention's time has paid for it."""
    at: list[int] = []
    real = heads.fit
    model, batch = llama(small=()), tokens()
    with accelerated(model, budget=1.6) as handle:
        monkeypatch.setattr(heads, "fit", lambda *args, **named: at.append(handle.steps) or real(*args, **named))
        wanted = gradients(model, batch)
        for _ in range(7):
            handle.stepped()
            assert same(gradients(model, batch), wanted)
            account = handle.report()["budget"]
            assert account["spent"] <= 1.6 * account["exact"]
        queue = handle.report()["heads"]
        assert 1 < len(at) == len(set(at)) and at[0] > 1  # one by one
        assert {"not measured yet", "put off: budget", "certificate"} == set(handle.totals)
        assert {head["put_off"] for head in queue} == {"back-off", "budget"}
        assert "measurements put off" in handle.summary() and "(budget)" in handle.summary()
        assert {(head["layer"], head["measurements"]) for head in queue if head["head"] == 0} == {
            ("model.layers.0.self_attn", 1),
            ("model.layers.1.self_attn", 1),
        }


def test_promising_heads_are_measured_in_advance_until_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = tokens()
    with accelerated(llama(small=(1,)), budget=0.0, refresh=200) as handle:
        measured(handle, batch)
        gradients(handle.model, batch)
        report = handle.report()
        assert [head["measurements"] for head in report["heads"]] == [0, 1, 0, 1]
        assert [head["accelerated"] for head in report["heads"]] == [False, True, False, True]
        assert report["budget"]["trusted"] and report["budget"]["saved"] > 0
    with accelerated(llama(small=(1,)), budget=0.0, refresh=200, total_steps=2) as handle:
        measured(handle, batch)
        assert {head["put_off"] for head in handle.report()["heads"]} == {"budget"}  # too few steps to win it back
    monkeypatch.setattr(heads, "fit", lambda *_, **__: Fit("certificate", error=0.5))
    with accelerated(llama(), budget=0.0, refresh=200) as handle:
        measured(handle, batch)
        assert sum(head["measurements"] for head in handle.report()["heads"]) == 1
        assert not handle.report()["budget"]["trusted"]


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "adalora", "lora-one", "galore"])
def test_composes_with_recipes(method: str) -> None:
    """Attention functions do not know of adapters: a training run close to the exact one, and a model left as it was."""
    results = []
    for limits in (False, True):
        model = llama(dtype=torch.float32)
        recipe = zoo.tiny(methods.get(method))
        calibration = rankloom.Calibration([tokens(seed=3)])
        adaptation = rankloom.adapt(model, recipe, calibration=calibration)
        optimizer = adaptation.optimizer(lr=1e-3, total_steps=4)
        handle = accelerated(model) if limits else None
        for step in range(4):
            model.train()
            loss = model(**tokens(seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(float(loss.detach()))
        if handle is not None:
            handle.remove()
            assert any(what.startswith(KINDS) for what in handle.totals)
            assert handle.steps == 3
    assert abs(results[1] - results[0]) < 1e-2 * results[0]


def test_errors_name_the_fix() -> None:
    for eps in (0.0, -1.0, float("nan"), 1.0):
        with pytest.raises(AttentionError, match="eps is a relative error between 0 and 1"):
            accelerate_attention(llama(), eps)
    for name in ("refresh", "hysteresis", "min_length", "total_steps"):
        with pytest.raises(AttentionError, match=f"{name} must be at least 1, got 0"):
            accelerate_attention(llama(), **{name: 0})
    for budget in (-0.1, float("inf"), float("nan")):
        with pytest.raises(AttentionError, match="budget is a share of exact attention's time"):
            accelerate_attention(llama(), budget=budget)
    with pytest.raises(AttentionError, match="does not attend through transformers' AttentionInterface"):
        accelerate_attention(zoo.ConvNet())
    model = llama()
    with accelerated(model), pytest.raises(AttentionError, match="accelerated already"):
        accelerated(model)
    model.set_attn_implementation("eager")
    with pytest.raises(AttentionError, match=r"set_attn_implementation\('sdpa'\)"):
        accelerated(model)


def test_nan_is_an_error_whether_measured_or_accelerated() -> None:
    model, batch = llama(), tokens()
    weight = model.model.layers[1].self_attn.q_proj.weight
    with accelerated(model) as handle:
        measured(handle, batch)
        gradients(model, batch)
        weight.data[0] = float("nan")
        with pytest.raises(AttentionError, match=r"model.layers.1.self_attn hold NaN or infinity"):
            model(**batch)
    with accelerated(model), pytest.raises(AttentionError, match=r"model.layers.1.self_attn hold NaN or infinity"):
        model(**batch)
    assert model(**batch).loss.isnan()


def test_keys_get_no_gradient_in_common() -> None:
    """A key bias has none, as softmax does not see it: the approximation must not invent one."""
    model, batch = bert(), {**tokens(), "labels": torch.tensor([0, 2])}
    with accelerated(model) as handle:
        measured(handle, batch)
        got = gradients(model, batch)
        assert kinds(handle) != {"not"}
    for name in got:
        if name.endswith("key.bias"):
            assert float(got[name].norm()) < 1e-12 * float(got[name.replace("bias", "weight")].norm())


def test_calibrates_once_a_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(accelerate, "calibrate", lambda *args, **named: asked.append((args, named["causal"])) or CHEAP)
    model, batch = llama(), tokens()
    with accelerated(model, cost=None) as handle:
        measured(handle, batch)
        gradients(model, batch)
        assert asked == [((4, 4), True)]
        assert len(handle.totals) > 1


def test_break_even_keeps_shorter_sequences_exact() -> None:
    model, batch, shorter = llama(), tokens(), tokens(length=40)
    lines = dict.fromkeys(KINDS, ((1, 50.0, 1e-3), (10_000, 50.0, 1e-3)))
    wanted = gradients(model, shorter)
    with accelerated(model, cost=CostModel((0.0, 1e-2), lines)) as handle:  # 50 s against L^2 / 110: from 74 tokens on
        measured(handle, batch)
        assert same(gradients(model, shorter), wanted)
        assert handle.totals["break-even"] == 4
        assert 74 < next(iter(handle._layers[model.model.layers[0].self_attn].fits.values())).length < 75
