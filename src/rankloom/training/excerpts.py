"""Long sequences of real tokens, to measure a model on: the data's rows one after another, cut to one length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rankloom.errors import DataError
from rankloom.training.collate import Collator
from rankloom.training.data import Rows, load_rows
from rankloom.training.encode import Encoder
from rankloom.training.prepare import encode_split
from rankloom.training.restore import Restored

__all__ = ["excerpts"]


def excerpts(
    restored: Restored, *, tokens: int, samples: int, say: Callable[[str], None]
) -> list[dict[str, torch.Tensor]]:
    """``samples`` batches of one sequence of ``tokens`` tokens each (at most what the model allows for) of the training rows.

    Language models get labels on every token, images their class, so that there is a loss to differentiate; rows joined for a
    text classifier have no class of their own and get none.

    Raises ``DataError`` where the data is not named or too short.
    """
    config, model = restored.config, restored.loaded.model
    if config.data == "none":
        raise DataError("which data? give --data with a name, a file or a hub id")
    if samples < 1 or tokens < 1:
        raise DataError(f"samples={samples} of tokens={tokens}: give at least 1 of each")
    rows = load_rows(config.data, config.task, columns=config.columns, seed=config.seed, say=say)
    if restored.loaded.tokenizer is None:
        rows.labels[:] = restored.labels or rows.labels
        images: Any = encode_split(rows.train, rows, None, restored.loaded, samples, say, "train")
        return [Collator()([images[index]]) for index in range(len(images))]
    most = getattr(model.config, "max_position_embeddings", None) or tokens
    if most < tokens:
        say(f"the model allows for {most} tokens at most: probing {most} instead of {tokens}")
        tokens = int(most)
    stream = _stream(restored.loaded.tokenizer, rows, tokens * samples)
    if len(stream) < tokens * samples:
        raise DataError(
            f"'{config.data}' has {len(stream):,} tokens, too few for {samples} x {tokens:,}: ask for fewer with --samples "
            "and --tokens, or give longer data"
        )
    pieces = [torch.tensor([stream[start : start + tokens]]) for start in range(0, tokens * samples, tokens)]
    labelled = config.task == "causal-lm"
    return [{"input_ids": piece} | ({"labels": piece.clone()} if labelled else {}) for piece in pieces]


def _stream(tokenizer: Any, rows: Rows, wanted: int) -> list[int]:
    encoder = Encoder(tokenizer, max_length=10**9, label_names=rows.labels)
    stream: list[int] = []
    for row in rows.train:
        if len(stream) >= wanted:
            break
        for example in encoder.encode(row, rows.layout):
            stream += example["input_ids"]
    return stream
