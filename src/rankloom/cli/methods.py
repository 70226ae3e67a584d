"""``rankloom methods [NAME]``: the table of methods, or one method taken apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rankloom.cli import options
from rankloom.cli.output import emit, pairs, table

if TYPE_CHECKING:
    from rankloom.methods import Method

__all__ = ["command"]


def command(
    name: Annotated[str | None, typer.Argument(help="A method; without it, all of them.")] = None,
    json: options.Json = False,
) -> None:
    """List the methods, or show the parts one is composed of.

    rankloom methods lora-one
    """
    from rankloom import methods

    if name is None:
        if json:
            emit({key: _fields(row) for key, row in methods.TABLE.items()})
        else:
            table(["method", "what it is", "source"], [(k, m.summary, m.paper) for k, m in methods.TABLE.items()])
        return
    recipe = methods.get(name)
    row = methods.TABLE[name]
    if json:
        emit({"name": name, **_fields(row)})
        return
    described = {key: value for key, value in _fields(row).items() if key not in ("recipe", "needs") and value}
    pairs({"name": name, **described})
    print(f"\n{recipe.expand()}")


def _fields(row: Method) -> dict[str, object]:
    """A table row as plain values: whatever fields it has, the recipe as its dictionary, and what its parts ask of each other
    and of the run."""
    parts = row.recipe.parts().values()
    asked = {"parts": sorted({need for part in parts for need in part.needs}), "start": row.recipe.init.evidence}
    return {**vars(row), "recipe": row.recipe.to_dict(), "needs": asked}
