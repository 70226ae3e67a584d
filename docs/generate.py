"""mkdocs hook: a page for every method of the table and for every slot of a recipe, made from the code at build time.

Nothing it makes is committed: the table, the parts' docstrings and their settings are the only source.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from rankloom import methods
from rankloom.methods import TABLE, Method
from rankloom.parts import SLOTS, Part, kinds
from rankloom.recipe import Recipe


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the made pages to the navigation."""
    table = [{"All methods": "methods/index.md"}, *({name: f"methods/{name}.md"} for name in TABLE)]
    slots = [{slot: f"parts/{slot}.md"} for slot in SLOTS]
    config.nav = [*(config.nav or []), {"Methods": table}, {"Parts": slots}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make the pages."""
    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def pages() -> dict[str, str]:
    """Every made page by its path."""
    made = {"methods/index.md": _overview()}
    made |= {f"methods/{name}.md": _method(name, row) for name, row in TABLE.items()}
    return made | {f"parts/{slot}.md": _slot(slot) for slot in SLOTS}


def _overview() -> str:
    rows = [
        f"| [`{name}`]({name}.md) | {_cell(row.summary)} | {_source(row.paper)} | {_cell(row.parameters)} |"
        for name, row in TABLE.items()
    ]
    head = ["# Methods", "", "Each row is a recipe; `rankloom methods NAME` prints it as well.", ""]
    columns = ["| method | what it is | source | trainable |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *columns, *rows, ""])


def _method(name: str, row: Method) -> str:
    recipe = methods.get(name)
    start = (
        "moves the function on purpose, as its paper does"
        if recipe.init.moves_output
        else "is the pretrained function, to the bit"
    )
    facts = {
        "paper": f"{row.title}, {_source(row.paper)}",
        "trainable": row.parameters,
        "step 0": start,
        "export": row.export,
        "differs from paper or released code": row.deviations,
    }
    lines = [f"# {name}", "", row.summary, "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in facts.items() if value]
    lines += ["", "```console", f"$ rankloom train --model MODEL --data DATA --method {name}", "```", ""]
    lines += ["```python", f'recipe = rankloom.methods.get("{name}")', "```", "", "## Recipe", ""]
    lines += ["```yaml", _differences(recipe), "```", ""]
    for slot, part in _own_parts(recipe).items():
        lines += [f"## {slot}: [{part.kind}](../parts/{slot}.md#{part.kind})", "", _prose(type(part)), ""]
    return "\n".join(lines)


def _own_parts(recipe: Recipe) -> dict[str, Part]:
    """The parts that make the method: all but slots left at their default kind, and always the adapter and its start."""
    default = Recipe()
    return {
        slot: part
        for slot, part in recipe.parts().items()
        if slot in ("adapter", "init") or part.kind != getattr(default, slot).kind
    }


def _differences(recipe: Recipe) -> str:
    """The recipe as YAML, without settings at their part's default and slots at theirs."""
    import yaml

    default, plain = Recipe(), {}
    for slot, part in recipe.parts().items():
        if part == getattr(default, slot) and slot != "adapter":
            continue
        basis = type(part)().to_dict()
        plain[slot] = {k: v for k, v in part.to_dict().items() if k == "kind" or v != basis[k]}
    return yaml.safe_dump(_listed(plain), sort_keys=False).strip()


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _slot(slot: str) -> str:
    lines = [f"# {slot}", ""]
    for kind, cls in kinds(slot).items():
        lines += [f"## {kind}", "", _prose(cls), "", *_settings(cls)]
        part = cls()
        for word, names in (("Needs", part.needs), ("Offers", part.offers)):
            if names:
                lines += [f"{word} {', '.join(sorted(names))}.", ""]
        users = [name for name, row in TABLE.items() if getattr(row.recipe, slot).kind == kind]
        if 0 < len(users) < len(TABLE):
            lines += [f"In {', '.join(f'[`{name}`](../methods/{name}.md)' for name in users)}.", ""]
    return "\n".join(lines)


def _settings(cls: type[Part]) -> list[str]:
    part = cls()
    rows = [
        f"| `{field.name}` | `{getattr(part, field.name)!r}` | {_cell(f'`{field.type}`')} |"
        for field in dataclasses.fields(cls)
    ]
    return ["| setting | default | type |", "| --- | --- | --- |", *rows, ""] if rows else []


def _prose(cls: type) -> str:
    """A docstring as Markdown: the code spans and blocks agree, the cross-references become code."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)


def _source(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
