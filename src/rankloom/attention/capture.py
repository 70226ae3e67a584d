"""What every attention layer of a model is given: queries, keys and values as the softmax sees them.

They are taken where transformers hands them to an attention function, so adapters, norms and position embedding are in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.calibration.data import quiet
from rankloom.errors import AttentionError, DataError, TargetError
from rankloom.quantized import differentiable

__all__ = ["Captured", "capture"]

_NAME = "rankloom_capture"


@dataclass
class Captured:
    """One call of one attention layer, for one sequence, in float32: ``q`` (h, L, d), ``k`` (h_k, L, d), ``v`` (h_k, L, d_v).

    ``grad`` (h, L, d_v) is the gradient of the batch's loss in the layer's output, ``None`` without a loss. ``unsupported``
    says why no approximation applies, whatever the norms: a mask other than the causal one, or a bias.
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool
    unsupported: str = ""
    grad: Tensor | None = None


def capture(model: nn.Module, batch: Mapping[str, Any]) -> list[Captured]:
    """Run ``model`` on ``batch`` (one sequence) and return its self-attention calls in order.

    Where the batch has labels the model's own loss is differentiated as well. Evaluation mode, no parameter gets a gradient,
    and the model's attention implementation is afterwards what it was before.

    Raises:
        TargetError: a model whose attention does not go through transformers' registry of attention functions, caps its
            logits or has learned sinks.
        DataError: more than one sequence, or a loss that is not finite. AttentionError: queries, keys or values that are not.
    """
    if any(isinstance(value, Tensor) and value.dim() and len(value) != 1 for value in batch.values()):
        raise DataError("a batch to probe holds one sequence: pass several batches of one instead")
    device = next(model.parameters()).device
    sent = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    calls: list[Captured] = []
    with quiet(model), differentiable(model), _registered(model, calls), torch.set_grad_enabled("labels" in batch):
        loss = getattr(model(**sent), "loss", None)
        if not calls:
            raise TargetError(
                f"{type(model).__name__} does not run its attention through transformers' registry of attention functions: "
                "the probe needs a transformers model that takes set_attn_implementation"
            )
        if loss is not None:
            if not torch.isfinite(loss):
                raise DataError(
                    f"the loss of the probed text is {float(loss.detach())}: check the data and the model's dtype"
                )
            loss.backward()
    for call in calls:
        if not all(bool(x.isfinite().all()) for x in (call.q, call.k, call.v)):
            raise AttentionError(
                f"{call.name}: queries, keys or values are not finite: check the model's weights and dtype"
            )
    return calls


@contextmanager
def _registered(model: nn.Module, calls: list[Captured]) -> Iterator[None]:
    """Send the model's attention through a function that keeps what it is given and then computes as SDPA does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    loose: Any = model
    if not hasattr(loose, "set_attn_implementation"):
        yield
        return
    names = {id(module): name for name, module in model.named_modules()}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        if id(module) in names and query.shape[2] == key.shape[2]:  # cross attention is another problem
            causal = options.get("is_causal")
            q, k, v = (x.detach()[0].float() for x in (query, key, value))
            call = Captured(
                names[id(module)],
                q,
                k,
                v,
                scale=options.get("scaling") or query.shape[-1] ** -0.5,
                causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
                unsupported=_unsupported(attention_mask, options),
            )
            calls.append(call)
            if torch.is_grad_enabled():
                if not out.requires_grad:
                    out.requires_grad_()  # everything is frozen, so the graph starts at the first layer's output

                def keep(grad: Tensor) -> None:
                    call.grad = grad[0].transpose(0, 1).float()

                out.register_hook(keep)
        return out, None

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "set_attn_implementation")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        loose.set_attn_implementation(_NAME)
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(_NAME, None)


def _unsupported(mask: Tensor | None, options: Mapping[str, Any]) -> str:
    """Why the layer's attention is not plain (causal) softmax attention, or nothing."""
    for name, said in (("softcap", "caps its logits"), ("s_aux", "has learned attention sinks")):
        if options.get(name) is not None:
            raise TargetError(
                f"this model's attention {said}, which the probe cannot follow: no head of it is supported"
            )
    if options.get("position_bias") is not None:
        return "a bias is added to its logits"
    return "" if mask is None else "its mask hides more than the future (a sliding window, padding, packed documents)"
