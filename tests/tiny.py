"""Tiny models and data on disk, for tests that go through files, processes and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """Bytes as tokens: every text has an encoding, and nothing has to be trained."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT_TEMPLATE
    return made


def save_llama(folder: Path, *, dropout: float = 0.1) -> Path:
    """A random two-layer Llama; attention dropout on, so that resuming must restore the generators as well."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_reviews(path: Path, rows: int = 48) -> Path:
    """Rows that fit every text task."""
    with path.open("w") as stream:
        for index in range(rows):
            word = ("good", "bad")[index % 2]
            text = f"film {index} was {word}"
            row = {"text": text, "label": word, "prompt": f"{text} ->", "completion": f" {word}"}
            stream.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama and its tokenizer."""
    return save_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 48 rows that have text, label, prompt and completion."""
    return write_reviews(tmp_path_factory.mktemp("tiny-data") / "reviews.jsonl")
