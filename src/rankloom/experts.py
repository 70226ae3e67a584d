"""Running a mixture's experts with adapters: the module computes as always, on ``W + delta`` in place of its 3-D weights.

Whatever implementation of experts the model is set to (eager, batched, grouped products) reads the weights as attributes;
while it runs, those are the adapted stacks. The parameters themselves are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.adapters import Adapter, Binding, FactoredAdapter
from rankloom.errors import TargetError
from rankloom.kernels.experts import UpdatedStack, formed_again, updated_stack
from rankloom.layers import ExpertLayer

__all__ = ["Experts", "refuse_on_experts"]


def refuse_on_experts(bindings: list[Binding]) -> None:
    """Raise where a form cannot be added to a stack of weights: its update has to be a matrix, without dropout on its input."""
    for binding in bindings:
        if isinstance(binding.layer, ExpertLayer):
            adapter: Adapter = binding.adapter
            if not (adapter.linear_in_x and adapter.mergeable):
                raise TargetError(
                    f"{binding.name} is an expert in a stack of weights, and this form's update is no matrix: exclude it"
                )
            if getattr(adapter, "dropout", 0):
                raise TargetError(f"dropout cannot act on the inputs of {binding.name}: set adapter.dropout to 0")


class Experts:
    """Forward of an experts module whose stacks, or some of their matrices, are adapted."""

    def __init__(self, bindings: list[Binding]) -> None:
        first = bindings[0].layer
        self.module, self.run = first.module, first._forward
        self.stacks: dict[str, list[Binding]] = {}
        for binding in bindings:
            self.stacks.setdefault(cast(ExpertLayer, binding.layer).key, []).append(binding)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = {key: _stack(group) for key, group in self.stacks.items()}
        again = [stack for stack in made.values() if isinstance(stack, UpdatedStack)]
        weights = {key: s.made if isinstance(s, UpdatedStack) else s for key, s in made.items()}
        del made
        with self._reading(weights), formed_again(again):
            return self.run(self.module, *args, **kwargs)

    @contextmanager
    def _reading(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """An instance attribute comes before a module's parameter of that name."""
        self.module.__dict__.update(weights)
        try:
            yield
        finally:
            for key in weights:
                del self.module.__dict__[key]


def _stack(group: list[Binding]) -> UpdatedStack | Tensor:
    """The parameter with every update added: through factors where the forms have them, else through dense updates."""
    layers = [cast(ExpertLayer, b.layer) for b in group]
    layer = layers[0]
    weight, index = layer.parameter.detach(), [each.index for each in layers]
    if all(isinstance(b.adapter, FactoredAdapter) and _is_product(b.adapter) for b in group):
        factors = [b.adapter.effective() for b in group]
        widest = max(len(a) for _, a in factors)
        left = torch.stack(
            [F.pad(b.adapter.scale * l, (0, widest - l.shape[1])) for b, (l, _) in zip(group, factors, strict=True)]
        )
        right = torch.stack([F.pad(r, (0, 0, 0, widest - len(r))) for _, r in factors])
        left, right = (right.mT, left.mT) if layer.transposed else (left, right)
        return updated_stack(weight, left.to(weight.dtype), right.to(weight.dtype), index)
    deltas = torch.stack([b.layer.from_matrix(b.adapter.delta(b.layer)) for b in group])
    return weight.index_add(0, torch.tensor(index, device=weight.device), deltas.to(weight.dtype))


def _is_product(adapter: FactoredAdapter) -> bool:
    """Whether the update is just ``s L R``; forms that add to it (a magnitude, a chain) override ``delta``."""
    return type(adapter).delta is FactoredAdapter.delta
