"""Options that several commands share, so that one word means one thing everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["BatchSize", "Data", "Dtype", "Force", "Json", "Model", "Run", "Task"]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Model = Annotated[str | None, typer.Option(help="Named model (smollm2-135m, minilm), folder or hub id.")]
Data = Annotated[str | None, typer.Option(help="Named data (movie-reviews, pydoc-topics), file, folder or hub id.")]
Task = Annotated[str | None, typer.Option(help="causal-lm (default), sequence-classification or image-classification.")]
Dtype = Annotated[str | None, typer.Option(help="Of the base model: auto, float32, bfloat16 or float16.")]
Run = Annotated[str | None, typer.Argument(help="Output folder of `rankloom train`, or an adapter's folder.")]
Force = Annotated[bool, typer.Option("--force", help="Attach even to another base model than it was made on.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples a forward pass.")]
