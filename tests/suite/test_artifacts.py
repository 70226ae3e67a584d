"""The generic suite, on disk and merged: save, load, merge, export and resume of every method of the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from tests import zoo

METHODS = tuple(rankloom.methods.TABLE)
every_method = pytest.mark.parametrize("method", METHODS)
every_model = pytest.mark.parametrize("kind", zoo.MODELS)


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trained(method: str, kind: str = "llama", steps: int = 4) -> rankloom.Adaptation:
    """A handle in the middle of nowhere: some steps, then every tensor moved."""
    handle = zoo.adapted(method, zoo.build(kind), kind)
    zoo.train(handle, handle.optimizer(1e-2, total_steps=steps), zoo.batches(kind), steps)
    zoo.perturb(handle, 0.02)
    return handle


@every_model
@every_method
def test_save_and_load(method: str, kind: str, tmp_path: Path) -> None:
    handle = trained(method, kind)
    handle.save(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter.safetensors", "manifest.json"]
    model = zoo.build(kind)
    base = contents(model)
    loaded = rankloom.load(model, tmp_path / "adapter")
    assert loaded.recipe == handle.recipe
    assert same(loaded.state_dict(), handle.state_dict())
    inputs = zoo.batch(kind)
    assert torch.equal(zoo.logits(loaded.model, inputs), zoo.logits(handle.model, inputs))
    loaded.detach()
    assert same(base, contents(model))


@every_method
def test_a_file_holds_what_the_form_needs_and_a_seed_is_a_seed(method: str, tmp_path: Path) -> None:
    handle = trained(method)
    handle.save(tmp_path / "adapter")
    tensors = handle.state_dict()
    size, needed = (
        (tmp_path / "adapter" / "adapter.safetensors").stat().st_size,
        sum(t.nbytes for t in tensors.values()),
    )
    assert needed <= size <= needed + 200 * len(tensors) + 8  # safetensors' header has a line for each
    learned = handle.named_parameters()
    assert learned.keys() <= tensors.keys()
    for binding in handle.bindings if handle.bindings[0].adapter.seeded else ():
        frozen = {k: v for k, v in binding.adapter.state_dict().items() if f"{binding.name}.{k}" not in learned}
        assert frozen.pop("digest").nbytes == 16
        assert all(v.ndim < 2 for v in frozen.values())  # no projection: what is left are a few numbers of a schedule


@every_method
def test_another_base_is_refused_unless_forced(method: str, tmp_path: Path) -> None:
    trained(method).save(tmp_path / "adapter")
    other = zoo.build("llama", seed=1)
    with pytest.raises(rankloom.errors.FingerprintError):
        rankloom.load(other, tmp_path / "adapter")
    assert not any("rankloom" in m._modules for m in other.modules())
    assert rankloom.load(other, tmp_path / "adapter", force=True).attached
    with pytest.raises(rankloom.RankloomError):
        rankloom.load(zoo.build("gpt2"), tmp_path / "adapter", force=True)


@every_method
def test_a_damaged_file_is_refused_and_the_model_stays_bare(method: str, tmp_path: Path) -> None:
    trained(method).save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter.safetensors"
    data = file.read_bytes()
    for broken in (data[:-3], data[:40], b"", data[:-1] + bytes([data[-1] ^ 1])):
        file.write_bytes(broken)
        model = zoo.build("llama")
        with pytest.raises(rankloom.errors.ArtifactError) as caught:
            rankloom.load(model, tmp_path / "adapter")
        assert "\n" not in str(caught.value)
        assert all(p.requires_grad for p in model.parameters())
        assert not any("rankloom" in m._modules for m in model.modules())


@every_model
@every_method
def test_merge_and_unmerge(method: str, kind: str) -> None:
    zoo.require_matrix(method)
    model, inputs = zoo.build(kind), zoo.batch(kind)
    parameters = [(n, id(p)) for n, p in model.named_parameters()]
    base = contents(model)
    handle = zoo.adapted(method, model, kind)
    zoo.perturb(handle)
    adapted = zoo.logits(model, inputs)
    by_hand = zoo.logits(zoo.merged_copy(handle, zoo.build(kind)), inputs)
    state = {n: t.clone() for n, t in handle.state_dict().items()}
    report = handle.merge(inputs)
    assert not any("rankloom" in m._modules for m in model.modules())
    torch.testing.assert_close(zoo.logits(model, inputs), by_hand, rtol=1e-10, atol=1e-10)
    gap = float((zoo.logits(model, inputs) - adapted).abs().max())
    assert report.drift.max == pytest.approx(gap, abs=1e-12) and gap < 1e-10
    handle.unmerge()
    assert torch.equal(zoo.logits(model, inputs), adapted)
    assert same(state, handle.state_dict())
    handle.detach()
    assert same(base, contents(model)) and [(n, id(p)) for n, p in model.named_parameters()] == parameters


@every_method
def test_half_precision_merge_measures_its_drift(method: str) -> None:
    zoo.require_matrix(method)
    model = zoo.build("llama", dtype=torch.bfloat16)
    handle = zoo.adapted(method, model, "llama")
    zoo.perturb(handle)
    inputs = zoo.batch("llama")
    adapted = zoo.logits(model, inputs).double()
    report = handle.merge(inputs)
    merged = zoo.logits(model, inputs).double()
    assert report.drift.max == pytest.approx(float((merged - adapted).abs().max()), rel=1e-3, abs=1e-6)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    handle.unmerge()
    assert torch.equal(zoo.logits(model, inputs).double(), adapted)


@every_method
def test_tied_weights_survive_merging(method: str) -> None:
    zoo.require_matrix(method)
    model = zoo.build("llama", tie_word_embeddings=True)
    handle = zoo.adapted(method, model, "llama")
    zoo.perturb(handle)
    handle.merge(zoo.batch("llama"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    handle.unmerge()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@every_method
def test_merged_export_is_an_ordinary_model(method: str, tmp_path: Path, capfd: Any) -> None:
    zoo.require_matrix(method)
    from transformers import GPT2LMHeadModel

    handle = trained(method, "gpt2")
    inputs = zoo.batch("gpt2")
    adapted = zoo.logits(handle.model, inputs)
    report = handle.export(tmp_path / "merged", "merged")
    assert report["drift"]["max"] < 1e-10
    assert torch.equal(zoo.logits(handle.model, inputs), adapted)  # the handle is as it was
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(zoo.logits(again, inputs), adapted, rtol=1e-9, atol=1e-9)


@every_method
def test_peft_export_is_exact_or_says_by_how_much_it_is_not(method: str, tmp_path: Path) -> None:
    zoo.require_matrix(method)
    handle = trained(method, "llama")
    report = handle.export(tmp_path / "peft", "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    form = report["form"]
    assert config["peft_type"] == {"dora": "LORA", "bat": "MISS"}.get(form, form.upper())
    back = rankloom.load(zoo.build("llama"), tmp_path / "peft")
    want = {b.name: b.adapter.delta(b.layer).detach() for b in handle.bindings}
    got = {b.name: b.adapter.delta(b.layer).detach() for b in back.bindings}
    live = {n: d for n, d in want.items() if d.any()}  # a target without a live component exports as none
    assert live.keys() <= got.keys()
    gap = sum(float((got[n] - live[n]).square().sum()) for n in live) ** 0.5
    size = sum(float(d.square().sum()) for d in live.values()) ** 0.5
    if report["exact"]:
        assert gap <= 1e-12 * size
        inputs = zoo.batch("llama")
        torch.testing.assert_close(
            zoo.logits(back.model, inputs), zoo.logits(handle.model, inputs), rtol=1e-10, atol=1e-10
        )
    else:  # float32 on disk is not the reason: the file keeps the trainables' own precision
        assert gap / size == pytest.approx(report["relative_error"], rel=1e-6)
        assert report["relative_error"] < 0.15 and report["drift"]["max"] > 0


@every_method
def test_resume_through_the_adapter_on_disk(method: str, tmp_path: Path) -> None:
    """The adapter from its file, schedule and optimizer from theirs: bit for bit the uninterrupted run."""
    data, total = zoo.batches("llama", 3), 8
    straight = zoo.adapted(method, zoo.build("llama"), "llama")
    zoo.train(straight, straight.optimizer(1e-2, total_steps=total), data, total)

    broken = zoo.adapted(method, zoo.build("llama"), "llama")
    optimizer = broken.optimizer(1e-2, total_steps=total)
    zoo.train(broken, optimizer, data, 5)
    broken.save(tmp_path / "adapter")
    torch.save((broken.schedule_state(), optimizer.state_dict()), tmp_path / "state.pt")

    resumed = rankloom.load(zoo.build("llama"), tmp_path / "adapter")
    optimizer = resumed.optimizer(1e-2, total_steps=total)
    schedule, moments = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_schedule_state(schedule)
    optimizer.load_state_dict(moments)
    zoo.train(resumed, optimizer, data, 3, start=5)
    assert same(straight.state_dict(), resumed.state_dict())
