"""Reading PEFT's forms beside LoRA: the same numbers under the same settings, so nothing is approximated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from rankloom.adapters import AdapterPart
from rankloom.artifacts.peft_banks import drawn, to_rows
from rankloom.artifacts.peft_format import CONFIG, PREFIX, WEIGHTS
from rankloom.artifacts.peft_kinds import KINDS, Config, PeftKind, of_type
from rankloom.artifacts.store import Stored
from rankloom.artifacts.targeting import require_targeted, targets_for
from rankloom.artifacts.whole import whole_tensors
from rankloom.errors import ArtifactError, RankloomError, near_names
from rankloom.init import OwnStart
from rankloom.layers import Conv2dLayer, layer_of
from rankloom.recipe import Recipe
from rankloom.targets import Target

__all__ = ["form_recipe"]


@dataclass
class _File:
    """The tensors of a file: by adapted module under PEFT's names, those all modules share, and what is left."""

    where: Path
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)


def form_recipe(folder: Path, config: Config, tensors: Mapping[str, Tensor], model: nn.Module) -> Stored:
    """The recipe and tensors of a folder of one of ``KINDS``; where it came from is left to the caller.

    Raises:
        ArtifactError: settings we do not have, tensors missing, unknown or of another shape, another base.
    """
    file = _sorted_out(folder, of_type(config["peft_type"]), tensors)
    targets = _targets(file, config, model)
    require_targeted(folder, config, file.modules, model)
    part = _part(folder, config, targets)
    kind = KINDS[part.kind]
    adapters = part.build_all(targets)
    own: dict[str, Tensor] = {}
    for target, adapter in zip(targets, adapters, strict=True):
        shapes = {kind.names[n]: tuple(p.shape) for n, p in adapter.named_parameters()}
        held = _matrices(file, target, shapes)
        own |= {f"{target.name}.{n}": t for n, t in adapter.state_dict().items()}  # hashes of what the seed gives
        own |= {f"{target.name}.{n}": held[kind.names[n]] for n, _ in adapter.named_parameters()}
    if kind.banks:
        rows = _banks(file, kind, config, targets)
        for index, (name, found) in enumerate(zip(kind.banks.values(), rows, strict=True)):
            key = f"{targets[0].name}.stored.{index}.rows"
            own[key] = _corner(found, own[key], file, name)
    whole = whole_tensors(file.rest, model, set(file.modules), file.where)
    recipe = Recipe(targets=targets_for(file.modules, whole, model), adapter=part, init=OwnStart())
    own |= {f"whole.{name}": tensor for name, tensor in whole.items()}
    return Stored(recipe, own)


def _sorted_out(folder: Path, kinds: list[PeftKind], tensors: Mapping[str, Tensor]) -> _File:
    file = _File(folder / WEIGHTS)
    names = "|".join(name for kind in kinds for name in kind.names.values())
    banks = "|".join(name for kind in kinds for name in kind.banks.values())
    of_module, of_all = re.compile(rf"(.+)\.({names})"), re.compile(rf"(?:.+\.)?({banks})" if banks else r"\b\B")
    for full, tensor in tensors.items():
        key = full.removeprefix(PREFIX)
        if match := of_module.fullmatch(key):
            file.modules.setdefault(match[1], {})[match[2]] = tensor
        elif match := of_all.fullmatch(key):  # RandLoRA's file repeats them under every module
            if not torch.equal(file.shared.setdefault(match[1], tensor), tensor):
                raise ArtifactError(
                    f"{file.where} has different {match[1]} for different modules: save it again in peft"
                )
        else:
            file.rest[key] = tensor
    if not file.modules:
        raise ArtifactError(f"{file.where} adapts no module: there is nothing to load")
    return file


def _targets(file: _File, config: Config, model: nn.Module) -> list[Target]:
    """The adapted modules in the model's order."""
    modules = dict(model.named_modules())
    for name in file.modules:
        if name not in modules or layer_of(modules[name]) is None:
            base = config.get("base_model_name_or_path")
            raise ArtifactError(
                f"{file.where} adapts {name}, which this model does not have{near_names(name, modules, 2)}: load the base it "
                f"was made on" + (f", {base}" if base else "")
            )
    layers = {name: layer_of(module) for name, module in modules.items() if name in file.modules}
    return [Target(name, layer, name) for name, layer in layers.items() if layer is not None]


