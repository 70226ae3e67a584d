"""Examples to padded batches, and documents packed without seeing one another."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from rankloom.errors import DataError
from rankloom.training.encode import Example

__all__ = ["Collator", "check_packing", "pack"]


@dataclass(frozen=True)
class Collator:
    """Pad to the longest example of the batch, on the right; labels are padded with -100.

    With ``packed`` the examples carry ``position_ids`` that start again at zero with every document and the batch has
    *no* attention mask: from exactly that combination transformers builds a block-diagonal causal mask, so packed
    documents do not attend to one another. Padding is then one more document, without labels.
    """

    pad_id: int = 0
    packed: bool = False

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Stack ``examples`` into one batch."""
        if "pixel_values" in examples[0]:
            return {
                "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
                "labels": torch.tensor([example["labels"] for example in examples]),
            }
        width = max(len(example["input_ids"]) for example in examples)
        batch = {"input_ids": self._pad(examples, "input_ids", width, self.pad_id)}
        if self.packed:
            batch["position_ids"] = torch.tensor(
                [e["position_ids"] + list(range(width - len(e["position_ids"]))) for e in examples]
            )
        else:
            lengths = torch.tensor([[len(example["input_ids"])] for example in examples])
            batch["attention_mask"] = (torch.arange(width)[None, :] < lengths).long()
        if isinstance(examples[0]["labels"], int):
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        else:
            batch["labels"] = self._pad(examples, "labels", width, -100)
        return batch

    @staticmethod
    def _pad(examples: list[Example], key: str, width: int, fill: int) -> torch.Tensor:
        return torch.tensor([e[key] + [fill] * (width - len(e[key])) for e in examples])


def pack(examples: list[Example], max_length: int, seed: int, open_bins: int = 32) -> list[Example]:
    """Fill sequences of ``max_length`` with whole documents, first fit over the last ``open_bins``, in seeded order.

    The first label of each document is masked: it would be predicted from the last token of the document before.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    full: list[Example] = []
    bins: list[Example] = []
    for index in order:
        example = examples[index]
        size = len(example["input_ids"])
        target = next((b for b in bins if len(b["input_ids"]) + size <= max_length), None)
        if target is None:
            target = {"input_ids": [], "labels": [], "position_ids": []}
            bins.append(target)
            if len(bins) > open_bins:
                full.append(bins.pop(0))
        target["input_ids"] += example["input_ids"]
        target["labels"] += [-100] + example["labels"][1:]
        target["position_ids"] += list(range(size))
    return full + bins


@torch.no_grad()
def check_packing(model: Any, vocabulary: int) -> None:
    """Refuse to pack for a model whose packed documents see one another: changing one must not move the next.

    Whether a model builds its mask from positions depends on its architecture and attention implementation, and
    nothing fails when it does not; so it is measured, on two documents of four tokens.
    """
    device = next(model.parameters()).device
    documents = torch.arange(1, 9, device=device).remainder(vocabulary)[None]
    changed = documents.clone()
    changed[0, :4] = changed[0, :4].flip(0)
    positions = torch.arange(4, device=device).repeat(2)[None]
    training = model.training
    model.eval()
    first, second = (
        model(input_ids=ids, position_ids=positions, use_cache=False).logits for ids in (documents, changed)
    )
    model.train(training)
    if not torch.equal(first[0, 4:], second[0, 4:]):
        raise DataError("packing=true: this model lets packed documents see one another; set packing=false")
