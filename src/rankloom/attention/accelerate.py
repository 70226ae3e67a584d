"""Nearly-linear attention inside a model: ``accelerate_attention(model, eps)`` through transformers' attention registry.

Per layer and key head (with the ``g`` query heads that share it) a training step runs either the model's own attention
function, bit for bit, or the fastest :class:`~rankloom.attention.factored.Factored` whose certificate promised a relative
error of output and gradients of at most ``eps`` (arXiv 2406.03136).

The clock is the optimizer's. In a step that is a head's turn (:mod:`rankloom.attention.agenda`) its queries, keys, values and
output gradient are looked at as the backward pass brings them, and a :class:`~rankloom.attention.fitting.Fit` is made of
them. It comes into force with the next optimizer step and not earlier. So no token ever meets statistics of its own
sequence's future, a recomputed forward pass (gradient checkpointing) decides as the first one did, and all micro-batches
of a step are treated alike. Measuring takes a share of what exact attention does (:mod:`rankloom.attention.budget`), so a model
without a head that passes runs as fast as it did, give or take that share.
"""

from __future__ import annotations

from collections import Counter
from math import inf
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from rankloom.attention.agenda import plan
from rankloom.attention.budget import Budget
from rankloom.attention.calls import Tensors, in_backward, observe
from rankloom.attention.cost import CostModel, calibrate
from rankloom.attention.heads import Layer
from rankloom.attention.registry import Replaced
from rankloom.attention.summary import summary
from rankloom.attention.support import Support
from rankloom.errors import ArtifactError, AttentionError

__all__ = ["AcceleratedAttention", "accelerate_attention"]


def accelerate_attention(
    model: nn.Module,
    eps: float = 1e-2,
    *,
    refresh: int = 50,
    hysteresis: float = 2.0,
    min_length: int = 2048,
    evaluate: bool = False,
    cost: CostModel | None = None,
    budget: float = 0.04,
    total_steps: int | None = None,
    seed: int = 0,
) -> AcceleratedAttention:
    """Accelerate the attention heads whose norms allow it; everything else runs as it did, bit for bit.

    Args:
        model: a transformers model that attends through ``AttentionInterface``; adapters in it do not matter.
        eps: the largest certified relative error of a head's output and of its dQ, dK and dV.
        refresh: optimizer steps between two measurements of a head that passes; one that fails is asked later each time.
        hysteresis: a head that failed, or a factor cheaper than the one in use, must pass ``eps / hysteresis``.
        min_length: shorter sequences are neither accelerated nor measured.
        evaluate: use the fits in eval mode as well; by default evaluation and generation are exact.
        cost: predicted times, instead of those calibrated on this machine once they are paid for (some seconds).
        budget: share of the exact attention's predicted time that measurements may take, half of what was saved apart
            (:mod:`rankloom.attention.budget`).
        total_steps: optimizer steps of the whole run, where known: nothing is begun that the rest of it will not win back.
        seed: of the rows that are sampled.

    Returns:
        The handle, a context manager; ``handle.remove()`` gives the model its own attention back.

    Raises:
        AttentionError: settings out of range, or a model without the registry; while training, NaN in a head's inputs.
    """
    if not 0 < eps < 1:
        raise AttentionError(f"eps is a relative error between 0 and 1, got {eps}: try eps=1e-2")
    least_one = {"refresh": refresh, "hysteresis": hysteresis, "min_length": min_length, "total_steps": total_steps}
    for name, value in least_one.items():
        if value is not None and not value >= 1:
            raise AttentionError(f"{name} must be at least 1, got {value}")
    if not 0 <= budget < inf:
        raise AttentionError(f"budget is a share of exact attention's time, at least 0, got {budget}: try budget=0.04")
    account = Budget(budget, refresh, cost, total_steps)
    return AcceleratedAttention(model, eps, refresh, hysteresis, Support(min_length, evaluate), account, seed)


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
        support: Support,
        budget: Budget,
        seed: int,
    ) -> None:
        self.model, self.eps, self.refresh, self.hysteresis, self.seed = model, eps, refresh, hysteresis, seed
        self.steps = 0
        self.log: dict[str, Counter[str]] = {}
        self._stepped = False
        self._support, self._budget = support, budget
        self._layers = {module: Layer(name, index) for index, (name, module) in enumerate(model.named_modules())}
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
        if self._stepped and module.training and not in_backward():
            for layer in self._layers.values():
                layer.advance()
            self.steps, self._stepped = self.steps + 1, False
            plan(self._layers.values(), self._budget, self.steps)

        def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
            return self._replaced.exact(module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs)

        known = self._layers.get(module)
        plain = self._support(module, query, key, attention_mask, dropout, kwargs)
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
        if module.training and not in_backward():  # a reentrant checkpoint's first pass is without gradients
            known.book(reasons, [part is not None for part in parts], given, self._budget)
        if module.training and torch.is_grad_enabled() and known.asks:
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

    def _measure(self, layer: Layer, given: Tensors, grad: Tensor | None) -> None:
        layer.measure(
            given,
            grad,
            budget=self._budget,
            calibrate=self._calibrate,
            step=self.steps,
            refresh=self.refresh,
            eps=self.eps,
            hysteresis=self.hysteresis,
            seed=self.seed,
        )

    @staticmethod
    def _calibrate(given: Tensors) -> CostModel:
        q, d_v = given.query, given.value.shape[-1]
        with torch.enable_grad():
            return calibrate(
                q.shape[-1], d_v, group=given.group, causal=given.plain.causal, device=q.device, dtype=q.dtype
            )

    def _count(self, name: str, ran: dict[str, int]) -> None:
        if not in_backward():  # a recomputed pass has been counted
            self.log.setdefault(name, Counter()).update(ran)

    @property
    def totals(self) -> Counter[str]:
        """The log over all layers."""
        return sum(self.log.values(), Counter())

    def report(self) -> dict[str, Any]:
        """What ran and why, in key heads x passes, every head's fit and place in the queue, and the account; plain values."""
        return {
            "eps": self.eps,
            "steps": self.steps,
            "budget": self._budget.report(),
            "ran": dict(self.totals),
            "layers": {name: dict(ran) for name, ran in self.log.items()},
            "heads": [head for layer in self._layers.values() for head in layer.report(self.steps)],
        }

    def summary(self) -> str:
        """The report for people: how much of the attention ran how, and why."""
        return summary(self.report())

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides, as tensors and plain values; with it a run continues to the same bits."""
        return {
            "steps": self.steps,
            "stepped": self._stepped,
            "layers": {layer.name: layer.state() for layer in self._layers.values() if layer.lengths},
            "budget": self._budget.state(),
            "log": {name: dict(ran) for name, ran in self.log.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Raises :class:`ArtifactError` for the state of other layers or an earlier version."""
        if "budget" not in state:
            raise ArtifactError("the attention state was saved before measurements had a budget: start the run anew")
        own = {layer.name: layer for layer in self._layers.values()}
        if strangers := sorted(state["layers"].keys() - own.keys()):
            raise ArtifactError(f"the attention state is of another model: this one has no layer {strangers[0]}")
        device = next(self.model.parameters()).device
        for name, stored in state["layers"].items():
            own[name].restore(stored, device)
        self._budget.restore(state["budget"])
        self.steps, self._stepped = state["steps"], state["stepped"]
        self.log = {name: Counter(ran) for name, ran in state["log"].items()}
