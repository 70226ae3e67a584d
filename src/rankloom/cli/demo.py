"""``rankloom demo``: LoRA against LoRA-One on a real model and real text, start to finish."""

from __future__ import annotations

from typing import Annotated

import typer

from rankloom.cli import options
from rankloom.cli.output import emit

__all__ = ["command"]


def command(
    output: Annotated[str, typer.Option(help="Folder for adapters, figure, table and PEFT export.")] = "demo-out",
    json: options.Json = False,
) -> None:
    """Fine-tune SmolLM2-135M on movie-review sentiment with LoRA and LoRA-One, and compare them (about ten minutes)."""
    from rankloom.training.demo import run_demo

    result = run_demo(output)
    if json:
        emit(result)
