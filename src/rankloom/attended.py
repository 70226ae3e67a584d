"""What a decoder layer's adapter sees: the hidden state after attention, and the attention that made it.

The attention module finds a stand-in for its configuration, which names our entry of transformers' registry of attention
functions: it notes queries, keys and mask, and calls the function that the model is set to. The rest of the model reads its own
configuration, so masks and outputs are made as always.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.blocks import IMPLEMENTATIONS, Block
from rankloom.errors import AttentionError

__all__ = ["FOLLOWED", "Attention", "AttentionSite", "BlockSite", "follow", "unfollow"]

FOLLOWED = "rankloom_followed"


@dataclass
class Attention:
    """One call: ``query`` (B, H, n, d_h) of n new tokens, ``key`` (B, H / g, N, d_h) of all, rotated and normed as the softmax
    sees them, ``mask`` (boolean or additive, (B or 1, 1, n, N); None: causal), ``scale`` of the logits.

    ``memory``: the layers of the key-value cache that earlier keys come from, and which of them is this one's; or None.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float
    memory: tuple[list[Any], int] | None = None

    def of_keys(self, x: Tensor) -> Tensor:
        """Features (B, N, d) of every token that is a key, from ``x`` (B, n, d) of the new ones; earlier calls' are remembered.

        They are kept in the cache beside the keys, and cropped, repeated, selected and reordered with them.

        Raises:
            AttentionError: keys without features, as after filling the cache without the adapter, or a kind of cache that
                moves its keys in ways unknown here.
        """
        past = self.key.shape[2] - self.query.shape[2]
        if self.memory is None and past:
            raise AttentionError("keys of other calls reached a layer adapter without a cache: pass past_key_values")
        if self.memory is None:
            return x
        return _remembering(*self.memory).extend(x, past)


class _Remembering:
    """Mixed into a cache layer: ``features`` (B, N, d) beside ``keys``, which go wherever those go."""

    keys: Tensor | None
    features: Tensor | None

    def extend(self, x: Tensor, past: int) -> Tensor:
        known = self.features
        if past and (known is None or len(known) != len(x) or known.shape[1] < past):
            raise AttentionError(
                "the key-value cache holds tokens that passed this layer without its adapter: start with an empty cache"
            )
        whole = x if known is None or not past else torch.cat([known, x], dim=1)
        self.features = self._beside_keys(whole)
        return whole[:, whole.shape[1] - past - x.shape[1] :]

    def _beside_keys(self, features: Tensor) -> Tensor | None:
        # A sliding window keeps the last keys only.
        return None if self.keys is None else features[:, max(features.shape[1] - self.keys.shape[-2], 0) :]

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if self.features is not None:
            self.features = self._beside_keys(self.features[:, : self.features.shape[1] + tokens_to_remove])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.batch_features(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.batch_features(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.features is not None:
            self.features = self.features.repeat_interleave(repeats, dim=0)

    def batch_features(self, indices: Tensor) -> None:
        if self.features is not None:
            self.features = self.features[indices.to(self.features.device)]


_CLASSES: dict[type, Any] = {}


def _remembering(layers: list[Any], index: int) -> _Remembering:
    """A layer of the cache, which is replaced by one that remembers."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layer = layers[index]
    if isinstance(layer, _Remembering):
        return layer
    cls = type(layer)
    if cls not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise AttentionError(
            f"a cache of {cls.__name__} cannot carry a layer adapter's features: generate with the default, dynamic cache"
        )
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Remembering{cls.__name__}", (_Remembering, cls), {"__module__": __name__})
    remembering: Any = _CLASSES[cls].__new__(_CLASSES[cls])
    remembering.__dict__ = {**layer.__dict__, "features": None}
    layers[index] = remembering
    found: _Remembering = remembering
    return found


class BlockSite:
    """Forward of a decoder layer: as always, while its attention knows what the layer was given."""

    def __init__(self, block: Block, attention: AttentionSite) -> None:
        self.block, self.attention = block, attention

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.attention.residual = args[0] if args else kwargs["hidden_states"]
        try:
            return self.block.run(self.block.module, *args, **kwargs)
        finally:
            self.attention.residual = None


class AttentionSite:
    """Forward of a self-attention module: its own output, and what the adapter adds to ``h``, the residual and that output."""

    def __init__(self, block: Block, adapter: nn.Module) -> None:
        self.block, self.adapter = block, adapter
        self.residual: Tensor | None = None
        self.seen: Attention | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            out, *rest = self.block.attend(self.block.attention, *args, **kwargs)
            residual, seen = self.residual, self.seen
        finally:
            self.seen = None
        if residual is None or seen is None:
            raise AttentionError(
                "a layer adapter's attention module ran outside its decoder layer: call the model, not parts of it"
            )
        cache: Any = kwargs.get("past_key_values")
        if cache is not None:
            loose: Any = self.block.attention
            seen.memory = cache.layers, loose.layer_idx
        return out + self.adapter(residual + out, seen), *rest


class _Configuration:
    """A configuration that names our attention function and is the model's own in everything else."""

    _attn_implementation = FOLLOWED

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["config"], name) if "config" in self.__dict__ else self.__getattribute__(name)


def follow(block: Block) -> None:
    """Have the block's attention call :func:`_followed`."""
    from transformers import AttentionInterface

    AttentionInterface.register(FOLLOWED, _followed)
    loose: Any = block.attention
    loose.config = _Configuration(loose.config)


def unfollow(block: Block) -> None:
    """Undo :func:`follow`."""
    loose: Any = block.attention
    loose.config = loose.config.config


def _followed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """Note what attention is given, then attend as the model is set to."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    loose: Any = module
    name, site = loose.config.config._attn_implementation, module.__dict__["_rankloom_forward"]
    if name not in IMPLEMENTATIONS:
        raise AttentionError(
            f"layer adapters read the masks of {' and '.join(IMPLEMENTATIONS)} attention, and the model now attends by "
            f"{name!r}: call model.set_attn_implementation('sdpa')"
        )
    if attention_mask is not None and (attention_mask.dim() != 4 or attention_mask.shape[1] != 1):
        raise AttentionError(
            f"a layer adapter reads one mask for all heads, not one of shape {tuple(attention_mask.shape)}: pass (batch, 1, "
            f"queries, keys)"
        )
    scale = options.get("scaling")
    site.seen = Attention(query, key, attention_mask, query.shape[-1] ** -0.5 if scale is None else scale)
    attend = site.block.eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    return attend(module, query, key, value, attention_mask, **options)
