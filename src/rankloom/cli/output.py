"""Results on stdout: a table for people or one JSON document for programs. Everything else goes to stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["emit", "pairs", "table"]


def emit(value: Any) -> None:
    """Print ``value`` as JSON."""
    print(json.dumps(value, indent=2, default=str))


def pairs(values: Mapping[str, Any]) -> None:
    """Print names and values, one a line, aligned."""
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        print(f"{name:<{width}}  {_text(value)}")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table as wide as the terminal (or as it needs, into a pipe)."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column)
    for row in rows:
        drawn.add_row(*(_text(cell) for cell in row))
    if console.is_terminal:
        console.print(drawn)
    else:
        Console(width=400).print(drawn, highlight=False)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
