"""``rankloom demo``: LoRA against LoRA-One on a real model and real text, start to finish."""

from __future__ import annotations

from typing import Annotated

import typer

from rankloom.cli import options
from rankloom.cli.output import emit

__all__ = ["command"]


def command(
    output: Annotated[str, typer.Option(help="Folder for adapters, figure, table and PEFT export.")] = "demo-out",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for the first quarter of the chosen runs.")] = 3,
    steps: Annotated[int | None, typer.Option(min=4, help="Of each run, instead of what fits this machine.")] = None,
    json: options.Json = False,
) -> None:
    """Fine-tune SmolLM2-135M on movie-review sentiment with LoRA and LoRA-One, and compare them (about ten minutes)."""
    from rankloom.training.demo import run_demo

    result = run_demo(output, seeds=seeds, steps=steps)
    if json:
        emit(result)
