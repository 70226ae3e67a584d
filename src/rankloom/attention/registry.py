"""A model's attention function exchanged for another, through transformers' ``AttentionInterface``, and put back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from torch import Tensor, nn

from rankloom.attended import FOLLOWED
from rankloom.errors import AttentionError

__all__ = ["Replaced"]

_PREFIX = "rankloom_limits_"
_numbers = count()

Function = Callable[..., tuple[Tensor, Tensor | None]]


class Replaced:
    """``function`` is called wherever ``model`` attends, with what the model's own function, ``exact``, was called with.

    Masks are made as for ``exact``. :meth:`undo` restores the model.

    Raises:
        AttentionError: the model does not go through the registry, or its attention function cannot be wrapped.
    """

    def __init__(self, model: nn.Module, function: Function) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

        loose: Any = model
        self._model = loose
        self._before = _implementation(model)
        self._name = f"{_PREFIX}{next(_numbers)}"
        self.exact: Function = FUNCTIONS[self._before]
        FUNCTIONS.register(self._name, function)
        if self._before in MASKS:
            MASKS.register(self._name, MASKS[self._before])
        self._model.set_attn_implementation(self._name)
        if self._model.config._attn_implementation != self._name:
            self.undo()
            raise AttentionError(_no_registry(model))

    def undo(self) -> None:
        """Give the model its own function back. Nothing happens the second time."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

        if self._name in FUNCTIONS:
            self._model.set_attn_implementation(self._before)
            for registry in (FUNCTIONS, MASKS):  # there is a public way in, but none out
                registry._global_mapping.pop(self._name, None)


def _implementation(model: nn.Module) -> str:
    """The name of the attention function that all parts of a model use."""
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    names = {str(name) for c in configs.values() if (name := getattr(c, "_attn_implementation", None)) is not None}
    if not names or not hasattr(model, "set_attn_implementation"):
        raise AttentionError(_no_registry(model))
    if any(name.startswith(_PREFIX) for name in names):
        raise AttentionError("this model's attention is accelerated already: call remove() on that handle first")
    if FOLLOWED in names:
        raise AttentionError(
            "a layer adapter follows this model's attention, which has to stay exact: detach() it first"
        )
    if len(names) > 1 or "eager" in names:
        # "eager" also returns the attention weights, which an approximation does not have.
        raise AttentionError(
            f"the model attends by {', '.join(sorted(names))}: call model.set_attn_implementation('sdpa') first"
        )
    return names.pop()


def _no_registry(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} does not attend through transformers' AttentionInterface, so nothing can be accelerated: "
        "pass a transformers model that takes set_attn_implementation"
    )
