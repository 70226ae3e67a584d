"""The names and matching rules of PEFT's files, which PEFT, vLLM, SGLang and llama.cpp's converter share."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

__all__ = ["CONFIG", "PREFIX", "REPORT", "WEIGHTS", "matching", "of_pattern", "pattern_keys", "target_patterns"]

CONFIG, WEIGHTS, REPORT, CARD = "adapter_config.json", "adapter_model.safetensors", "rankloom_export.json", "README.md"
PREFIX = "base_model.model."

T = TypeVar("T")


def matching(targets: str | Collection[str], names: Iterable[str]) -> list[str]:
    """The module names that PEFT's ``target_modules`` selects: a regular expression, or full names and trailing parts."""
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    return [name for name in names if name in targets or any(name.endswith(f".{t}") for t in targets)]


def target_patterns(wanted: Collection[str], model: nn.Module) -> list[str] | str:
    """The shortest ``target_modules`` that selects exactly these modules: their last names, full names, or a regex."""
    names = [name for name, _ in model.named_modules() if name]
    for patterns in (sorted({name.rsplit(".", 1)[-1] for name in wanted}), sorted(wanted)):
        if set(matching(patterns, names)) == set(wanted):
            return patterns
    return "|".join(re.escape(name) for name in sorted(wanted))


def pattern_keys(values: Mapping[str, T], names: Collection[str]) -> dict[str, T]:
    """Keys for ``rank_pattern`` and ``alpha_pattern``: the names themselves, anchored where they would match others too."""
    keys = {}
    for name, value in values.items():
        alone = sum(of_pattern([name], other) is not None for other in names) == 1
        keys[name if alone else f"^{re.escape(name)}"] = value
    return keys


def of_pattern(keys: Iterable[str], name: str) -> str | None:
    """The first key of a pattern dictionary that matches a module name, as PEFT matches it."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)


def task_type(model: nn.Module, saved: Collection[str]) -> str | None:
    """PEFT's task type, where naming it is safe.

    PEFT wraps every ``classifier`` and ``score`` of a sequence classifier and insists that the file holds them all, so
    that type is only named when it does; without a type any PEFT loads the adapter as it is.
    """
    kind = type(model).__name__
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    heads = [name for name, _ in model.named_modules() if name.endswith(("classifier", "score"))]
    if kind.endswith("ForSequenceClassification") and heads and set(heads) <= set(saved):
        return "SEQ_CLS"
    return None


def model_card(base: str | None, what: str, report: Mapping[str, Any]) -> str:
    """A short model card with the metadata that hubs read."""
    form = report["form"] if report["form"] not in ("dora", "adalora") else "lora"
    header = [
        "---",
        *([f"base_model: {base}"] if base else []),
        "library_name: peft",
        "tags:",
        f"- {form}",
        "- rankloom",
    ]
    error, rank = float(report["relative_error"]), report["rank"]
    quality = "exact" if report["exact"] else f"best low-rank approximation, relative error {error:.2e}"
    lines = [
        *header,
        "---",
        "",
        f"# {what}",
        "",
        f"{len(report['targets'])} adapted modules" + (f", rank up to {rank}" if rank else "") + f", {quality}.",
        "Written by rankloom; `rankloom_export.json` has the recipe and the measured error of every module.",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        "model = PeftModel.from_pretrained(base_model, path_of_this_folder)",
        "```",
        "",
    ]
    return "\n".join(lines)
