"""Rows to token ids and labels; labels are -100 where no loss is wanted.

Truncation, stated once: a plain text longer than ``max_length`` is cut into consecutive pieces and nothing is lost; a
prompt is cut on its *left* so that the completion stays whole; a chat and a text to classify are cut on the right.
Rows that keep no label after that are dropped and counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rankloom.errors import DataError
from rankloom.training.data import Layout

__all__ = ["Encoded", "Encoder", "Example", "Images", "encode_rows"]

Example = dict[str, Any]
_IGNORE = -100


@dataclass
class Encoded:
    """Examples in the order of the rows, and what was lost on the way."""

    examples: list[Example]
    dropped: int = 0
    truncated: int = 0


@dataclass
class Encoder:
    """Turns one row into zero or more examples; one method a layout."""

    tokenizer: Any
    max_length: int
    append_eos: bool = True
    label_names: list[str] = field(default_factory=list)
    truncated: int = 0

    def __post_init__(self) -> None:
        # Some tokenizers open every text with a token of their own; the pieces are joined by hand, so it is kept once.
        opening = self.tokenizer("")["input_ids"]
        bos = self.tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and opening[:1] == [bos] else []
        eos = self.tokenizer.eos_token_id
        self._eos = [eos] if self.append_eos and eos is not None else []

    def ids(self, text: str) -> list[int]:
        """Token ids without any special token added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, row: Example, layout: Layout) -> Iterable[Example]:
        """The examples of one row."""
        return {
            "text": self._text,
            "prompt-completion": self._prompt,
            "messages": self._messages,
            "text-label": self._classify,
        }[layout](row)

    def prompt_ids(self, prompt: str, room: int) -> list[int]:
        """A prompt's ids with its opening token, its left end cut so that ``room`` ids stay free for what follows."""
        ids, space = self.ids(prompt), self.max_length - room - len(self._bos)
        if len(ids) > space:
            self.truncated += 1
            ids = ids[-space:] if space > 0 else []
        return self._bos + ids

    def _text(self, row: Example) -> Iterable[Example]:
        ids = self._bos + self.ids(row["text"]) + self._eos
        for start in range(0, len(ids), self.max_length):
            piece = ids[start : start + self.max_length]
            if len(piece) > 1:  # a single token predicts nothing
                yield {"input_ids": piece, "labels": list(piece)}

    def _prompt(self, row: Example) -> Iterable[Example]:
        completion = self.ids(row["completion"]) + self._eos
        limit = self.max_length - 1 - len(self._bos)
        if len(completion) > limit:
            self.truncated += 1
            completion = completion[:limit]
        prompt = self.prompt_ids(row["prompt"], len(completion))
        if completion and prompt:
            yield {"input_ids": prompt + completion, "labels": [_IGNORE] * len(prompt) + completion}

    def _messages(self, row: Example) -> Iterable[Example]:
        text, spans = self._chat(row["messages"])
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        wanted = [any(start <= a and b <= end and a < b for start, end in spans) for a, b in offsets]
        labels = [token if keep else _IGNORE for token, keep in zip(ids, wanted, strict=True)]
        if len(ids) > self.max_length:
            self.truncated += 1
        yield {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}

    def _chat(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered chat and the character spans of the assistant's turns, end-of-turn mark included.

        A span is what the template adds between "the turns before, asked to answer" and "the turns up to this one", so
        it works with any template that only ever appends; one that rewrites earlier turns is refused.
        """
        render = self._render
        full, spans = render(messages, False), []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before, upto = render(messages[:index], True), render(messages[: index + 1], False)
            if not (full.startswith(upto) and upto.startswith(before)):
                raise DataError(
                    "this tokenizer's chat template rewrites earlier turns, so the assistant's tokens cannot be told "
                    "apart; give prompt and completion columns instead"
                )
            spans.append((len(before), len(upto)))
        return full, spans

    def _render(self, messages: list[dict[str, str]], ask: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "the tokenizer has no chat template for messages; give prompt and completion columns instead"
            )
        rendered: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        return rendered

    def _classify(self, row: Example) -> Iterable[Example]:
        full = self.tokenizer(row["text"], truncation=True, max_length=self.max_length)["input_ids"]
        self.truncated += len(full) == self.max_length
        yield {"input_ids": full, "labels": class_index(row["label"], self.label_names)}


def class_index(label: str, names: list[str]) -> int:
    """The index of a class name among the training rows' classes."""
    if label not in names:
        raise DataError(f"label '{label}' does not occur in the training rows, whose labels are {', '.join(names)}")
    return names.index(label)


def encode_rows(rows: Any, layout: Layout, encoder: Encoder) -> Encoded:
    """Encode every row, drop those without a label, and refuse a dataset of which nothing is left."""
    examples: list[Example] = []
    dropped = 0
    encoder.truncated = 0
    for number, row in enumerate(rows):
        _check_row(row, layout, number)
        kept = [example for example in encoder.encode(row, layout) if _has_label(example)]
        dropped += not kept
        examples += kept
    if not examples:
        raise DataError(
            f"all {dropped} rows lose every label (columns {', '.join(rows.column_names)}, as {layout}): completions "
            f"or assistant turns are empty, or cut off at max_length={encoder.max_length}; raise it or check the data"
        )
    return Encoded(examples, dropped, encoder.truncated)


def _check_row(row: Example, layout: Layout, number: int) -> None:
    for column in ("text",) if layout == "text-label" else tuple(layout.split("-")):
        if row[column] is None:
            raise DataError(f"row {number} has no {column}; remove the row or fill the column")


def _has_label(example: Example) -> bool:
    labels = example["labels"]
    # The first position is never predicted, so a label only there counts as none.
    return isinstance(labels, int) or any(label != _IGNORE for label in labels[1:])


class Images(Dataset[Example]):
    """Image rows, decoded when asked for: a folder of pictures need not fit in memory."""

    def __init__(self, rows: Any, label_names: list[str], size: int, mean: list[float], std: list[float]) -> None:
        self.rows, self.label_names, self.size = rows, label_names, size
        self._mean, self._std = np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[int(index)]
        image = row["image"]
        if image is None:
            raise DataError(f"row {index} has no image; remove the row or fill the column")
        if isinstance(image, str):
            image = _open(image)
        resized = image.convert("RGB").resize((self.size, self.size), resample=3)  # bicubic
        pixels = (np.asarray(resized, dtype=np.float32) / 255.0 - self._mean) / self._std
        label = class_index(row["label"], self.label_names)
        return {"pixel_values": torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), "labels": label}


def _open(path: str) -> Any:
    from PIL import Image

    if not Path(path).is_file():
        raise DataError(f"image file {path} does not exist; paths are read relative to the working folder")
    return Image.open(path)
