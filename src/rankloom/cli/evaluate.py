"""``rankloom eval``: score a trained run, an adapter, or a base model on data."""

from __future__ import annotations

from typing import Annotated

import typer

from rankloom.cli import options
from rankloom.cli.output import emit, pairs

__all__ = ["command"]


def command(
    run: options.Run = None,
    model: options.Model = None,
    data: options.Data = None,
    task: options.Task = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    limit: Annotated[int | None, typer.Option(help="Only the first so many rows.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Leave the adapter out, to see what it changed.")] = False,
    batch_size: options.BatchSize = None,
    max_length: Annotated[int | None, typer.Option(help="Longest example, in tokens.")] = None,
    dtype: options.Dtype = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Score a run on its data: loss and perplexity, and accuracy where the task has one.

    rankloom eval runs/latest --split test

    rankloom eval --model smollm2-135m --data movie-reviews
    """
    from rankloom.training.progress import say_to_stderr
    from rankloom.training.restore import evaluate_run, restore

    given = {
        "model": model,
        "data": data,
        "task": task,
        "dtype": dtype,
        "max_length": max_length,
        "eval_batch_size": batch_size,
    }
    restored = restore(run, options=given, force=force, base=base, say=say_to_stderr)
    figures = evaluate_run(restored, split=split, limit=limit, say=say_to_stderr)
    emit({"run": run, "split": split, "base": base, **figures}) if json else pairs(figures)
