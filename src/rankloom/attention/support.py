"""Which calls of an attention function an approximation may answer, and why not the others."""

from __future__ import annotations

from typing import Any
from weakref import ref

from torch import Tensor, nn

from rankloom.attention.masks import Plain, plain

__all__ = ["Support"]

# What models hand to every attention function, and plain attention does not read.
_IGNORED = {
    "cache_position",
    "is_causal",
    "num_items_in_batch",
    "output_hidden_states",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
}


class Support:
    """What is attended to, where an approximation may do that, or the reason why none may.

    Sequences of fewer than ``min_length`` tokens, and evaluation unless ``evaluate``, are left to exact attention.
    """

    def __init__(self, min_length: int, evaluate: bool) -> None:
        self.min_length, self.evaluate = min_length, evaluate
        self._mask: tuple[ref[Tensor], Plain | None] | None = None

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, dropout: float, kwargs: dict[str, Any]
    ) -> Plain | str:
        length, window, causal = key.shape[2], kwargs.get("sliding_window"), kwargs.get("is_causal")
        given = {name for name, value in kwargs.items() if value is not None and value is not False} - _IGNORED
        reasons = {
            "evaluation": not (module.training or self.evaluate),
            "cache": query.shape[2] != length,
            "short": length < self.min_length,
            "dropout": dropout > 0,
            "softcap": "softcap" in given,
            "attention bias": "position_bias" in given,
            "sliding window": window is not None and window <= length,
            f"argument {', '.join(sorted(given))}": bool(given),
            "mask": mask is not None and not isinstance(mask, Tensor),
        }
        if (reason := next((reason for reason, holds in reasons.items() if holds), None)) is not None:
            return reason
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        found = self._understood(mask, causal, len(query), length)
        if found is None:
            return "mask"
        return found if found.shortest >= self.min_length else "short"

    def _understood(self, mask: Tensor | None, causal: bool, batch: int, length: int) -> Plain | None:
        """:func:`plain`, asked once about the one mask that all layers of a pass share."""
        if mask is None:
            return plain(None, causal=causal, batch=batch, length=length)
        if self._mask is None or self._mask[0]() is not mask:
            self._mask = ref(mask), plain(mask, causal=causal, batch=batch, length=length)
        return self._mask[1]
