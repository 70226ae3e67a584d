"""Nearly-linear attention inside a model: ``accelerate_attention(model, eps)`` through transformers' attention registry.

Per layer and key head (with the ``g`` query heads that share it) a training step runs either the model's own attention
function, bit for bit, or the fastest :class:`~rankloom.attention.factored.Factored` whose certificate promised a relative
error of output and gradients of at most ``eps`` (arXiv 2406.03136).

The clock is the optimizer's. On a step that is due (the first, then every ``refresh``-th) each head's queries, keys, values and
output gradient are looked at as the backward pass brings them, and a :class:`~rankloom.attention.fitting.Fit` is made of
them. It comes into force with the next optimizer step and not earlier. So no token ever meets statistics of its own
sequence's future, a recomputed forward pass (gradient checkpointing) decides as the first one did, and all micro-batches
of a step are treated alike.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from types import TracebackType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from rankloom.attention.cost import CostModel, calibrate
from rankloom.attention.heads import Layer, Tensors, observe
from rankloom.attention.masks import Plain, plain
from rankloom.attention.registry import Replaced
from rankloom.errors import ArtifactError, AttentionError

__all__ = ["AcceleratedAttention", "accelerate_attention"]

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


def accelerate_attention(
    model: nn.Module,
    eps: float = 1e-2,
    *,
    refresh: int = 50,
    hysteresis: float = 2.0,
    min_length: int = 2048,
    evaluate: bool = False,
    cost: CostModel | None = None,
    seed: int = 0,
) -> AcceleratedAttention:
    """Accelerate the attention heads whose norms allow it; everything else runs as it did, bit for bit.

    Args:
        model: a transformers model that attends through ``AttentionInterface``; adapters in it do not matter.
        eps: the largest certified relative error of a head's output and of its dQ, dK and dV.
        refresh: optimizer steps between two measurements.
        hysteresis: a head that failed, or a factor cheaper than the one in use, must pass ``eps / hysteresis``.
        min_length: shorter sequences are neither accelerated nor measured.
        evaluate: use the fits in eval mode as well; by default evaluation and generation are exact.
        cost: predicted times, instead of those calibrated on this machine at first use (some seconds).
        seed: of the rows that are sampled.

    Returns:
        The handle, a context manager; ``handle.remove()`` gives the model its own attention back.

    Raises:
        AttentionError: settings out of range, or a model without the registry; while training, NaN in a head's inputs.
    """
    if not 0 < eps < 1:
        raise AttentionError(f"eps is a relative error between 0 and 1, got {eps}: try eps=1e-2")
    for name, value in (("refresh", refresh), ("hysteresis", hysteresis), ("min_length", min_length)):
        if not value >= 1:
            raise AttentionError(f"{name} must be at least 1, got {value}")
    return AcceleratedAttention(model, eps, refresh, hysteresis, min_length, evaluate, cost, seed)


class AcceleratedAttention:
    """The handle of :func:`accelerate_attention`.

    ``log[layer][what]`` counts key heads x forward passes by what ran there: a factor ("isotropic 153") or the reason for exact
    attention. Passes that gradient checkpointing repeats count once. ``steps`` counts optimizer steps.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        refresh: int,
        hysteresis: float,
        min_length: int,
        evaluate: bool,
        cost: CostModel | None,
        seed: int,
    ) -> None:
        self.model, self.eps, self.refresh, self.hysteresis = model, eps, refresh, hysteresis
        self.min_length, self.evaluate, self.cost, self.seed = min_length, evaluate, cost, seed
        self.steps = 0
        self.log: dict[str, Counter[str]] = {}
        self._stepped = False
        self._costs: dict[tuple[Any, ...], CostModel] = {}
        self._layers = {module: Layer(name, index) for index, (name, module) in enumerate(model.named_modules())}
        self._mask: tuple[ref[Tensor], Plain | None] | None = None
        self._replaced = Replaced(model, self._attend)
        self._hook = register_optimizer_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Give the model its own attention function back. The log stays readable."""
        self._hook.remove()
        self._replaced.undo()

    def __enter__(self) -> AcceleratedAttention:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def stepped(self) -> None:
        """Tell that weights have changed; only for loops without a ``torch.optim.Optimizer``, whose steps are seen anyway."""
        self._stepped = True

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        own = {id(p) for p in self.model.parameters()}
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            self.stepped()

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The registered function: ``query`` (B, H, L, d), ``key`` and ``value`` (B, H / g, L, .), output (B, L, H, d_v)."""
        if self._stepped and module.training and not _in_backward():
            for layer in self._layers.values():
                layer.advance(self.steps, self.refresh)
            self.steps, self._stepped = self.steps + 1, False

        def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
            return self._replaced.exact(module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs)

        known = self._layers.get(module)
        plain = self._plain(module, query, key, attention_mask, dropout, kwargs)
        if known is None or isinstance(plain, str):
            name, reason = ("?", "unknown layer") if known is None else (known.name, str(plain))
            self._count(name, {reason: key.shape[1]})
            return exact(query, key, value)
        given = Tensors(query, key, value, plain, query.shape[-1] ** -0.5 if scaling is None else scaling)
        heads = range(key.shape[1])
        parts, reasons = zip(*(known.attend(h, given, training=module.training) for h in heads), strict=True)
        self._count(known.name, Counter(reasons))
        weights = None
        if all(part is None for part in parts):
            out, weights = exact(query, key, value)
        else:
            out = self._join(parts, given, exact)
        if module.training and torch.is_grad_enabled() and self.steps >= known.due:
            known.require_finite(given)
            out = observe(out, given, lambda given, grad: self._measure(known, given, grad))
        return out, weights

    @staticmethod
    def _join(parts: tuple[Tensor | None, ...], given: Tensors, exact: Any) -> Tensor:
        """All heads' outputs in order, those that have none yet computed together by ``exact``."""
        done = {head: part for head, part in enumerate(parts) if part is not None}
        if rest := [head for head, part in enumerate(parts) if part is None]:
            rows = [row for head in rest for row in range(len(parts) * given.group)[given.queries(head)]]
            out, _ = exact(given.query[:, rows], given.key[:, rest], given.value[:, rest])
            done |= zip(rest, out.split(given.group, 2), strict=True)
        return torch.cat([done[head] for head in range(len(parts))], 2)

    def _plain(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, dropout: float, kwargs: dict[str, Any]
    ) -> Plain | str:
        """What is attended to, where an approximation may do that, or the reason why none may."""
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

    def _measure(self, layer: Layer, given: Tensors, grad: Tensor | None) -> None:
        layer.measure(given, grad, cost=self._cost_of, eps=self.eps, hysteresis=self.hysteresis, seed=self.seed)

    def _cost_of(self, given: Tensors) -> CostModel:
        if self.cost is not None:
            return self.cost
        q, d_v, group, causal = given.query, given.value.shape[-1], given.group, given.plain.causal
        place = (q.shape[-1], d_v, group, causal, str(q.device), str(q.dtype))
        if place not in self._costs:
            with torch.enable_grad():
                self._costs[place] = calibrate(
                    q.shape[-1], d_v, group=group, causal=causal, device=q.device, dtype=q.dtype
                )
        return self._costs[place]

    def _count(self, name: str, ran: dict[str, int]) -> None:
        if not _in_backward():  # a recomputed pass has been counted
            self.log.setdefault(name, Counter()).update(ran)

    @property
    def totals(self) -> Counter[str]:
        """The log over all layers."""
        return sum(self.log.values(), Counter())

    def report(self) -> dict[str, Any]:
        """What ran and why, in key heads x passes, and the fit in force of every measured head; plain values."""
        heads = [
            {"layer": layer.name, "head": head, "choice": chosen.reason, "error": chosen.error, "accelerated": used}
            for layer in self._layers.values()
            for head, chosen in sorted(layer.fits.items())
            for used in [chosen.approximation is not None]
        ]
        layers = {name: dict(ran) for name, ran in self.log.items()}
        return {"eps": self.eps, "steps": self.steps, "ran": dict(self.totals), "layers": layers, "heads": heads}

    def summary(self) -> str:
        """The report for people: how much of the attention ran how, and why."""
        heads, ran = self.report()["heads"], self.totals
        accelerated = sum(head["accelerated"] for head in heads)
        lines = [f"attention within {self.eps:g}: {accelerated} of {len(heads)} key heads measured are accelerated"]
        lines += [f"  {100 * times / ran.total():5.1f} %  {what}" for what, times in ran.most_common()]
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides, as tensors and plain values; with it a run continues to the same bits."""
        return {
            "steps": self.steps,
            "stepped": self._stepped,
            "layers": {layer.name: layer.state() for layer in self._layers.values() if layer.measured or layer.fits},
            "costs": [(place, asdict(cost)) for place, cost in self._costs.items()],
            "log": {name: dict(ran) for name, ran in self.log.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Raises :class:`ArtifactError` where the layers differ."""
        own = {layer.name: layer for layer in self._layers.values()}
        if strangers := sorted(state["layers"].keys() - own.keys()):
            raise ArtifactError(f"the attention state is of another model: this one has no layer {strangers[0]}")
        device = next(self.model.parameters()).device
        for name, stored in state["layers"].items():
            own[name].restore(stored, device)
        self._costs = {tuple(place): CostModel(**cost) for place, cost in state["costs"]}
        self.steps, self._stepped = state["steps"], state["stepped"]
        self.log = {name: Counter(ran) for name, ran in state["log"].items()}


def _in_backward() -> bool:
    """Whether this is a forward pass that a checkpoint repeats inside a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)
