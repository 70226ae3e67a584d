"""``adapt(model, recipe) -> Adaptation``: the only file that rewires a model.

Attaching swaps a target module's class for a subclass whose ``forward`` goes through the adapter. The module object, its
name, its weights and every reference to it stay what they were; detaching swaps the class back.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankloom import artifacts
from rankloom.adapters import Binding, Trainable
from rankloom.attach import attach_modules, detach_modules, refuse_attached, swap_parameters
from rankloom.calibration import Calibration
from rankloom.calibration.data import mean_loss
from rankloom.drive import Driver
from rankloom.errors import ArtifactError, CompositionError, RankloomError
from rankloom.events import Schedule
from rankloom.experts import refuse_on_experts
from rankloom.init import InitContext
from rankloom.quantized import route, unroute
from rankloom.recipe import Recipe
from rankloom.targets import Target, whole_parameters

__all__ = ["Adaptation", "adapt", "load"]


class Adaptation:
    """A model with adapters attached, and everything that can be done with it. Made by :func:`adapt` or :func:`load`.

    ``model`` is the very object that was passed in; ``report`` says what the init did and took.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, seed: int = 0) -> None:
        refuse_attached(model)
        targets = recipe.check(model)
        self.model, self.recipe, self.seed = model, recipe, seed
        self.report: dict[str, Any] = {}
        self.bindings = [Binding(*pair) for pair in zip(targets, recipe.adapter.build_all(targets), strict=True)]
        refuse_on_experts(self.bindings)
        for binding in self.bindings if recipe.init.offset else ():
            binding.adapter.subtract_start()
        recipe.lifecycle.prepare(self.bindings, seed)
        self._whole = whole_parameters(model, recipe.targets, self.targets)
        self._flags = {p: p.requires_grad for p in model.parameters()}
        self._trained: dict[str, nn.Parameter] = {}
        self._driver: Driver | None = None
        self._optimizer: Optimizer | None = None
        self._hook: Any = None
        self._routed: list[nn.Module] = []  # quantised layers without an adapter: gradients have to pass them too
        self._merged: artifacts.MergeState | None = None
        self.attached = False

    @property
    def targets(self) -> list[Target]:
        """The adapted weights, in the model's order."""
        return [binding.target for binding in self.bindings]

    def attach(self) -> None:
        """Route the model through the adapters (done by :func:`adapt`; again after :meth:`detach` or :meth:`merge`)."""
        if self._merged is not None:
            self.unmerge()
        if self.attached:
            return
        refuse_attached(self.model)
        for parameter in self._flags:
            parameter.requires_grad_(False)
        for name, original in self._whole.items():
            if name not in self._trained:
                self._trained[name] = nn.Parameter(original.detach().clone())
            swap_parameters(self.model, original, self._trained[name])
        attach_modules(self.model, self.bindings)
        self._routed = route(self.model)
        self.attached = True
        self._watch_forward()

    def detach(self) -> nn.Module:
        """Give the model back as it was: the same module and parameter objects, bit for bit. The adapters stay here."""
        if self._merged is not None:
            self.unmerge()
        if self.attached:
            if self._hook is not None:
                self._hook.remove()
            unroute(self._routed)
            detach_modules(self.bindings)
            for name, original in self._whole.items():
                swap_parameters(self.model, self._trained[name], original)
            for parameter, flag in self._flags.items():
                parameter.requires_grad_(flag)
            self.attached = False
        return self.model

    @contextmanager
    def detached(self) -> Iterator[nn.Module]:
        """The bare model inside the block."""
        self.detach()
        try:
            yield self.model
        finally:
            self.attach()

    def trainables(self) -> list[Trainable]:
        """Everything the optimizer moves: adapter tensors with their roles, then parameters trained whole."""
        adapters = [t for binding in self.bindings for t in binding.trainables()]
        return adapters + [Trainable(f"whole.{name}", p, "whole", None) for name, p in self._trained.items()]

    def trained_whole(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Parameters trained whole, by name: the base's own, and the trained one that stands in for it."""
        return {name: (original, self._trained[name]) for name, original in self._whole.items()}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors by name."""
        return {t.name: t.parameter for t in self.trainables()}

    def parameters(self) -> list[nn.Parameter]:
        """Trainable tensors."""
        return [t.parameter for t in self.trainables()]

    def summary(self) -> str:
        """The line users know: trainable and all parameters, and their ratio."""
        trainable = sum(p.numel() for p in self.parameters())
        added = sum(t.parameter.numel() for t in self.trainables() if t.role not in ("dense", "whole"))
        everything = sum(p.numel() for p in self._flags) + added  # dense copies stand in for weights counted already
        share = 100 * trainable / everything
        return f"trainable params: {trainable:,} || all params: {everything:,} || trainable%: {share:.4f}"

    def optimizer(
        self,
        lr: float,
        *,
        total_steps: int | None = None,
        weight_decay: float | None = None,
        max_grad_norm: float | None = None,
        allow_unused: bool = False,
    ) -> Optimizer:
        """The recipe's optimizer over the trainable tensors. Its ``step()`` drives every schedule of the recipe.

        Args:
            lr: learning rate.
            total_steps: optimizer steps of the whole run; needed by schedules that plan over it.
            weight_decay: overrides the recipe's.
            max_grad_norm: clip the gradients' global norm, extra losses included.
            allow_unused: do not insist that every trainable tensor has a gradient at the first step.

        Raises:
            RecipeError: the recipe needs ``total_steps``.
            CompositionError: gradients cannot be clipped by a norm that is never known.
        """
        if max_grad_norm is not None and getattr(self.recipe.optimizer, "low_rank_gradients", False):
            raise CompositionError(
                "low-rank gradients never exist in full, so their norm cannot be clipped: drop max_grad_norm"
            )
        built = (
            self.recipe.adapter.schedule(self.bindings, total_steps),
            self.recipe.rank.build(self.bindings, total_steps),
            self.recipe.lifecycle.build(self.bindings, total_steps, self.recipe.init),
        )
        schedules = [schedule for schedule in built if schedule is not None]
        if (close := getattr(self._optimizer, "close", None)) is not None:
            close()
        self._driver = Driver(self.trainables(), schedules, max_grad_norm, allow_unused)
        self._optimizer = self.recipe.optimizer.build(self.trainables(), lr, weight_decay)
        self._driver.attach(self._optimizer)
        self._watch_forward()
        return self._optimizer

    def _watch_forward(self) -> None:
        """Raise ``before_forward`` from the model's own forward pass, where a schedule listens to it."""
        if self._hook is not None:
            self._hook.remove()
        schedules = self._driver.schedules if self._driver is not None else []
        if any(type(schedule).before_forward is not Schedule.before_forward for schedule in schedules):
            self._hook = self.model.register_forward_pre_hook(self.driver.before_forward)

    @property
    def driver(self) -> Driver:
        """Step count, last gradient norm, schedules. Raises :class:`RankloomError` before :meth:`optimizer`."""
        if self._driver is None:
            raise RankloomError("there is no optimizer yet: call adaptation.optimizer(lr=...) first")
        return self._driver

    def step(self) -> float:
        """One optimizer step with its events, then clear the gradients. Returns the gradient norm before clipping."""
        driver = self.driver
        assert self._optimizer is not None
        self._optimizer.step()
        self._optimizer.zero_grad()
        return driver.grad_norm

    def end_task(self) -> None:
        """Tell the schedules that the current task of a sequence is over."""
        for schedule in self.driver.schedules:
            schedule.on_task_end()

    def schedule_state(self) -> dict[str, Any]:
        """Everything that decides during training: flat, scalars and tensors."""
        return self.driver.state_dict()

    def load_schedule_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`schedule_state`; call :meth:`optimizer` first."""
        self.driver.load_state_dict(state)

    def state_dict(self) -> dict[str, Tensor]:
        """Adapter tensors by ``target.name``, and ``whole.`` parameters."""
        tensors = {f"{b.name}.{k}": v.detach() for b in self.bindings for k, v in b.adapter.state_dict().items()}
        return {**tensors, **{f"whole.{name}": p.detach() for name, p in self._trained.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy tensors in. Raises :class:`ArtifactError` unless names and shapes match exactly; then nothing is changed."""
        own = self.state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise ArtifactError(
                f"the tensors do not fit this adaptation: {len(missing)} of {len(own)} missing (as {missing[:2]}), "
                f"{len(unexpected)} unexpected (as {unexpected[:2]}); use the model and recipe they were saved with"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ArtifactError(f"{name} has shape {tuple(tensor.shape)}, the file {tuple(state[name].shape)}")
        for binding in self.bindings:
            binding.adapter.check_state({key: state[f"{binding.name}.{key}"] for key in binding.adapter.state_dict()})
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def save(self, path: str | Path) -> Path:
        """Write ``adapter.safetensors`` and ``manifest.json`` into a folder, atomically."""
        self._exporting()
        return artifacts.write_adapter(
            Path(path),
            recipe=self.recipe,
            tensors=self.state_dict(),
            fingerprint=self.fingerprint(),
            report=self.report,
        )

    def fingerprint(self) -> artifacts.Fingerprint:
        """The fingerprint of the base model under the adapters; values of parameters trained whole do not count."""
        with self._merged.base() if self._merged is not None else nullcontext():
            return artifacts.fingerprint(self.model, self._whole.keys())

    def merge(self, probe: Any = None) -> artifacts.MergeReport:
        """Fold every update into the weights, computed in float32 or wider, and measure what rounding did to the output.

        The base weights stay in this handle: :meth:`unmerge` restores them bit for bit.

        Args:
            probe: a batch to measure the drift on (mapping of keyword arguments, or a tensor); random tokens by default.
        """
        if self._merged is not None:
            raise RankloomError("the adapters are merged already: call unmerge() first")
        self._exporting()
        report, self._merged = artifacts.merge(self, probe)
        return report

    def unmerge(self) -> None:
        """Undo :meth:`merge`, exactly, and attach the adapters again."""
        if self._merged is None:
            raise RankloomError("nothing is merged: call merge() first")
        state, self._merged = self._merged, None
        artifacts.unmerge(self, state)

    def export(self, path: str | Path, format: Literal["peft", "merged"] = "peft", **options: Any) -> dict[str, Any]:
        """Write what others deploy with: a PEFT adapter folder, or the whole merged model.

        Args:
            path: the folder to write, all or nothing.
            format: ``peft`` or ``merged``.
            options: of ``peft``: ``form`` (``auto``, or ``lora`` for the plain form every reader takes), ``rank``,
                ``energy``, ``max_rank``, ``base_model``, ``probe``; of ``merged``: ``probe``, ``max_shard_size``.

        Returns:
            The export report: format, ranks, measured errors.
        """
        if self._merged is not None:
            raise ArtifactError("the adapters are merged: call unmerge() first (export merges a copy by itself)")
        writers: dict[str, Callable[..., dict[str, Any]]]
        writers = {"peft": artifacts.export_peft, "merged": artifacts.export_merged}
        if format not in writers:
            raise ArtifactError(f"unknown export format {format!r} (known: {', '.join(writers)})")
        known = list(inspect.signature(writers[format]).parameters)[2:]
        for option in options:
            if option not in known:
                raise ArtifactError(f"export to {format} has no option {option!r} (known: {', '.join(known)})")
        self._exporting()
        return writers[format](self, Path(path), **options)

    def _exporting(self) -> None:
        for schedule in self._driver.schedules if self._driver else []:
            schedule.on_export()


def adapt(model: nn.Module, recipe: Recipe, calibration: Calibration | None = None, *, seed: int = 0) -> Adaptation:
    """Attach a recipe to a model.

    Args:
        model: any ``nn.Module``; its weights are frozen and never edited.
        recipe: the composition, checked against the model before anything is allocated.
        calibration: data for inits that look at gradients or activations.
        seed: of everything random; each target draws from a generator of its own.

    Returns:
        The handle. ``handle.detach()`` gives the model back as it was.

    Raises:
        CompositionError: impossible parts, or an init without the data it needs.
        TargetError: a pattern, rank, tie or module that does not fit.
    """
    begin = time.perf_counter()
    handle = Adaptation(model, recipe, seed)
    if handle.bindings and (ranks := recipe.rank.ranks(handle.bindings)) is not None:
        recipe = recipe.with_ranks(ranks)
        handle = Adaptation(model, recipe, seed)
    init = recipe.init
    evidence = None
    if init.evidence in ("gradient", "activations") and handle.bindings:
        if calibration is None:
            raise CompositionError(
                f"init {init.kind!r} starts from {init.evidence} on data: pass calibration=Calibration(batches), or use "
                f"init='kaiming'"
            )
        evidence = init.gather(model, handle.bindings, calibration, seed)
    with torch.no_grad():
        ranks = init.ranks(handle.bindings, evidence) if handle.bindings else None
    if ranks is not None:
        handle = Adaptation(model, recipe.with_ranks(ranks), seed)
    handle.attach()
    loss = None if calibration is None else (lambda: mean_loss(model, calibration))
    context = InitContext(handle.bindings, evidence, seed, loss)
    try:
        with torch.no_grad():
            init.apply(context)
            for binding in handle.bindings:
                binding.adapter.initialized(binding.layer)
    except BaseException:
        handle.detach()  # the caller never gets the handle: give the model back as it was
        raise
    handle.report = {"init": init.kind, **context.report, "attach_seconds": time.perf_counter() - begin}
    return handle


def load(model: nn.Module, path: str | Path, *, force: bool = False) -> Adaptation:
    """Attach a saved adapter (ours, or a PEFT folder) to its base model, strictly.

    Raises:
        FingerprintError: the adapter was made on another base model (``force=True`` loads it all the same).
        ArtifactError: missing, truncated, pickled or foreign files; tensors that do not match exactly.
    """
    refuse_attached(model)
    stored = artifacts.read_adapter(Path(path), model)
    if stored.fingerprint is not None and not force:
        artifacts.require_fingerprint(stored.fingerprint, artifacts.fingerprint(model, stored.fingerprint.carried))
    # Forced onto another base, the recipe's storage is no longer a fact about it.
    handle = Adaptation(model, stored.recipe.with_(base="as-loaded") if force else stored.recipe)
    handle.attach()
    try:
        handle.load_state_dict(stored.tensors)
    except RankloomError:
        handle.detach()
        raise
    handle.report = stored.report
    return handle
