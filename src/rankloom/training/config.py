"""The settings of a training run: one flat table, from a YAML file, ``key=value`` overrides and options, in that order.

Plain keys belong to the run (``lr=1e-4``), dotted keys to the recipe (``adapter.rank=32``, ``init.gamma=64``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rankloom.errors import RecipeError, near_names
from rankloom.training.models import Task

__all__ = ["Attention", "Limits", "TrainConfig", "load_config", "parse_overrides"]


class Limits(BaseModel):
    """Nearly-linear attention where its certified error allows it: :func:`rankloom.attention.accelerate_attention`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    eps: float = Field(default=1e-2, gt=0, lt=1, description="relative error of a head's output and gradients")
    refresh: int = Field(default=50, ge=1, description="optimizer steps between two measurements")
    hysteresis: float = Field(default=2.0, ge=1, description="what failed must be this much better than eps to return")
    min_length: int = Field(default=2048, ge=1, description="shorter sequences are always exact")
    budget: float = Field(default=0.04, ge=0, description="share of exact attention's time that measuring may take")


class Attention(BaseModel):
    """How attention is computed while training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limits: Limits | None = None


class TrainConfig(BaseModel):
    """Everything that decides a run; the resolved table is written as ``config.yaml`` beside its results."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="named model, folder or hub id")
    data: str = Field(description="named dataset, file, folder or hub id")
    task: Task = "causal-lm"
    output: str = Field(default="runs/latest", description="folder of the run: checkpoints, metrics, adapter")

    method: str = Field(default="lora", description="a row of the methods table")
    recipe: str | dict[str, Any] | None = Field(default=None, description="recipe file (or table) instead of a method")
    rank: int | None = Field(default=None, ge=1, description="rank of the adapters, instead of the recipe's")
    targets: str | list[str] | None = Field(default=None, description="which weights, instead of the recipe's")
    train: list[str] | None = Field(default=None, description="parameters trained whole (default: a new head)")
    overrides: dict[str, Any] = Field(default_factory=dict, description="dotted recipe settings")
    calibration_samples: int = Field(default=32, ge=1, description="training examples an init may look at")

    lr: float = Field(default=2e-4, gt=0)
    weight_decay: float | None = Field(default=None, ge=0, description="instead of the recipe's")
    max_grad_norm: float = Field(default=1.0, ge=0, description="0 turns clipping off")
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: float = Field(default=0.03, ge=0, description="steps when >= 1, else a fraction of all steps")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps; wins over epochs")
    epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=8, ge=1)
    accumulation: int = Field(default=1, ge=1, description="batches an optimizer step adds up")
    dtype: str = Field(default="auto", description="of the frozen model: auto, float32, bfloat16, ...")
    gradient_checkpointing: bool = False
    attention: Attention | None = Field(default=None, description="limits: {eps: 1e-2, refresh: 50}; default: exact")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; results repeat for the same number")
    seed: int = 0

    max_length: int = Field(default=512, ge=2, description="in tokens")
    packing: bool = Field(default=False, description="fill sequences with whole documents that do not see one another")
    append_eos: bool = Field(default=True, description="end texts and completions with the end-of-text token")
    columns: dict[str, str] = Field(default_factory=dict, description="your column names, by ours")
    validation_data: str | None = None
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    train_samples: int | None = Field(default=None, ge=1, description="use only this many training rows")
    eval_samples: int | None = Field(default=None, ge=1, description="use only this many validation rows")

    log_every: int = Field(default=10, ge=1)
    eval_every: int | None = Field(default=None, ge=1, description="in steps; default: only at the end")
    eval_first: bool = Field(default=False, description="also evaluate before the first step")
    eval_batch_size: int = Field(default=16, ge=1)
    save_every: int = Field(default=100, ge=1, description="in steps; the end is always saved")
    keep: int = Field(default=2, ge=1, description="checkpoints kept")
    resume: bool = Field(default=False, description="continue the run in the output folder, if there is one")

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result: a run may only be resumed with the same."""
        free = {
            "output",
            "resume",
            "keep",
            "log_every",
            "save_every",
            "eval_every",
            "eval_first",
            "eval_batch_size",
            "eval_samples",
        }
        return self.model_dump(exclude=free)


def load_config(
    file: str | Path | None = None, overrides: list[str] | None = None, options: dict[str, Any] | None = None
) -> TrainConfig:
    """Merge a YAML file, ``key=value`` strings and options (``None`` = not given); later ones win."""
    merged: dict[str, Any] = _read_yaml(Path(file)) if file else {}
    dotted: dict[str, Any] = dict(merged.pop("overrides", None) or {})
    from_file = {key: merged.pop(key) for key in list(merged) if "." in key}
    from_options = {key: value for key, value in (options or {}).items() if value is not None}
    for source in (from_file, parse_overrides(overrides or []), from_options):
        for key, value in source.items():
            _assign(merged, dotted, key, value)
    unknown = [key for key in merged if key not in TrainConfig.model_fields]
    if unknown:
        raise RecipeError(f"unknown setting '{unknown[0]}'{near_names(unknown[0], TrainConfig.model_fields)}")
    try:
        return TrainConfig(**merged, overrides=dotted)
    except ValidationError as error:
        raise RecipeError(_one_line(error)) from error


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """``["lr=1e-4", "targets=[q_proj, v_proj]"]`` as a table, the values read as YAML."""
    parsed = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise RecipeError(f"'{item}' is neither a .yaml file nor key=value, as in lr=1e-4 or adapter.rank=32")
        parsed[key.strip()] = _scalar(value)
    return parsed


def _assign(merged: dict[str, Any], dotted: dict[str, Any], key: str, value: Any) -> None:
    """Put one setting where it belongs: ``columns.x``, ``attention.x.y`` into those tables, other dotted keys to the recipe."""
    first, *rest = key.split(".")
    if rest and first in ("columns", "attention"):
        table = merged[first] = dict(merged.get(first) or {})
        for name in rest[:-1]:
            table[name] = table = dict(table.get(name) or {})
        table[rest[-1]] = value
    elif rest:
        dotted[key] = value
    else:
        merged[key] = value


def _scalar(text: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"cannot read the value '{text}'; quote it for your shell and for YAML") from error
    # YAML 1.1 reads 1e-4 (no dot) as a string; everybody means the number.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise RecipeError(f"configuration file {path} does not exist; give a .yaml file, or options only")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold 'key: value' lines, as in 'model: smollm2-135m'")
    # The same 1e-4 as on the command line.
    return {str(key): _scalar(value) if isinstance(value, str) else value for key, value in content.items()}


def _one_line(error: ValidationError) -> str:
    """The first problem of a settings table, as one line."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"setting '{name}' is missing; give --{name} or put '{name}: ...' into the file"
    return f"setting '{name}': {first['msg'].lower()}, got {first['input']!r}"
