"""Parameters trained whole, the way PEFT takes them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor, nn

from rankloom.artifacts.handle import Handle

__all__ = ["Whole", "whole_entries"]


@dataclass
class Whole:
    """Tensors by PEFT's key, the modules to save, whether adapted modules bring biases, and what PEFT loads in place."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    biases: bool = False
    in_place: list[str] = field(default_factory=list)


def whole_entries(handle: Handle, adapted: Collection[str]) -> Whole:
    """What to write for every parameter trained whole, under every name it has (PEFT copies modules, so ties part).

    A parameter of an ordinary leaf module makes that module one of PEFT's ``modules_to_save``. The bias of an adapted
    module goes under its base layer, as PEFT's ``bias="lora_only"`` has it. What is left (a parameter of a container, or a
    module whose name PEFT's matching by ending would confuse with another's) goes under its own name, which PEFT loads
    straight into the base model.
    """
    made = Whole()
    trained = {id(original): new.detach() for original, new in handle.trained_whole().values()}
    trained |= {id(new): new.detach() for _, new in handle.trained_whole().values()}
    names = [name for name, _ in handle.model.named_modules(remove_duplicate=False)]
    for name, module in handle.model.named_modules(remove_duplicate=False):
        own = {k: trained[id(p)] for k, p in module._parameters.items() if id(p) in trained}
        if not own:
            continue
        if name in adapted:
            made.tensors.update({f"{name}.base_layer.{k}": t for k, t in own.items()})
            made.biases = True
        elif _is_leaf(module) and _matches_alone(name, names, adapted):
            made.modules.append(name)
            state = {k: t.detach() for k, t in module.state_dict().items() if not k.startswith("rankloom.")}
            made.tensors.update({f"{name}.{k}": t for k, t in {**state, **own}.items()})
        else:
            keys = {f"{name}.{k}".lstrip("."): t for k, t in own.items()}
            made.tensors.update(keys)
            made.in_place.extend(keys)
    return made


def _is_leaf(module: nn.Module) -> bool:
    return all(name == "rankloom" for name, _ in module.named_children())


def _matches_alone(name: str, names: list[str], adapted: Collection[str]) -> bool:
    """PEFT saves every module whose name ends so, and adapts none whose name it occurs in."""
    ends = [other for other in names if other.endswith(name)] == [name]
    return ends and not any(re.match(rf"(^|.*\.){name}($|\..*)", other) for other in adapted)
