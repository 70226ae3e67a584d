"""The driver: raises schedule events from inside the optimizer's step, and guards the first step and every gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankloom.adapters import Trainable
from rankloom.errors import ArtifactError, GradientError
from rankloom.events import Schedule

__all__ = ["Driver"]


class Driver:
    """Sits on an optimizer's step hooks, so every loop that calls ``optimizer.step()`` drives the schedules.

    Before the update: extra losses add their gradients (once per step, however many micro-batches were accumulated), the
    first step checks that every trainable tensor has a gradient, ``before_clip``, gradients are checked to be finite and
    clipped, then ``after_backward``. After it: ``after_step`` and ``on_interval``. ``step`` counts finished steps.
    """

    def __init__(
        self, trainables: list[Trainable], schedules: list[Schedule], max_grad_norm: float | None, allow_unused: bool
    ) -> None:
        self.trainables, self.schedules = trainables, schedules
        self.max_grad_norm, self.allow_unused = max_grad_norm, allow_unused
        self.step, self.grad_norm = 0, float("nan")
        self._checked = allow_unused

    def attach(self, optimizer: Optimizer) -> None:
        """Follow an optimizer."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        for schedule in self.schedules:
            schedule.attached(optimizer)

    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model."""
        if module.training:
            for schedule in self.schedules:
                schedule.before_forward(self.step)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._checked:
            self._require_gradients()
        self._add_extra_losses()
        for schedule in self.schedules:
            schedule.before_clip(self.step)
        self._guard(optimizer)
        for schedule in self.schedules:
            schedule.after_backward(self.step)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        for schedule in self.schedules:
            schedule.after_step(self.step)
            if schedule.interval and self.step % schedule.interval == 0:
                schedule.on_interval(self.step)

    def _require_gradients(self) -> None:
        missing = [t.name for t in self.trainables if t.parameter.requires_grad and t.parameter.grad is None]
        if missing:
            names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise GradientError(
                f"no gradient reached {names}: with gradient checkpointing call model.enable_input_require_grads(); a module "
                f"the forward pass never uses belongs in targets.exclude (or pass allow_unused=True)"
            )
        self._checked = True

    def _add_extra_losses(self) -> None:
        with torch.enable_grad():
            extra = [loss for schedule in self.schedules if (loss := schedule.extra_loss(self.step)) is not None]
            if extra:
                torch.stack(extra).sum().backward()

    def _guard(self, optimizer: Optimizer) -> None:
        low: dict[Tensor, Tensor] = getattr(
            optimizer, "compressed", dict
        )()  # gradients that were taken to a subspace as soon as they came
        named = {t.name: low.get(t.parameter, t.parameter.grad) for t in self.trainables}
        grads = {name: grad for name, grad in named.items() if grad is not None}
        if not grads:
            return
        norm = nn.utils.get_total_norm(grads.values())
        self.grad_norm = float(norm)
        if not torch.isfinite(norm):
            bad = next((name for name, grad in grads.items() if not _finite(grad)), "?")
            raise GradientError(
                f"the gradient of {bad} is not finite at step {self.step + 1}; no weight was changed by this step: lower the "
                f"learning rate, clip gradients, or train in float32 or bfloat16"
            )
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_([t.parameter for t in self.trainables], self.max_grad_norm, norm)

    def state_dict(self) -> dict[str, Any]:
        """Step count and every schedule's state, flat: scalars and tensors by name."""
        flat: dict[str, Any] = {"step": self.step}
        for index, schedule in enumerate(self.schedules):
            flat.update({f"{index}.{key}": value for key, value in schedule.state_dict().items()})
        return flat

    def load_state_dict(self, flat: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Raises :class:`ArtifactError` where keys differ."""
        own, given = set(self.state_dict()), set(flat)
        if own != given:
            raise ArtifactError(
                f"the schedule state does not fit this recipe: missing {sorted(own - given)[:3]}, unexpected "
                f"{sorted(given - own)[:3]}; resume with the recipe and run length it was saved with"
            )
        self.step, self._checked = int(flat["step"]), True
        for index, schedule in enumerate(self.schedules):
            prefix = f"{index}."
            schedule.load_state_dict({k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)})


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
