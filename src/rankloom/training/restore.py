"""Open what a run left: its settings, its model, its adapter on it. For evaluating, generating and exporting."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankloom.adapt import Adaptation, load
from rankloom.artifacts import read_adapter
from rankloom.errors import ArtifactError, DataError, RecipeError
from rankloom.training.collate import Collator
from rankloom.training.config import TrainConfig, load_config
from rankloom.training.data import load_rows
from rankloom.training.encode import Encoder
from rankloom.training.metrics import choices_of, evaluate
from rankloom.training.models import Loaded, load_model
from rankloom.training.prepare import encode_split

__all__ = ["Restored", "evaluate_run", "generate", "restore"]


@dataclass
class Restored:
    """A model with an adapter attached (or none, for the base model alone) and the settings it was trained with."""

    config: TrainConfig
    loaded: Loaded
    adaptation: Adaptation | None
    labels: list[str]


def restore(
    run: str | None,
    *,
    options: dict[str, Any] | None = None,
    force: bool = False,
    base: bool = False,
    say: Callable[[str], None] | None = None,
) -> Restored:
    """Open a run, an adapter, or a base model alone.

    Args:
        run: a run's folder; an adapter's folder (then ``options`` names the model); ``None`` for a base model.
        options: settings that replace the run's own.
        force: attach even where the adapter was made on another base model.
        base: leave the adapter out, to see what it changes.
        say: told about downloads.
    """
    folder = Path(run) if run else None
    file, adapter = _locate(folder) if folder else (None, None)
    given = {key: value for key, value in (options or {}).items() if value is not None}
    if file is None:
        if "model" not in given:
            raise RecipeError("which model? give a run's folder, or --model with a name, a folder or a hub id")
        given = {"data": "none", **given}
    config = load_config(file, options=given)
    labels = _labels(folder) if folder else []
    loaded = load_model(config.model, config.task, dtype=config.dtype, labels=labels or None, seed=config.seed, say=say)
    if torch.cuda.is_available():
        loaded.model.to("cuda")
    if adapter is not None:
        recipe = read_adapter(adapter, loaded.model).recipe
        recipe.base.prepare(loaded.model, recipe.targets)
    adaptation = load(loaded.model, adapter, force=force) if adapter is not None and not base else None
    loaded.model.eval()
    return Restored(config, loaded, adaptation, labels)


def evaluate_run(
    restored: Restored, *, split: str = "test", limit: int | None = None, say: Callable[[str], None]
) -> dict[str, float]:
    """Score a split of the run's data (or of the data the options named) with the task's metrics."""
    config = restored.config
    if config.data == "none":
        raise DataError("which data? give a run's folder, or --data with a name, a file or a hub id")
    rows = load_rows(
        config.data,
        config.task,
        columns=config.columns,
        validation_data=config.validation_data,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        say=say,
    )
    chosen = getattr(rows, split, None) if split in ("train", "validation", "test") else None
    if chosen is None:
        raise DataError(f"'{config.data}' has no {split} split; use --split train or validation, or --data with a file")
    if restored.labels:
        rows.labels[:] = restored.labels  # the head's order, whatever order this data suggests
    tokenizer = restored.loaded.tokenizer
    encoder = Encoder(tokenizer, config.max_length, config.append_eos, rows.labels) if tokenizer is not None else None
    examples = encode_split(chosen, rows, encoder, restored.loaded, limit, say, split)
    choices = choices_of(rows.train, encoder) if encoder and rows.layout == "prompt-completion" else None
    collate = Collator((tokenizer.pad_token_id or 0) if tokenizer is not None else 0)
    return evaluate(restored.loaded.model, examples, collate, batch_size=config.eval_batch_size, choices=choices)


@torch.no_grad()
def generate(
    restored: Restored,
    prompts: list[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> list[str]:
    """Continue each prompt; greedy at temperature 0, else sampled from ``seed``."""
    tokenizer = restored.loaded.tokenizer
    if restored.config.task != "causal-lm" or tokenizer is None:
        raise RecipeError(f"a {restored.config.task} model does not generate text; use rankloom eval")
    if chat and not tokenizer.chat_template:
        raise RecipeError("the tokenizer has no chat template; leave out --chat")
    torch.manual_seed(seed)
    model: Any = restored.loaded.model
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "use_cache": True}
    settings["pad_token_id"] = tokenizer.pad_token_id
    if temperature > 0:
        settings["temperature"] = temperature
    encoder = Encoder(tokenizer, max_length=10**9)
    texts = []
    for prompt in prompts:
        if chat:
            message = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            ids = encoder.ids(text)
        else:
            ids = encoder.prompt_ids(prompt, room=0)
        inputs = torch.tensor([ids], device=next(model.parameters()).device)
        output = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **settings)
        texts.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    return texts


def _locate(folder: Path) -> tuple[Path | None, Path]:
    """The settings file and the adapter of a folder; an adapter inside a run finds the run's settings."""
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is not a folder; give the output folder of rankloom train, or an adapter's folder"
        )
    if (folder / "config.yaml").is_file():
        if not (folder / "adapter").is_dir():
            raise ArtifactError(
                f"{folder} holds no finished adapter; finish it: rankloom train {folder}/config.yaml resume=true"
            )
        return folder / "config.yaml", folder / "adapter"
    near = folder.parent / "config.yaml"
    return (near if near.is_file() else None), folder


def _labels(folder: Path) -> list[str]:
    for place in (folder, folder.parent):
        if (place / "run.json").is_file():
            labels: list[str] = json.loads((place / "run.json").read_text())["labels"]
            return labels
    return []


def export_run(restored: Restored, to: str | Path, form: str, rank: int | None = None) -> dict[str, Any]:
    """Write an adapter as ``peft``, as plain ``lora`` (the PEFT form every reader takes) or ``merged`` into the model."""
    adaptation = restored.adaptation
    if adaptation is None:
        raise RecipeError("nothing to export: the base model was opened without an adapter")
    options: dict[str, Any] = {"rank": rank} if rank is not None else {}
    if form in ("peft", "lora"):
        report = adaptation.export(to, "peft", form="lora" if form == "lora" else "auto", **options)
    elif form == "merged" and rank is None:
        report = adaptation.export(to, "merged")
        if restored.loaded.tokenizer is not None:  # so that the folder loads by itself
            restored.loaded.tokenizer.save_pretrained(to)
    elif form == "merged":
        raise RecipeError("a merged model has no rank: leave out --rank")
    else:
        raise RecipeError(f"unknown format '{form}'; choose peft, lora or merged")
    return {"written": str(to), **report}
