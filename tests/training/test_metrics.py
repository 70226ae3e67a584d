"""Metrics against direct computations that share nothing with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rankloom.training.collate import Collator
from rankloom.training.data import load_rows
from rankloom.training.encode import Encoder, encode_rows
from rankloom.training.metrics import choices_of, count_tokens, evaluate
from rankloom.training.models import load_model


@pytest.fixture(scope="module")
def setting(tiny_llama: Path, tiny_reviews: Path) -> Any:
    loaded = load_model(str(tiny_llama))
    rows = load_rows(str(tiny_reviews), "causal-lm")
    encoder = Encoder(loaded.tokenizer, 64)
    return loaded.model.eval(), rows, encoder, encode_rows(rows.train, rows.layout, encoder).examples


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probability of each token but the first, of one unpadded sequence."""
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_loss_is_the_mean_over_labelled_tokens_at_any_batch_size(setting: Any, batch_size: int) -> None:
    model, _, _, examples = setting
    total, count = 0.0, 0
    for example in examples:
        keep = torch.tensor([label != -100 for label in example["labels"][1:]])
        total -= float(logprobs(model, example["input_ids"])[keep].sum())
        count += int(keep.sum())
    figures = evaluate(model, examples, Collator(0), batch_size=batch_size)
    assert figures["tokens"] == count
    assert figures["loss"] == pytest.approx(total / count, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert not model.training


@pytest.mark.parametrize("wanted", [[" good", " bad"], ["g", "b"]])
def test_label_word_accuracy_compares_whole_completions(setting: Any, wanted: list[str]) -> None:
    """Words of several tokens take the long way, one-token words the short one; both must agree with the definition."""
    model, rows, encoder, _ = setting
    named = dict(zip((" good", " bad"), wanted, strict=True))
    examples = []
    right = 0
    for row in rows.train:
        completion = named[row["completion"]]
        (example,) = encoder.encode({"prompt": row["prompt"], "completion": completion}, "prompt-completion")
        examples.append(example)
        prompt = encoder.ids(row["prompt"])
        scores = [float(logprobs(model, prompt + encoder.ids(w))[len(prompt) - 1 :].sum()) for w in wanted]
        right += wanted[scores.index(max(scores))] == completion
    figures = evaluate(model, examples, Collator(0), batch_size=7, choices=[encoder.ids(w) for w in wanted])
    assert figures["accuracy"] == right / len(examples)


def test_choices_are_the_distinct_completions_while_they_are_few(setting: Any) -> None:
    _, rows, encoder, _ = setting
    assert choices_of(rows.train, encoder) == [encoder.ids(" bad"), encoder.ids(" good")]
    assert choices_of({"completion": [str(i) for i in range(50)]}, encoder) is None


def test_class_accuracy_and_loss() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1.0, 3.0]))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.weight.repeat(len(input_ids), 1))

    examples = [{"input_ids": [1] * (i + 1), "labels": int(i > 0)} for i in range(4)]
    figures = evaluate(Fixed(), examples, Collator(0), batch_size=3)
    wrong, good = math.log(1 + math.exp(2)), math.log(1 + math.exp(-2))
    assert figures["accuracy"] == 0.75
    assert figures["loss"] == pytest.approx((wrong + 3 * good) / 4)


def test_tokens_are_counted_without_padding() -> None:
    batch = Collator(0)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [1], "labels": [1]}])
    assert count_tokens(batch) == 4