def _part(folder: Path, config: Config, targets: list[Target]) -> AdapterPart:
    where = folder / CONFIG
    try:
        part = of_type(config["peft_type"])[0].part(config, [target.name for target in targets])
        part.check()
        part.check_on(targets)
    except KeyError as error:
        raise ArtifactError(f"{where} lacks {error.args[0]}: save the adapter again in peft") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ArtifactError(f"{where} has a setting that cannot be ({error}): save the adapter again in peft") from None
    except ArtifactError:
        raise
    except RankloomError as error:
        raise ArtifactError(f"{where} says what rankloom does not have ({error}): merge it in peft") from None
    return part


def _matrices(file: _File, target: Target, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a module, a convolution's kernel flattened, once their shapes are what the settings say."""
    found = dict(file.modules[target.name])
    given = ", ".join(f"{n} {tuple(t.shape)}" for n, t in sorted(found.items()))
    if isinstance(target.layer, Conv2dLayer):
        _contract(found)
        found = {n: t.flatten(1) if t.ndim > 1 else t for n, t in found.items()}
    if {n: tuple(t.shape) for n, t in found.items()} != dict(shapes):
        wanted = ", ".join(f"{n} {shape}" for n, shape in sorted(shapes.items()))
        raise ArtifactError(
            f"{file.where}: {target.name} has {given}, {CONFIG} and this model say {wanted}: load the base it was made on"
        )
    return found


def _contract(found: dict[str, Tensor]) -> None:
    """Tucker's form of a kernel, ``sum_ij a[i, o] t[i, j] b[j, c]`` for every offset, as two factors: ``a^T`` and ``t b``."""
    for core in [name for name in found if re.search(r"_t\d$", name)]:
        a, b = (re.sub(r"t(\d)$", rf"w\1_{side}", core) for side in "ab")
        shapes = [tuple(found[n].shape[:1]) for n in (a, b) if n in found and found[n].ndim == 2]
        if found[core].ndim == 4 and sum(shapes, ()) == tuple(found[core].shape[:2]):
            found[b] = torch.einsum("ijkl,jc->ickl", found.pop(core), found[b])
            found[a] = found[a].mT


def _banks(file: _File, kind: PeftKind, config: Config, targets: list[Target]) -> tuple[Tensor, Tensor]:
    """The shared matrices as rows: the file's, or drawn as PEFT draws them where it saved none."""
    if not config.get("save_projection", True):
        out, width = (max(target.shape[side] for target in targets) for side in (0, 1))
        a, b = drawn(config, out, width)
        return to_rows(a.to(targets[0].layer.dtype), b.to(targets[0].layer.dtype))  # as PEFT holds them beside the base
    if missing := [name for name in kind.banks.values() if name not in file.shared]:
        raise ArtifactError(f"{file.where} lacks {missing[0]}, which save_projection promises: save it again in peft")
    a, b = (file.shared[name] for name in kind.banks.values())
    rank = int(config["r"])
    if (a.ndim, b.ndim, len(a), b.shape[-1]) != (kind.dims, kind.dims, rank, rank) or a[0].numel() != a.shape[-1]:
        raise ArtifactError(
            f"{file.where}: the shared matrices have shapes {tuple(a.shape)} and {tuple(b.shape)}, which do not fit r = {rank} "
            f"in {CONFIG}: save it again in peft"
        )
    return to_rows(a, b)


def _corner(rows: Tensor, wanted: Tensor, file: _File, name: str) -> Tensor:
    """As much of a shared matrix as this model's modules read."""
    if any(have < want for have, want in zip(rows.shape, wanted.shape, strict=True)):
        raise ArtifactError(
            f"{file.where}: {name} has {tuple(rows.shape)} numbers by rank and side, this model's modules need "
            f"{tuple(wanted.shape)}: load the base it was made on"
        )
    return rows[: wanted.shape[0], : wanted.shape[1]].contiguous()
