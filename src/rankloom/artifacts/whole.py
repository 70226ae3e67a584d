"""Parameters trained whole, the way PEFT takes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from rankloom.artifacts.handle import Handle
from rankloom.errors import ArtifactError

__all__ = ["Whole", "whole_entries", "whole_tensors"]


@dataclass
class Whole:
    """Tensors by PEFT's key, the modules to save, whether adapted modules bring biases, and what PEFT loads in place."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    biases: bool = False
    in_place: list[str] = field(default_factory=list)


def whole_entries(handle: Handle, adapted: Collection[str], biases: Mapping[str, Tensor]) -> Whole:
    """What to write for every parameter trained whole, under every name it has (PEFT copies modules, so ties part), and for the
    ``biases`` of adapted modules, by module, that the form has moved.

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
        own |= {"bias": biases[name]} if name in biases else {}
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


def whole_tensors(
    rest: Mapping[str, Tensor], model: nn.Module, adapted: Collection[str], where: Path
) -> dict[str, Tensor]:
    """The reverse: what a PEFT file has beside its factors, as parameters trained whole, by their first name here.

    Raises:
        ArtifactError: a tensor without a place here, another shape, or a tie that the file has parted.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    strangers = []
    for key, tensor in rest.items():
        name = key.replace(".base_layer.", ".")
        held = parameters.get(name)
        if held is None or (name.rpartition(".")[0] in adapted and name.endswith(".weight")):
            # Copies of what the base has (buffers of a saved module, an adapted embedding's own weight) say nothing new.
            if not _same(model, name, tensor):
                strangers.append(key)
            continue
        if held.shape != tensor.shape:
            raise ArtifactError(
                f"{name} has shape {tuple(tensor.shape)} in {where}, {tuple(held.shape)} in this model: resize the model "
                f"(resize_token_embeddings, num_labels) as it was in training"
            )
        if not torch.equal(found.setdefault(first[id(held)], tensor), tensor):
            raise ArtifactError(
                f"{name} is tied to {first[id(held)]} here, but {where} has different values: untie them first"
            )
    if strangers:
        raise ArtifactError(
            f"{len(strangers)} of {len(rest)} further tensors in {where} have no place in this model or differ from its own "
            f"(as {strangers[0]}): load the base model it was made on"
        )
    _refuse_parted(rest, found, parameters, first, where)
    return found


def _same(model: nn.Module, name: str, tensor: Tensor) -> bool:
    own = dict(model.state_dict()).get(name)
    return own is not None and own.shape == tensor.shape and torch.equal(own, tensor.to(own.dtype).to(own.device))


def _refuse_parted(
    rest: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    first: Mapping[int, str],
    where: Path,
) -> None:
    """One of two tied names in the file means the other stayed as it was: values that one parameter cannot have."""
    given = {key.replace(".base_layer.", ".") for key in rest}
    for name, held in parameters.items():
        source = first[id(held)]
        if source in found and name not in given and not torch.equal(held, found[source].to(held.dtype)):
            raise ArtifactError(
                f"{where} does not train {name} whole, whose weight this model ties to one that it does: load the model with "
                f"tie_word_embeddings=False"
            )
