"""Rows for a task: from a named asset, a local file or folder, or the Hugging Face hub, split and with known columns.

Every source ends as a ``Rows``: three `datasets.Dataset` splits. What a row means is decided by its columns:

| columns                | meaning                                               | tasks                         |
| ---------------------- | ----------------------------------------------------- | ----------------------------- |
| ``messages``           | a chat; loss on the assistant's turns                 | causal-lm                     |
| ``prompt, completion`` | loss on the completion only                           | causal-lm                     |
| ``text``               | plain text; loss on every token                       | causal-lm                     |
| ``text, label``        | one class a text                                      | sequence-classification       |
| ``image, label``       | one class a picture                                   | image-classification          |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rankloom.errors import DataError, near_names
from rankloom.training.assets import ASSETS, fetch
from rankloom.training.models import Task

__all__ = ["DATA_ASSETS", "Layout", "Rows", "load_rows"]

Layout = Literal["messages", "prompt-completion", "text", "text-label", "image-label"]

DATA_ASSETS = ("movie-reviews", "pydoc-topics")
_NEEDED: dict[Layout, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
    "text-label": ("text", "label"),
    "image-label": ("image", "label"),
}
# In the order of preference: a file that has both a chat and its plain text is meant as a chat.
_TASK_LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "causal-lm": ("messages", "prompt-completion", "text"),
    "sequence-classification": ("text-label",),
    "image-classification": ("image-label",),
}
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Rows:
    """Three splits of one dataset and the layout their columns have; ``test`` is ``None`` when the source has none.

    ``labels`` are the class names in the order of the head's outputs; the label column holds names, never indices.
    """

    train: Any
    validation: Any
    test: Any
    layout: Layout
    labels: list[str]


def load_rows(
    name: str,
    task: Task,
    *,
    columns: dict[str, str] | None = None,
    validation_data: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> Rows:
    """Load ``name`` for ``task``.

    Args:
        name: a named asset, a file (JSONL, CSV, TSV, Parquet, text), a folder of them or of images, or a hub id.
        task: decides which columns are needed.
        columns: the names your file uses, by ours: ``{"text": "review", "label": "stars"}``.
        validation_data: another source to take the validation rows from.
        validation_fraction: what to hold out of the training rows, by seed, when there is no validation split.
        seed: of the hold-out.
        say: told about downloads.
    """
    from datasets import disable_progress_bars

    disable_progress_bars()
    splits = _named_columns(_splits(name, say), columns or {})
    if validation_data:
        splits["validation"] = _named_columns(_splits(validation_data, say), columns or {})["train"]
    layout = _layout(splits["train"].column_names, task, name)
    if "validation" not in splits:
        splits.update(_hold_out(splits["train"], validation_fraction, seed, name))
    for split, rows in splits.items():
        if len(rows) == 0:
            raise DataError(f"the {split} split of '{name}' has no rows; give a file with at least one")
        _layout(rows.column_names, task, f"{name} ({split})")
    labels: list[str] = []
    if layout.endswith("label"):
        splits, labels = _named_labels(splits, name)
    return Rows(splits["train"], splits["validation"], splits.get("test"), layout, labels)


def _named_labels(splits: dict[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    """Replace every label by its class name, and list the names in order: the dataset's own, else sorted."""
    if any(None in rows.unique("label") for rows in splits.values()):
        raise DataError(f"'{name}': some rows have no label; remove them or fill the label column")
    feature = splits["train"].features["label"]
    if hasattr(feature, "names"):
        names = list(feature.names)
    else:
        found = set(splits["train"].unique("label"))
        if any(isinstance(label, float) for label in found):
            raise DataError(f"'{name}': the label column holds fractions; classification needs integers or strings")
        names = [str(label) for label in sorted(found)]
    if len(names) < 2:
        raise DataError(f"'{name}': every training row has the same label ({names[0]}); at least two are needed")
    return {split: _label_words(rows) for split, rows in splits.items()}, names


def _label_words(rows: Any) -> Any:
    # An index and a name that looks like one ("1" as class 0) must not be mixed up later, so only names go on.
    words = getattr(rows.features["label"], "names", None)
    labels = [words[label] if words else str(label) for label in rows["label"]]
    return rows.remove_columns("label").add_column("label", labels)


def _splits(name: str, say: Callable[[str], None] | None) -> dict[str, Any]:
    if name == "movie-reviews":
        return _movie_reviews(say)
    if name == "pydoc-topics":
        return _pydoc_topics()
    if name in ASSETS:
        raise DataError(f"'{name}' is a model, not a dataset; datasets: {', '.join(DATA_ASSETS)}, a file or a hub id")
    return _load(name)


