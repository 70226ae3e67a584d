"""From settings to what a run needs: model, examples, recipe, calibration; for training, evaluation and the demo."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankloom import methods
from rankloom.calibration import Calibration
from rankloom.errors import RecipeError
from rankloom.recipe import Recipe
from rankloom.training.collate import Collator, check_packing, pack
from rankloom.training.config import TrainConfig
from rankloom.training.data import Rows, load_rows
from rankloom.training.encode import Encoder, Example, Images, encode_rows
from rankloom.training.metrics import choices_of, evaluate
from rankloom.training.models import Loaded, load_model
from rankloom.training.processes import device

__all__ = ["Prepared", "build_recipe", "calibration_of", "encode_split", "prepare", "score"]

Examples = Sequence[Example]


@dataclass
class Prepared:
    """A loaded model and its encoded data."""

    loaded: Loaded
    rows: Rows
    train: Examples
    validation: Examples
    collate: Collator
    encoder: Encoder | None
    choices: list[list[int]] | None

    @property
    def model(self) -> nn.Module:
        """The model, on its device."""
        return self.loaded.model


def prepare(config: TrainConfig, say: Callable[[str], None]) -> Prepared:
    """Load the data, then the model (which may need the data's classes), then encode."""
    if config.threads:
        torch.set_num_threads(config.threads)
    rows = load_rows(
        config.data,
        config.task,
        columns=config.columns,
        validation_data=config.validation_data,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        say=say,
    )
    loaded = load_model(
        config.model, config.task, dtype=config.dtype, labels=rows.labels or None, seed=config.seed, say=say
    )
    _settle(loaded.model, config)
    recipe = build_recipe(config, loaded.new)
    recipe.base.prepare(loaded.model, recipe.targets)
    encoder = None
    if loaded.tokenizer is not None:
        encoder = Encoder(loaded.tokenizer, config.max_length, config.append_eos, rows.labels)
    train = encode_split(rows.train, rows, encoder, loaded, config.train_samples, say, "train")
    validation = encode_split(rows.validation, rows, encoder, loaded, config.eval_samples, say, "validation")
    if config.packing:
        train = _packed(train, rows, loaded.model, config)
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer is not None else 0
    choices = choices_of(rows.train, encoder) if encoder and rows.layout == "prompt-completion" else None
    return Prepared(loaded, rows, train, validation, Collator(pad or 0), encoder, choices)


def _settle(model: nn.Module, config: TrainConfig) -> None:
    """Put the model on its device and switch off what only generation needs.

    A cache also hides the document boundaries of packed sequences from the mask, so it must be off, not just unused.
    """
    model.to(device())
    loose: Any = model
    loose.config.use_cache = False
    if config.gradient_checkpointing:
        # Non-reentrant: the other kind gives adapters no gradient under frozen embeddings. Renamed in transformers 5.
        if hasattr(loose, "activation_checkpointing_enable"):
            loose.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            loose.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def encode_split(
    rows: Any,
    source: Rows,
    encoder: Encoder | None,
    loaded: Loaded,
    limit: int | None,
    say: Callable[[str], None],
    split: str,
) -> Examples:
    """Encode one split (its first ``limit`` rows) and report what was cut or dropped."""
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if encoder is None:
        return _images(rows, source.labels, loaded)
    encoded = encode_rows(rows, source.layout, encoder)
    if encoded.dropped or encoded.truncated:
        say(
            f"{split}: {encoded.truncated} examples cut to max_length={encoder.max_length}, {encoded.dropped} rows "
            "dropped because no label was left"
        )
    return encoded.examples


def _images(rows: Any, labels: list[str], loaded: Loaded) -> Examples:
    model_config: Any = loaded.model.config
    size = getattr(model_config, "image_size", 224)
    mean, std = _normalisation(loaded.source)
    return Images(rows, labels, size if isinstance(size, int) else size[0], mean, std)  # type: ignore[return-value]


def _normalisation(source: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation the model was trained with, by its preprocessor file; else 0.5 and 0.5."""
    from transformers.utils import cached_file

    path = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    settings = json.loads(Path(path).read_text()) if path else {}
    return settings.get("image_mean", [0.5] * 3), settings.get("image_std", [0.5] * 3)


def _packed(train: Examples, rows: Rows, model: nn.Module, config: TrainConfig) -> Examples:
    if config.task != "causal-lm":
        raise RecipeError(f"packing=true is for causal-lm; task {config.task} has one label an example: drop packing")
    model_config: Any = model.config
    check_packing(model, model_config.vocab_size)
    return pack(list(train), config.max_length, config.seed)


def build_recipe(config: TrainConfig, new_modules: tuple[str, ...] = ()) -> Recipe:
    """The method's recipe (or the given one) with the run's own settings on top."""
    if isinstance(config.recipe, dict):
        recipe = Recipe.from_dict(config.recipe)
    elif config.recipe is not None:
        recipe = Recipe.from_file(config.recipe)
    else:
        recipe = methods.get(config.method)
    changes: dict[str, Any] = {}
    if config.rank is not None:
        if "rank" not in recipe.to_dict()["adapter"]:
            raise RecipeError(
                f"rank={config.rank}: adapter '{recipe.adapter.kind}' of this recipe has no rank; drop it"
            )
        changes["adapter.rank"] = config.rank
    if config.targets is not None:
        changes["targets.modules"] = config.targets if isinstance(config.targets, str) else tuple(config.targets)
    whole = tuple(config.train) if config.train is not None else new_modules
    if whole and "*" not in recipe.targets.train:
        changes["targets.train"] = tuple(dict.fromkeys((*recipe.targets.train, *whole)))
    return recipe.with_({**changes, **config.overrides})


def calibration_of(config: TrainConfig, prepared: Prepared, collate: Collator) -> Calibration:
    """A few training examples, drawn by seed, for inits that look at the data."""
    count = min(config.calibration_samples, len(prepared.train))
    picked = sorted(random.Random(config.seed).sample(range(len(prepared.train)), count))
    size = config.batch_size
    chunks = [[prepared.train[i] for i in picked[start : start + size]] for start in range(0, count, size)]
    return Calibration([collate(chunk) for chunk in chunks])


def score(prepared: Prepared, config: TrainConfig, examples: Examples | None = None) -> dict[str, float]:
    """The task's metrics on ``examples`` (default: the validation examples)."""
    chosen = prepared.validation if examples is None else examples
    return evaluate(
        prepared.model, chosen, prepared.collate, batch_size=config.eval_batch_size, choices=prepared.choices
    )
