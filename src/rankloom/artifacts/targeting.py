"""From the modules and parameters found in a file back to the patterns of a recipe, exactly."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rankloom.artifacts.peft_format import CONFIG, WEIGHTS, matching, target_patterns
from rankloom.errors import ArtifactError, TargetError
from rankloom.layers import layer_of
from rankloom.targets import Targets, exact_pattern, find_targets, whole_parameters

__all__ = ["require_targeted", "targets_for"]


def targets_for(adapted: Collection[str], whole: Collection[str], model: nn.Module) -> Targets:
    """The settings that select exactly these modules and parameters on this model; ``all-linear`` where that is what they are.

    A tied weight that the file adapts on one side only is untied, which is what PEFT computed with.
    """
    train = _train(whole, model)
    if _selects(Targets(train=train), adapted, whole, model):
        return Targets(train=train)
    patterns = target_patterns(adapted, model)
    modules = (f"re:{patterns}",) if isinstance(patterns, str) else tuple(patterns)
    made = Targets(modules, train=train)
    try:
        find_targets(model, made)
    except TargetError:
        return Targets(modules, train=train, ties="untie")
    return made


def _train(whole: Collection[str], model: nn.Module) -> tuple[str, ...]:
    """Modules where a module is trained as one, else parameters by their full names."""
    everything = list(dict(model.named_parameters()))
    modules = tuple(sorted({name.rpartition(".")[0] for name in whole}))
    if all(modules) and whole_parameters(model, Targets(train=modules), []).keys() == set(whole):
        return modules
    return tuple(exact_pattern(name, everything) for name in sorted(whole))


def _selects(settings: Targets, adapted: Collection[str], whole: Collection[str], model: nn.Module) -> bool:
    try:
        targets = find_targets(model, settings)
    except TargetError:
        return False
    return {t.name for t in targets} == set(adapted) and whole_parameters(model, settings, targets).keys() == set(whole)


def require_targeted(folder: Path, config: Mapping[str, Any], adapted: Collection[str], model: nn.Module) -> None:
    """Raise :class:`ArtifactError` unless every module that a PEFT configuration targets has tensors in its file."""
    targets = config.get("target_modules")
    if not targets or targets == "all-linear" or config.get("layers_to_transform") is not None:
        return
    layers = [name for name, module in model.named_modules() if name and layer_of(module) is not None]
    saved = config.get("modules_to_save") or []
    excluded = set(matching(config["exclude_modules"], layers)) if config.get("exclude_modules") else set()
    excluded |= {name for name in layers if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in saved)}
    wanted = [name for name in matching(targets, layers) if name not in excluded]
    if missing := [name for name in wanted if name not in adapted]:
        raise ArtifactError(
            f"{len(missing)} of {len(wanted)} modules that {CONFIG} targets have no tensors in {folder / WEIGHTS} (as "
            f"{missing[0]}): they would silently stay unadapted; use the base model it was made on, or save it again"
        )