def _load(name: str) -> dict[str, Any]:
    """A local file or folder, else a hub id, through `datasets`."""
    from datasets import DatasetDict, load_dataset

    path = Path(name).expanduser()
    try:
        if path.is_file():
            loaded = _load_file(path)
        elif path.is_dir():
            loaded = load_dataset(str(path))
        else:
            loaded = load_dataset(name)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises its readers' own errors, of a dozen types
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        if path.exists():
            raise DataError(f"cannot read {name}: {reason}; check that the file is valid and not empty") from error
        raise DataError(
            f"data '{name}' is neither a named dataset ({', '.join(DATA_ASSETS)}), nor a file here, nor reachable on "
            f"the Hugging Face hub{near_names(name, DATA_ASSETS)}"
        ) from error
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    if "train" not in splits:
        raise DataError(f"'{name}' has no train split; it has {', '.join(splits)}: give one of its files by path")
    return splits


def _load_file(path: Path) -> Any:
    from datasets import load_dataset

    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise DataError(f"{path.name}: unknown kind of file; use one of {', '.join(_BUILDERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; give a file with at least one row")
    options: dict[str, Any] = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
    return load_dataset(builder, data_files=str(path), split="train", **options)


def _named_columns(splits: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Rename the user's columns to ours; naming one that is not there is an error."""
    renamed = {}
    for split, rows in splits.items():
        for ours, theirs in columns.items():
            if theirs not in rows.column_names:
                raise DataError(
                    f"columns: '{theirs}' (for {ours}) is not in the {split} data, which has "
                    f"{', '.join(rows.column_names)}{near_names(theirs, rows.column_names)}"
                )
            if ours != theirs:
                # A column that already has our name but another meaning makes way.
                rows = rows.remove_columns(ours) if ours in rows.column_names else rows
                rows = rows.rename_column(theirs, ours)
        renamed[split] = rows
    return renamed


def _layout(found: list[str], task: Task, name: str) -> Layout:
    """The first layout of the task whose columns are all there."""
    for layout in _TASK_LAYOUTS[task]:
        if set(_NEEDED[layout]) <= set(found):
            return layout
    needed = " or ".join(" + ".join(_NEEDED[layout]) for layout in _TASK_LAYOUTS[task])
    raise DataError(
        f"'{name}' lacks a column that task {task} needs: it has {', '.join(found) or 'no columns'}, needed are "
        f"{needed}; rename them in the file or map them, as in columns.text=review"
    )


def _hold_out(train: Any, fraction: float, seed: int, name: str) -> dict[str, Any]:
    """Split validation rows off the training rows, reproducibly."""
    count = round(len(train) * fraction)
    if len(train) < 2:
        raise DataError(f"'{name}' has {len(train)} row(s), too few to hold any out; give validation_data or more rows")
    split = train.train_test_split(test_size=max(1, count), seed=seed)
    return {"train": split["train"], "validation": split["test"]}


def _movie_reviews(say: Callable[[str], None] | None) -> dict[str, Any]:
    """Sentences with a clear human rating (|valence| >= 0.5), as text + label and as prompt + completion.

    The split is the same for every seed of a run (8,072 / 1,000 / 1,000), so runs can be compared.
    """
    from datasets import ClassLabel, Dataset

    lines = (fetch("movie-reviews", say) / "movieReviewSnippets_GroundTruth.txt").read_text(encoding="utf-8")
    rows = []
    for line in lines.splitlines():
        _, valence, text = line.split("\t", 2)
        if abs(float(valence)) >= 0.5:
            word = "positive" if float(valence) > 0 else "negative"
            text = text.strip()
            completion = f" {word}"
            rows.append(
                {"text": text, "label": word, "prompt": f"Review: {text}\nSentiment:", "completion": completion}
            )
    everything = Dataset.from_list(rows).cast_column("label", ClassLabel(names=["negative", "positive"]))
    everything = everything.shuffle(seed=0)
    held = 1000
    return {
        "train": everything.select(range(2 * held, len(everything))),
        "validation": everything.select(range(held)),
        "test": everything.select(range(held, 2 * held)),
    }


def _pydoc_topics() -> dict[str, Any]:
    """Python's own help texts: a few hundred kilobytes of technical English that every installation has."""
    from pydoc_data.topics import topics

    from datasets import Dataset

    everything = Dataset.from_list([{"text": topics[key]} for key in sorted(topics)]).shuffle(seed=0)
    held = max(1, len(everything) // 10)
    return {
        "train": everything.select(range(2 * held, len(everything))),
        "validation": everything.select(range(held)),
        "test": everything.select(range(held, 2 * held)),
    }
