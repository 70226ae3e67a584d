"""What a model scores on held-out examples: loss and perplexity, class accuracy, label-word accuracy.

Losses are means over labelled tokens (or examples, for a classifier), never means of batch means, so they do not
depend on the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rankloom.training.encode import Encoder, Example

__all__ = ["choices_of", "count_tokens", "evaluate", "token_logprobs"]

Collate = Callable[[list[Example]], dict[str, torch.Tensor]]
_IGNORE = -100
# Beyond a handful of distinct completions the data is not a classification in words, and scoring all is costly.
_MOST_CHOICES = 16


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    collate: Collate,
    *,
    batch_size: int = 16,
    choices: list[list[int]] | None = None,
) -> dict[str, float]:
    """Score ``examples``; ``choices`` are the token ids of candidate completions, when there are few of them.

    Returns:
        ``loss``, with ``perplexity`` and ``tokens`` for language models and ``accuracy`` and ``examples`` for
        classifiers and for label words.
    """
    with _inference(model), torch.no_grad():
        if isinstance(examples[0]["labels"], int):
            return _classes(model, examples, collate, batch_size)
        return _language(model, examples, collate, batch_size, choices)


def count_tokens(batch: dict[str, Any]) -> int:
    """Tokens that a batch makes the model process, padding left out; images count one each."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return int(batch["input_ids"].numel()) if "input_ids" in batch else len(batch["labels"])


def token_logprobs(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each example's summed log-probability of its labelled tokens, and their number; both ``(batch,)``, float64."""
    targets = labels[:, 1:]
    keep = targets != _IGNORE
    # Only labelled positions are normalised: with prompts masked that is a small part of (batch, length, vocabulary).
    scores = torch.log_softmax(logits[:, :-1][keep].float(), dim=-1)
    picked = scores.gather(-1, targets[keep].unsqueeze(-1)).squeeze(-1).double()
    rows = keep.nonzero()[:, 0]
    sums = torch.zeros(len(labels), dtype=torch.float64, device=logits.device).index_add_(0, rows, picked)
    return sums, keep.sum(dim=1)


def choices_of(rows: Any, encoder: Encoder) -> list[list[int]] | None:
    """Token ids of the distinct completions when there are few enough to choose among, else ``None``."""
    words = sorted(set(rows["completion"]))
    return [encoder.ids(word) for word in words] if 2 <= len(words) <= _MOST_CHOICES else None


def _language(
    model: nn.Module, examples: Sequence[Example], collate: Collate, batch_size: int, choices: list[list[int]] | None
) -> dict[str, float]:
    total, tokens, right = 0.0, 0, 0
    for chunk in _by_length(examples, batch_size):
        batch = _to_device(collate(chunk), model)
        logits = model(**_inputs(batch)).logits
        sums, counts = token_logprobs(logits, batch["labels"])
        total, tokens = total - float(sums.sum()), tokens + int(counts.sum())
        if choices:
            right += _right_choices(model, chunk, collate, choices, logits)
    loss = total / max(tokens, 1)
    result: dict[str, float] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
    if choices:
        result |= {"accuracy": right / len(examples), "examples": len(examples)}
    return result


def _right_choices(
    model: nn.Module, chunk: list[Example], collate: Collate, choices: list[list[int]], logits: torch.Tensor
) -> int:
    """How many examples give their own completion the highest log-probability of all choices."""
    starts = [_prompt_length(example) for example in chunk]
    if all(len(choice) == 1 for choice in choices):
        # The logits that follow the prompt already score every one-token choice.
        rows = torch.arange(len(chunk), device=logits.device)
        after = logits[rows, torch.tensor(starts, device=logits.device) - 1].float()
        scores = after[:, torch.tensor([choice[0] for choice in choices], device=logits.device)]
    else:
        columns = []
        for choice in choices:
            candidates = [_with_completion(e, start, choice) for e, start in zip(chunk, starts, strict=True)]
            batch = _to_device(collate(candidates), model)
            columns.append(token_logprobs(model(**_inputs(batch)).logits, batch["labels"])[0])
        scores = torch.stack(columns, dim=1)
    best = scores.argmax(dim=1).tolist()
    return sum(_starts_with(e["input_ids"][s:], choices[b]) for e, s, b in zip(chunk, starts, best, strict=True))


def _classes(model: nn.Module, examples: Sequence[Example], collate: Collate, batch_size: int) -> dict[str, float]:
    total, right = 0.0, 0
    chunks = _by_length(examples, batch_size) if isinstance(examples, list) else _in_order(examples, batch_size)
    for chunk in chunks:
        batch = _to_device(collate(chunk), model)
        logits = model(**_inputs(batch)).logits.float()
        total += float(nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
        right += int((logits.argmax(dim=-1) == batch["labels"]).sum())
    count = len(examples)
    return {"loss": total / count, "accuracy": right / count, "examples": count}


def _inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


def _with_completion(example: Example, start: int, choice: list[int]) -> Example:
    return {"input_ids": example["input_ids"][:start] + choice, "labels": [_IGNORE] * start + choice}


def _prompt_length(example: Example) -> int:
    return next(index for index, label in enumerate(example["labels"]) if label != _IGNORE)


def _starts_with(completion: list[int], choice: list[int]) -> bool:
    return completion[: len(choice)] == choice


def _by_length(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Batches of similar length: the order does not matter for a sum, and padding costs as much as tokens."""
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def _in_order(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    return (
        [examples[i] for i in range(start, min(start + size, len(examples)))] for start in range(0, len(examples), size)
    )


def _to_device(batch: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    parameter = next(model.parameters())
    moved = {key: value.to(parameter.device) for key, value in batch.items()}
    if "pixel_values" in moved:
        moved["pixel_values"] = moved["pixel_values"].to(parameter.dtype)
    return moved


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
