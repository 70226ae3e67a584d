"""What every part of a recipe has in common: settings, the slot it fills, what it needs and offers, and its plain form.

A part is a small frozen dataclass of settings. ``@part(slot, kind)`` enters it in the registry under the two names that
YAML, JSON, manifests and error messages use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from rankloom.errors import RecipeError, near_names

if TYPE_CHECKING:
    import pydantic

__all__ = ["SLOTS", "Part", "kinds", "offering", "part", "part_from_dict"]

SLOTS = ("targets", "adapter", "init", "rank", "optimizer", "routing", "base", "lifecycle")


@dataclasses.dataclass(frozen=True)
class Part:
    """One choice on one axis of a recipe.

    ``needs`` and ``offers`` are names of capabilities. A recipe is possible when every need of every part is offered by
    another of its parts; they are properties because settings decide them (a LoRA with a diagonal core offers ranks).
    """

    slot: ClassVar[str]
    kind: ClassVar[str]
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    """Settings under which this part offers different things, the default first: messages name them as alternatives."""

    @property
    def needs(self) -> frozenset[str]:
        """Capabilities that other parts of the recipe have to offer."""
        return frozenset()

    @property
    def offers(self) -> frozenset[str]:
        """Capabilities that this part brings to the recipe."""
        return frozenset()

    def variant(self) -> str:
        """The kind, with the settings of the variant this is."""
        own = [v for v in self.variants if all(getattr(self, key) == value for key, value in v.items())]
        return _shown(self.kind, own[-1])

    def check(self) -> None:
        """Raise :class:`RecipeError` where the settings alone are impossible."""

    def to_dict(self) -> dict[str, Any]:
        """The plain form: ``kind`` and every setting."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


def _shown(kind: str, settings: Mapping[str, Any]) -> str:
    """A kind and settings as messages write them: ``lora(core=diagonal)``."""
    return kind + (f"({', '.join(f'{key}={value}' for key, value in settings.items())})" if settings else "")


def offering(slot: str, need: str) -> list[str]:
    """Kinds of a slot that offer a capability, with the settings that make them do so."""
    found = []
    for kind, cls in _REGISTRY[slot].items():
        variants = [settings for settings in cls.variants if need in cls(**settings).offers]
        found += [_shown(kind, settings) for settings in variants[:1]]
    return found


_REGISTRY: dict[str, dict[str, type[Part]]] = {slot: {} for slot in SLOTS}
P = TypeVar("P", bound=type[Part])


def part(slot: str, kind: str) -> Callable[[P], P]:
    """Class decorator: enter a part in the registry as ``kind`` of ``slot``."""

    def enter(cls: P) -> P:
        cls.slot, cls.kind = slot, kind
        _REGISTRY[slot][kind] = cls
        return cls

    return enter


def kinds(slot: str) -> Mapping[str, type[Part]]:
    """All registered parts of a slot by kind."""
    return _REGISTRY[slot]


def part_from_dict(slot: str, plain: Mapping[str, Any] | str) -> Part:
    """Rebuild a part from its plain form (or its kind alone), validating every setting.

    Raises:
        RecipeError: unknown kind or setting (with near names), or a value of the wrong type.
    """
    fields = {"kind": plain} if isinstance(plain, str) else dict(plain)
    registry = _REGISTRY[slot]
    kind = fields.pop("kind", next(iter(registry)) if len(registry) == 1 else None)
    if kind not in registry:
        known = ", ".join(sorted(registry))
        raise RecipeError(f"unknown {slot} {kind!r}{near_names(str(kind), registry)} (known: {known})")
    cls = registry[kind]
    settings = [f.name for f in dataclasses.fields(cls)]
    for name in fields:
        if name not in settings:
            hint = near_names(name, settings)
            raise RecipeError(
                f"{slot} {kind!r} has no setting {name!r}{hint} (settings: {', '.join(settings) or 'none'})"
            )
    return _validated(cls, fields)


@cache
def _validator(cls: Any) -> pydantic.TypeAdapter[Part]:
    import pydantic  # here, not above: only reading recipes needs it

    return pydantic.TypeAdapter(cls)


def _validated(cls: type[Part], fields: dict[str, Any]) -> Part:
    import pydantic

    try:
        made = _validator(cast(Any, cls)).validate_python(fields)
    except pydantic.ValidationError as error:
        first, *others = error.errors()
        path, said = first["loc"], first["msg"]
        # One value that fits none of a setting's types fails once a type, each under the setting's own path.
        if (same := [other for other in others if other["loc"][:-1] == path[:-1] and path[:-1]]) and same == others:
            path, said = path[:-1], " or ".join([said, *(other["msg"] for other in same)])
        where = ".".join(str(p) for p in path)
        raise RecipeError(f"{cls.slot} {cls.kind!r}: {where}: {said} (got {first['input']!r})") from None
    made.check()
    return made
