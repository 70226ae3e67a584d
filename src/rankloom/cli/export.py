"""``rankloom export``: write what others load: a PEFT adapter, or the whole merged model."""

from __future__ import annotations

from typing import Annotated

import typer

from rankloom.cli import options
from rankloom.cli.output import emit, pairs

__all__ = ["command"]


def command(
    run: Annotated[str, typer.Argument(help="Output folder of `rankloom train`, or an adapter's folder.")],
    to: Annotated[str, typer.Argument(help="Folder to write.")],
    format: Annotated[
        str, typer.Option(help="peft (as PEFT knows the method), lora (plain, for every reader) or merged.")
    ] = "peft",
    rank: Annotated[
        int | None, typer.Option(help="Rank of the approximation, for updates that have no low rank.")
    ] = None,
    model: options.Model = None,
    task: options.Task = None,
    dtype: options.Dtype = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Export a trained adapter.

    rankloom export runs/latest my-peft-adapter
    """
    from rankloom.training.progress import say_to_stderr
    from rankloom.training.restore import export_run, restore

    given = {"model": model, "task": task, "dtype": dtype}
    restored = restore(run, options=given, force=force, say=say_to_stderr)
    report = export_run(restored, to, format, rank)
    if json:
        emit(report)
    else:
        pairs({key: value for key, value in report.items() if not isinstance(value, dict | list)})
