"""A run as eight independent choices: compose, check, print, and round-trip through YAML and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from rankloom.adapters import AdapterPart, LoRA
from rankloom.adapters.lora import Rank
from rankloom.base import AsLoaded, BasePart
from rankloom.errors import CompositionError, RecipeError, near_names
from rankloom.init import InitPart, Kaiming
from rankloom.lifecycle import LifecyclePart, Once
from rankloom.optim import AdamW, OptimizerPart
from rankloom.parts import SLOTS, Part, offering, part_from_dict
from rankloom.rank import Fixed, RankPart
from rankloom.routing import Single
from rankloom.targets import Target, Targets, exact_pattern, whole_parameters

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Which weights, which form, which start, which ranks over time, which updates, which routing, storage, lifecycle."""

    targets: Targets = Targets()
    adapter: AdapterPart = dataclasses.field(default_factory=LoRA)
    init: InitPart = Kaiming()
    rank: RankPart = Fixed()
    optimizer: OptimizerPart = AdamW()
    routing: Part = Single()
    base: BasePart = AsLoaded()
    lifecycle: LifecyclePart = Once()

    def parts(self) -> dict[str, Part]:
        """The parts by slot."""
        return {slot: getattr(self, slot) for slot in SLOTS}

    def check(self, model: nn.Module | None = None) -> list[Target]:
        """Raise before anything is allocated where the parts cannot work together, or on ``model``.

        Returns:
            The weights of ``model`` that would be adapted; empty without a model.

        Raises:
            CompositionError: a part needs what no other part offers (names both and what would work instead), or the model
                is not stored as the recipe's base says.
            TargetError: a pattern matches nothing on ``model``, a rank does not fit, a tie is undeclared.
        """
        for part in self.parts().values():
            part.check()
        for slot, part in self.parts().items():
            for need in sorted(part.needs):
                if not any(need in other.offers for other in self.parts().values()):
                    raise CompositionError(self._impossible(slot, part, need))
        if model is None:
            return []
        targets = self.adapter.targets_on(model, self.targets)
        if not targets and not whole_parameters(model, self.targets, targets):
            raise CompositionError("the recipe adapts nothing on this model: give targets.modules or targets.train")
        self.adapter.check_on(targets)
        self.optimizer.check_on(targets)
        self.base.check_on(model, self.targets)
        return targets

    def _impossible(self, slot: str, part: Part, need: str) -> str:
        offers = {s: found for s in SLOTS if (found := offering(s, need))}
        lacking = next(iter(offers), "adapter")
        instead = [f"{s} {hint!r}" for s, found in offers.items() for hint in found]
        return (
            f"{slot} {part.kind!r} needs {need}, which {lacking} {self.parts()[lacking].variant()!r} does not have; "
            f"it works with {', '.join(instead) or 'no registered part'}"
        )

    def with_ranks(self, ranks: Mapping[str, int]) -> Recipe:
        """A copy with a rank for every target, alpha in proportion to it; targets of rank 0 are no longer targets.

        Raises:
            CompositionError: the adapter has no ranks.
        """
        if not hasattr(self.adapter, "rank_pattern"):
            raise CompositionError(f"adapter {self.adapter.kind!r} has no ranks to redistribute")
        settings: Any = self.adapter
        pattern: dict[str, Rank] = {}
        alphas = {}
        for name, rank in ranks.items():
            if (before := settings.rank_of(name)) == "full":
                raise CompositionError(f"adapter.rank='full' leaves no ranks to redistribute on {name}: give a number")
            if rank and rank != before:
                key = exact_pattern(name, ranks)
                pattern[key] = rank
                if hasattr(settings, "alpha_pattern"):
                    alphas[key] = settings.alpha_of(name) * rank / before
        kept = [name for name, rank in ranks.items() if rank]
        if not kept:
            raise CompositionError("the redistribution of ranks leaves no target: raise adapter.rank")
        targets = self.targets
        if len(kept) < len(ranks):
            targets = dataclasses.replace(
                targets, modules=tuple(exact_pattern(name, kept) for name in kept), exclude=()
            )
        changed = {"rank_pattern": settings.rank_pattern | pattern}
        if alphas:
            changed["alpha_pattern"] = settings.alpha_pattern | alphas
        adapter = dataclasses.replace(settings, **changed)
        return dataclasses.replace(self, targets=targets, adapter=adapter)

    def to_dict(self) -> dict[str, Any]:
        """The plain form: every slot, every setting."""
        return {slot: part.to_dict() for slot, part in self.parts().items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recipe:
        """Rebuild from the plain form; slots left out take their defaults.

        Raises:
            RecipeError: an unknown slot, kind or setting (near names shown), or a value of the wrong type.
        """
        for slot in plain:
            if slot not in SLOTS:
                raise RecipeError(f"a recipe has no slot {slot!r}{near_names(slot, SLOTS)} (slots: {', '.join(SLOTS)})")
        return cls(**{slot: cast(Any, part_from_dict(slot, fields)) for slot, fields in plain.items()})

    def to_json(self) -> str:
        """The plain form as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """The plain form as YAML."""
        import yaml  # a fifth of what importing rankloom would take, and most programs read no YAML

        return yaml.safe_dump(json.loads(json.dumps(self.to_dict())), sort_keys=False)

    @classmethod
    def from_text(cls, text: str) -> Recipe:
        """Read YAML (JSON is YAML)."""
        import yaml

        try:
            plain = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"the recipe is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(plain, dict):
            raise RecipeError("a recipe is a mapping of slots, such as {adapter: {kind: lora, rank: 8}}")
        return cls.from_dict(plain)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a YAML or JSON file."""
        try:
            return cls.from_text(Path(path).read_text())
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from None

    def with_(self, changes: Mapping[str, Any] | None = None, **slots: Part | Mapping[str, Any] | str) -> Recipe:
        """A copy with parts replaced (``init="kaiming"``) or settings changed (``{"adapter.rank": 16}``).

        A mapping for a slot changes settings of the part that is there, unless it names another ``kind``.
        """
        plain: dict[str, Any] = self.to_dict()
        for slot, value in slots.items():
            plain[slot] = _merged(plain.get(slot, {}), value)
        for path, value in (changes or {}).items():
            slot, _, setting = path.partition(".")
            if setting.split(".")[0] == "kind":
                plain[slot] = {"kind": value}
            else:
                plain[slot] = _merged(plain.get(slot, {}), {setting: value} if setting else value)
        return type(self).from_dict(plain)

    def expand(self) -> str:
        """The composition as text: a line a slot, with every setting that differs from its part's default."""
        return "\n".join(f"{slot:<10} {_line(part)}" for slot, part in self.parts().items())


def _merged(current: Mapping[str, Any], value: Any) -> Any:
    if isinstance(value, Part):
        return value.to_dict()
    if isinstance(value, Mapping) and value.get("kind", current.get("kind")) == current.get("kind"):
        return {**current, **value}
    return value


def _line(part: Part) -> str:
    defaults = type(part)()  # every setting of every part has a default
    changed = [
        f"{f.name}={getattr(part, f.name)!r}"
        for f in dataclasses.fields(part)
        if getattr(part, f.name) != getattr(defaults, f.name)
    ]
    summary = (type(part).__doc__ or "").strip().split("\n")[0].replace("``", "").rstrip(".,:;")
    return f"{part.kind}({', '.join(changed)})  # {summary}"
