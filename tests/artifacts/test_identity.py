"""The fingerprint: the same for one base however it is held, different for every other, and no secret about what differs."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import LoRA
from rankloom.artifacts import fingerprint
from rankloom.errors import FingerprintError
from tests import zoo

METHODS = tuple(rankloom.methods.TABLE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", zoo.MODELS)
def test_attaching_training_and_merging_do_not_change_it(method: str, kind: str) -> None:
    zoo.require_matrix(method)
    model = zoo.build(kind)
    handle = zoo.adapted(method, model, kind)
    carried = handle.trained_whole()
    handle.detach()
    bare = fingerprint(model, carried)
    handle.attach()
    zoo.perturb(handle)
    assert handle.fingerprint() == bare
    handle.merge()
    assert handle.fingerprint() == bare
    handle.detach()
    assert fingerprint(model, carried) == bare


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_same_model_in_another_precision(dtype: torch.dtype) -> None:
    model = zoo.build("llama", dtype=torch.float32)
    digest = fingerprint(model).digest
    assert fingerprint(model.to(dtype)).digest == digest


def test_negative_zero_and_flags_do_not_count() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.zero_()
    digest = fingerprint(model).digest
    with torch.no_grad():
        model.weight.neg_()
    assert fingerprint(model.requires_grad_(False)).digest == digest


def test_a_slightly_tuned_copy_is_another_model() -> None:
    model = zoo.build("llama")
    digest = fingerprint(model).digest
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.003)
    assert fingerprint(model).digest != digest


def test_names_shapes_and_ties_count() -> None:
    base = nn.Sequential(nn.Linear(2, 2))
    digests = {
        fingerprint(base).digest,
        fingerprint(nn.ModuleDict({"other": base[0]})).digest,
        fingerprint(nn.Sequential(base[0], nn.Linear(2, 2))).digest,
        fingerprint(zoo.build("llama", tie_word_embeddings=True)).digest,
        fingerprint(zoo.build("llama")).digest,
    }
    assert len(digests) == 5


def test_quantised_base_has_its_own_and_it_is_stable() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = zoo.build("llama", dtype=torch.float32)
    dense = fingerprint(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    handle = zoo.adapted("lora", model, "llama")
    assert handle.fingerprint().digest == fingerprint(model).digest != dense.digest


def test_empty_and_integer_tensors() -> None:
    model = nn.Module()
    model.empty = nn.Parameter(torch.empty(0, 3))
    model.one = nn.Parameter(torch.ones(()))
    model.whole = nn.Parameter(torch.arange(5), requires_grad=False)
    assert fingerprint(model).digest == fingerprint(model).digest


def test_cheap_at_full_size() -> None:
    model = nn.ModuleList([nn.Linear(1536, 576, bias=False) for _ in range(150)])  # 133M parameters
    begin = time.process_time()
    fingerprint(model)
    assert time.process_time() - begin < 1


def test_a_trained_head_loads_over_another_random_head(tmp_path: object) -> None:
    """A classifier's head is drawn anew in every process: trained whole it is the adapter's; untrained it is the base's."""
    trained = Recipe(targets=Targets(train=("classifier",)), adapter=LoRA(rank=2))
    handle = zoo.adapted(trained, zoo.build("bert"), "bert")
    zoo.perturb(handle)
    folder, inputs = handle.save(f"{tmp_path}/a"), zoo.batch("bert")
    expected = zoo.logits(handle.model, inputs)
    fresh = zoo.build("bert")
    nn.init.normal_(fresh.classifier.weight)
    again = rankloom.load(fresh, folder)
    assert torch.equal(zoo.logits(fresh, inputs), expected)
    again.detach()
    nn.init.normal_(fresh.bert.encoder.layer[0].output.dense.weight)
    with pytest.raises(
        FingerprintError, match=r"1 of \d+ tensors differ \(as bert.encoder.layer.0.output.dense.weight\)"
    ):
        rankloom.load(fresh, folder)


def test_an_untrained_random_head_is_refused_with_the_way_out(tmp_path: object) -> None:
    handle = zoo.adapted(Recipe(adapter=LoRA(rank=2), targets=Targets("query")), zoo.build("bert"), "bert")
    folder, fresh = handle.save(f"{tmp_path}/a"), zoo.build("bert")
    nn.init.normal_(fresh.classifier.weight)
    with pytest.raises(FingerprintError, match=r"\(as classifier.weight\); if it is a new head, train it whole"):
        rankloom.load(fresh, folder)


def test_the_base_is_named_where_it_has_a_name() -> None:
    model = zoo.build("llama")
    model.config._name_or_path = "org/base"
    assert str(fingerprint(model)).startswith("org/base (LlamaForCausalLM, ")
