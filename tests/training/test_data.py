"""Rows, their layouts, what is masked, what is cut, and every way data can be wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rankloom.errors import DataError
from rankloom.training.collate import Collator, check_packing, pack
from rankloom.training.data import load_rows
from rankloom.training.encode import Encoder, Example, Images, encode_rows
from tests import tiny


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tiny.tokenizer(), max_length=24)


def words(encoder: Encoder, example: Example) -> str:
    """The labelled part of an example as text."""
    return str(encoder.tokenizer.decode([label for label in example["labels"] if label != -100]))


def one(encoder: Encoder, layout: Any, row: dict[str, Any]) -> Example:
    (example,) = encoder.encode(row, layout)
    return example


# Loading


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "json"])
def test_every_file_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"text {i}, with a comma", "label": ("no", "yes")[i % 2]} for i in range(10)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        jsonl(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["text", "label"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    loaded = load_rows(str(path), "sequence-classification", validation_fraction=0.2)
    assert (len(loaded.train), len(loaded.validation), loaded.test) == (8, 2, None)
    assert loaded.labels == ["no", "yes"]
    found = sorted([*loaded.train["text"], *loaded.validation["text"]])
    assert found == sorted(row["text"] for row in rows)


def test_a_folder_with_splits(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("validation", 3), ("test", 2)):
        jsonl(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(count)])
    rows = load_rows(str(tmp_path), "causal-lm")
    assert [len(split) for split in (rows.train, rows.validation, rows.test)] == [5, 3, 2]
    assert rows.layout == "text"


def test_the_hold_out_is_by_seed(tiny_reviews: Path) -> None:
    held = [set(load_rows(str(tiny_reviews), "causal-lm", seed=seed).validation["text"]) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]


def test_integer_labels_and_class_names_keep_their_meaning(tmp_path: Path) -> None:
    # Names that look like the other's index: the order must come from the data, not from how a name reads.
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "x", "label": (10, 9)[i % 2]} for i in range(6)])
    rows = load_rows(path, "sequence-classification", validation_fraction=0.3)
    assert rows.labels == ["9", "10"]
    assert set(rows.train["label"]) == {"9", "10"}


def test_columns_may_be_named_as_the_user_likes(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"review": "x", "stars": i % 2, "text": 5} for i in range(6)])
    rows = load_rows(path, "sequence-classification", columns={"text": "review", "label": "stars"})
    assert rows.train["text"][0] == "x"
    with pytest.raises(DataError, match=r"'reviews'.*did you mean review"):
        load_rows(path, "sequence-classification", columns={"text": "reviews"})


def test_named_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = load_rows("pydoc-topics", "causal-lm")
    assert len(rows.train) > 50 and rows.layout == "text"
    from rankloom.training import data

    lines = "1\t2.5\tLovely: a gem.\r\n2\t-0.6\tDull.\r\n3\t0.4\tUnclear.\r\n" * 1200
    (tmp_path / "movieReviewSnippets_GroundTruth.txt").write_text(lines)
    monkeypatch.setattr(data, "fetch", lambda name, say: tmp_path)
    language, classes = (load_rows("movie-reviews", task) for task in ("causal-lm", "sequence-classification"))
    assert (len(language.train), len(language.validation), len(language.test)) == (400, 1000, 1000)
    assert {(row["prompt"], row["completion"]) for row in language.test} == {
        ("Review: Lovely: a gem.\nSentiment:", " positive"),
        ("Review: Dull.\nSentiment:", " negative"),
    }
    assert classes.labels == ["negative", "positive"]


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        ([{"body": "x"}] * 3, "causal-lm", r"has body, needed are messages or prompt \+ completion or text"),
        ([{"text": "x"}] * 3, "sequence-classification", r"has text, needed are text \+ label"),
        ([{"text": "x", "label": "a"}] * 3, "sequence-classification", "same label"),
        ([{"text": "x", "label": 0.5}, {"text": "x", "label": 1.0}], "sequence-classification", "fractions"),
        ([{"text": "x", "label": None}, {"text": "x", "label": "a"}], "sequence-classification", "no label"),
        ([{"text": "x"}], "causal-lm", "too few to hold any out"),
        ([], "causal-lm", "is empty"),
    ],
)
def test_unusable_rows_say_why(tmp_path: Path, rows: list[dict[str, Any]], task: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(jsonl(tmp_path / "rows.jsonl", rows), task)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean movie-reviews"):
        load_rows("movie-review", "causal-lm")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(DataError, match="cannot read"):
        load_rows(str(broken), "causal-lm")
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(DataError, match="unknown kind of file"):
        load_rows(str(tmp_path / "rows.xlsx"), "causal-lm")
    with pytest.raises(DataError, match="is a model"):
        load_rows("minilm", "causal-lm")


# Encoding


def test_loss_is_on_the_completion_only(encoder: Encoder) -> None:
    example = one(encoder, "prompt-completion", {"prompt": "1+1=", "completion": "2"})
    assert encoder.tokenizer.decode(example["input_ids"]) == "1+1=2</s>"
    assert words(encoder, example) == "2</s>"


def test_a_long_prompt_is_cut_on_its_left_and_the_completion_stays_whole(encoder: Encoder) -> None:
    example = one(encoder, "prompt-completion", {"prompt": "a" * 30 + "END", "completion": " yes"})
    assert len(example["input_ids"]) == encoder.max_length
    assert encoder.tokenizer.decode(example["input_ids"]).endswith("aEND yes</s>")
    assert words(encoder, example) == " yes</s>"


def test_long_text_is_cut_into_pieces_and_nothing_is_lost(encoder: Encoder) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    pieces = list(encoder.encode({"text": text}, "text"))
    assert len(pieces) == 2
    assert "".join(encoder.tokenizer.decode(piece["input_ids"]) for piece in pieces) == text + "</s>"


def test_loss_is_on_the_assistants_turns_only() -> None:
    encoder = Encoder(tiny.tokenizer(), max_length=200)
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "see you")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    example = one(encoder, "messages", row)
    assert encoder.tokenizer.decode(example["input_ids"]).count("<s>") == 5
    assert words(encoder, example) == "hello</s>\nsee you</s>\n"


def test_a_template_that_rewrites_turns_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    with pytest.raises(DataError, match="rewrites earlier turns"):
        list(Encoder(tokenizer, 99).encode(row, "messages"))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        list(Encoder(tokenizer, 99).encode(row, "messages"))


def test_rows_without_labels_are_dropped_and_counted_and_none_left_is_an_error(
    tmp_path: Path, encoder: Encoder
) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}] * 2
    short = Encoder(encoder.tokenizer, 24, append_eos=False)
    loaded = load_rows(jsonl(tmp_path / "some.jsonl", rows), "causal-lm", validation_fraction=0.25)
    assert encode_rows(loaded.train, loaded.layout, short).dropped == sum(c == "" for c in loaded.train["completion"])
    loaded = load_rows(jsonl(tmp_path / "none.jsonl", rows[1:2] * 4), "causal-lm")
    with pytest.raises(DataError, match=r"lose every label.*prompt, completion.*max_length=24"):
        encode_rows(loaded.train, loaded.layout, short)
    loaded = load_rows(jsonl(tmp_path / "null.jsonl", [*rows, {"prompt": None, "completion": "x"}] * 9), "causal-lm")
    with pytest.raises(DataError, match="has no prompt"):
        encode_rows(loaded.train, loaded.layout, short)


def test_unknown_classes_are_named(encoder: Encoder) -> None:
    encoder = Encoder(encoder.tokenizer, 24, label_names=["no", "yes"])
    assert one(encoder, "text-label", {"text": "x", "label": "yes"})["labels"] == 1
    with pytest.raises(DataError, match="label 'maybe' does not occur"):
        list(encoder.encode({"text": "x", "label": "maybe"}, "text-label"))


def test_images_are_decoded_when_asked_for(tmp_path: Path) -> None:
    from PIL import Image

    for colour, value in (("dark", 0), ("light", 255)):
        (tmp_path / "train" / colour).mkdir(parents=True)
        for index in range(3):
            Image.new("L", (10, 6), value).save(tmp_path / "train" / colour / f"{index}.png")
    rows = load_rows(str(tmp_path), "image-classification", validation_fraction=0.34)
    images = Images(rows.train, rows.labels, 8, [0.5] * 3, [0.5] * 3)
    batch = Collator()([images[i] for i in range(len(images))])
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    signs = batch["pixel_values"].mean(dim=(1, 2, 3))
    assert torch.equal((signs > 0).long(), batch["labels"])


# Batches


def test_padding_is_masked(encoder: Encoder) -> None:
    batch = Collator(pad_id=0)([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_packing_keeps_every_document_whole_and_once() -> None:
    documents = [{"input_ids": [i + 10] * n, "labels": [i + 10] * n} for i, n in enumerate([5, 3, 8, 2, 7, 1 + 1, 6])]
    packed = pack(documents, max_length=10, seed=0)
    assert all(len(p["input_ids"]) <= 10 for p in packed) and len(packed) < len(documents)
    found = []
    for p in packed:
        starts = [i for i, position in enumerate(p["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(p["input_ids"])], strict=True):
            assert p["labels"][start] == -100, "the first token would be predicted from another document"
            found.append(p["input_ids"][start:end])
    assert sorted(found) == sorted(d["input_ids"] for d in documents)
    assert pack(documents, 10, seed=0) == packed != pack(documents, 10, seed=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_one_another(tiny_llama: Path, attention: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation=attention, dtype=torch.float64).eval()
    model.config.use_cache = False
    documents = [
        {"input_ids": list(range(s, s + n)), "labels": list(range(s, s + n))} for s, n in ((5, 6), (50, 9), (90, 3))
    ]
    packs = pack(documents, 12, seed=0)
    batch = Collator(packed=True)(packs)
    with torch.no_grad():
        together = model(**batch)
        alone = [model(**Collator()([d])) for d in documents]
    losses = sum(float(a.loss) * (len(d["input_ids"]) - 1) for a, d in zip(alone, documents, strict=True))
    assert float(together.loss) == pytest.approx(
        losses / sum(len(d["input_ids"]) - 1 for d in documents), rel=1e-6
    )  # transformers takes the loss in float32


def test_a_model_that_lets_packed_documents_mix_is_refused(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    check_packing(model, 259)
    plain = model.forward
    model.forward = lambda input_ids, position_ids, use_cache: plain(input_ids=input_ids)
    with pytest.raises(DataError, match="set packing=false"):
        check_packing(model, 259)
