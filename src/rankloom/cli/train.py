"""``rankloom train``: fine-tune a model from a YAML file, ``key=value`` settings, options, or a mix."""

from __future__ import annotations

from typing import Annotated

import typer

from rankloom.cli import options
from rankloom.cli.output import emit, pairs

__all__ = ["command"]


def command(
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="A .yaml file and/or key=value; dotted keys change the recipe (adapter.rank=32)."),
    ] = None,
    model: options.Model = None,
    data: options.Data = None,
    task: options.Task = None,
    method: Annotated[str | None, typer.Option(help="A row of `rankloom methods`.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe file instead of a method.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters.")] = None,
    targets: Annotated[str | None, typer.Option(help="all-linear, or patterns separated by commas.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps (instead of epochs).")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: options.BatchSize = None,
    accumulation: Annotated[int | None, typer.Option(help="Batches an optimizer step adds up.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest example, in tokens.")] = None,
    packing: Annotated[bool | None, typer.Option(help="Fill sequences with whole documents.")] = None,
    dtype: options.Dtype = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help="Less memory, more time.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Evaluate every so many steps.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Write a checkpoint every so many steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    resume: Annotated[bool | None, typer.Option(help="Continue the run in the output folder.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
    json: options.Json = False,
) -> None:
    """Fine-tune a model with any method of the table.

    rankloom train --model smollm2-135m --data movie-reviews --method lora-one --steps 100

    rankloom train config.yaml lr=1e-4 adapter.rank=32

    Every setting of the file and of key=value is listed by `rankloom train settings`.
    """
    if settings == ["settings"]:
        _list_settings(json)
        return
    named = {key: value for key, value in locals().items() if key not in ("settings", "quiet", "json", "targets")}
    patterns = targets.split(",") if targets and targets != "all-linear" else targets
    from rankloom.training.config import load_config
    from rankloom.training.processes import is_main
    from rankloom.training.progress import say_to_stderr
    from rankloom.training.run import train

    items = list(settings or [])
    file = items.pop(0) if items and items[0].endswith((".yaml", ".yml")) else None
    config = load_config(file, items, {**named, "targets": patterns})
    result = train(config, say=(lambda _line: None) if quiet else say_to_stderr, live=False if quiet else None)
    if not is_main():
        return
    if json:
        emit(result.__dict__)
    else:
        pairs({**result.metrics, "steps": result.steps, "seconds": result.seconds, "adapter": result.adapter})


def _list_settings(json: bool) -> None:
    from rankloom.cli.output import table
    from rankloom.training.config import TrainConfig

    if json:
        emit(TrainConfig.model_json_schema())
        return
    rows = [
        (
            name,
            "required" if field.is_required() else field.get_default(call_default_factory=True),
            field.description or "",
        )
        for name, field in TrainConfig.model_fields.items()
    ]
    table(["setting", "default", "meaning"], rows)
