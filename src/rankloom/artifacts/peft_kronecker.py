"""Reading PEFT's LoKr and LoHa: the same factors under the same settings, so nothing is approximated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rankloom.adapters import AdapterPart, LoHa, LoKr
from rankloom.artifacts.peft_format import CONFIG, PREFIX, WEIGHTS
from rankloom.artifacts.store import Stored
from rankloom.artifacts.targeting import targets_for
from rankloom.artifacts.whole import whole_tensors
from rankloom.errors import ArtifactError
from rankloom.init import OwnStart
from rankloom.recipe import Recipe
from rankloom.targets import Target, layer_of

__all__ = ["KINDS", "READ", "kronecker_recipe"]

KINDS = {"LOKR": "lokr", "LOHA": "hada"}  # PEFT's type, and the prefix of its tensors
READ = frozenset(
    ("peft_type", "r", "alpha", "decompose_both", "decompose_factor", "init_weights")
    + ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform")
)


def kronecker_recipe(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> Stored:
    """The recipe and tensors of a LoKr or LoHa folder; what it targets and where it came from is left to the caller.

    Raises:
        ArtifactError: tensors missing, unknown or of another shape.
    """
    factor = re.compile(rf"(?P<module>.+)\.{KINDS[config['peft_type']]}_(?P<part>[wt]\d(?:_[ab])?)")
    part, modules = _part(config), dict(model.named_modules())
    adapted: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        if (match := factor.fullmatch(key.removeprefix(PREFIX))) is None:
            rest[key.removeprefix(PREFIX)] = tensor
        else:
            adapted.setdefault(match["module"], {})[match["part"]] = tensor
    if not adapted:
        raise ArtifactError(f"{folder / WEIGHTS} adapts no module: there is nothing to load")
    own: dict[str, Tensor] = {}
    for name, parts in adapted.items():
        layer = layer_of(modules[name]) if name in modules else None
        if layer is None:
            raise ArtifactError(
                f"{folder / WEIGHTS} adapts {name}, which this model does not have: load the base it was made on"
            )
        shapes = {n: tuple(p.shape) for n, p in part.build(Target(name, layer, name)).named_parameters()}
        flat = {n: t.flatten(1) for n, t in parts.items()}  # a convolution's kernel lies in the last dimensions
        if {n: tuple(t.shape) for n, t in flat.items()} != shapes:
            found = ", ".join(f"{n} {tuple(t.shape)}" for n, t in sorted(parts.items()))
            wanted = ", ".join(f"{n} {shape}" for n, shape in sorted(shapes.items()))
            raise ArtifactError(
                f"{folder / WEIGHTS}: {name} has {found}, {CONFIG} and this model say {wanted}: load the base it was made on"
            )
        own |= {f"{name}.{n}": tensor for n, tensor in flat.items()}
    whole = whole_tensors(rest, model, set(adapted), folder / WEIGHTS)
    recipe = Recipe(targets=targets_for(adapted, whole, model), adapter=part, init=OwnStart())
    own |= {f"whole.{name}": tensor for name, tensor in whole.items()}
    return Stored(recipe, own, None, {}, {})


def _part(config: Mapping[str, Any]) -> AdapterPart:
    rank, alpha = int(config["r"]), float(config["alpha"])
    if config["peft_type"] == "LOHA":
        return LoHa(rank=rank, alpha=alpha)
    return LoKr(
        rank=rank,
        alpha=alpha,
        decompose_both=bool(config.get("decompose_both")),
        decompose_factor=int(config.get("decompose_factor") or -1),
        zero="w2" if config.get("init_weights") == "lycoris" else "w1",
    )
