"""Complete fine-tuning runs on real tasks, all methods alike: what the studies of quality share.

A task is a model, data and sizes; a method is a row of the methods table with changes, or one of PEFT's starts. Rank 8 on the
same weights. AdamW without decay, clipping at 1, 5 % warm-up, linear decay. Whatever trains is float32; SmolLM2's frozen
weights are bfloat16, and its full fine-tuning trains all linear weights.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import rankloom
import vision
from common import peak_mb, reset_peak, resident_mb
from init_cost import theirs
from rankloom.calibration import Calibration
from rankloom.errors import RankloomError
from rankloom.targets import find_targets
from rankloom.training.collate import Collator
from rankloom.training.config import TrainConfig
from rankloom.training.metrics import evaluate
from rankloom.training.prepare import Prepared, build_recipe, calibration_of, encode_split, prepare

FRACTIONS = (0.1, 0.25, 0.5, 1.0)
"""Of the steps: where a measured run is evaluated."""
RANK = 8
PEFT_SETTINGS: dict[str, dict[str, Any]] = {"pissa": {"lora_alpha": RANK}, "lora_ga": {}, "eva": {}}


@dataclass(frozen=True)
class Method:
    """One contender: a row of the methods table with changes, or one of PEFT's starts (``peft``)."""

    row: str = ""
    changes: tuple[tuple[str, Any], ...] = ()
    peft: str = ""
    shift: int = 0


@dataclass(frozen=True)
class Task:
    """Model, data and sizes. ``first``: of the four rates that LoRA and most others search. ``longest``: keep shorter examples
    only. ``modules``: what is adapted, all linear layers by default. ``load``: makes model and data where the library's own
    loading does not. ``full``: changes to the row of full fine-tuning.
    """

    title: str
    config: TrainConfig
    steps: int
    first: float
    longest: int | None = None
    modules: tuple[str, ...] | None = None
    load: Callable[[], tuple[Any, Any]] | None = None
    full: tuple[tuple[str, Any], ...] = ()


# Weights held in bfloat16 lose small updates: full fine-tuning gets float32 copies of the linears and leaves the rest.
FLOAT32_LINEARS = (("adapter.dtype", "auto"), ("targets.train", ()))
TASKS = {
    "minilm": Task(
        "MiniLM (22.7 M), movie-review sentiment, linear head on mean tokens",
        TrainConfig(
            model="minilm",
            data="movie-reviews",
            task="sequence-classification",
            dtype="float32",
            max_length=64,
            batch_size=16,
            eval_samples=600,
            eval_batch_size=20,
            calibration_samples=32,
        ),
        steps=60,
        first=3e-4,
        longest=20,
    ),
    "label-word": Task(
        "SmolLM2-135M, movie-review sentiment, label word",
        TrainConfig(
            model="smollm2-135m",
            data="movie-reviews",
            dtype="bfloat16",
            packing=True,
            batch_size=2,
            max_length=160,
            append_eos=False,
            eval_samples=40,
            eval_batch_size=8,
            calibration_samples=6,
        ),
        steps=24,
        first=1e-4,
        full=FLOAT32_LINEARS,
    ),
    "language": Task(
        "SmolLM2-135M, language modelling on Python's help texts",
        TrainConfig(
            model="smollm2-135m",
            data="pydoc-topics",
            dtype="bfloat16",
            batch_size=2,
            max_length=128,
            train_samples=400,
            eval_samples=8,
            eval_batch_size=4,
            calibration_samples=6,
        ),
        steps=24,
        first=1e-4,
        full=FLOAT32_LINEARS,
    ),
    "digits": Task(
        "EfficientNet-Lite0 (4.7 M), handwritten digits, 1 x 1 convolutions",
        TrainConfig(
            model="efficientnet-lite0",
            data="mnist",
            task="image-classification",
            dtype="float32",
            batch_size=16,
            eval_samples=500,
            eval_batch_size=50,
            calibration_samples=32,
        ),
        steps=60,
        first=3e-4,
        modules=vision.CONVOLUTIONS,
        load=vision.load,
    ),
}


class MeanPooled(nn.Module):
    """An encoder's tokens, averaged, under a linear classifier: what a sentence encoder was trained to be read by."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.config, self.encoder = classifier.config, classifier.base_model
        self.encoder.pooler = None
        self.classifier = classifier.classifier

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """Logits (batch, classes), and the mean cross-entropy where labels are given."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(tokens)
        logits = self.classifier((tokens * weights).sum(1) / weights.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


class Bench:
    """A task's model and data, loaded once, and runs on it."""

    def __init__(self, name: str, steps: int | None) -> None:
        self.name, self.task = name, TASKS[name]
        self.config, self.steps = self.task.config, steps or self.task.steps
        self.marks = sorted({max(1, round(f * self.steps)) for f in FRACTIONS})

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a run, besides method, rate and seed."""
        kept = ("model", "data", "dtype", "batch_size", "max_length", "eval_samples", "calibration_samples")
        return {"steps": self.steps, "longest": self.task.longest, **{key: getattr(self.config, key) for key in kept}}

    @cached_property
    def prepared(self) -> Prepared:
        """The model and the encoded rows."""
        if self.task.load is not None:
            prepared, self.test = self.task.load()
            return prepared
        prepared = prepare(self.config, print)
        prepared.train, prepared.validation = self._short(prepared.train), self._short(prepared.validation)
        if self.config.task == "sequence-classification":
            model = MeanPooled(prepared.model)
            prepared.loaded = replace(prepared.loaded, model=model, new=("classifier",))
            fit_head(prepared, self.config)
        return prepared

    def _short(self, examples: Any) -> Any:
        most = self.task.longest
        return examples if most is None else [e for e in examples if len(e["input_ids"]) <= most]

    @cached_property
    def test(self) -> Any:
        """Rows that no learning rate is chosen on."""
        if self.task.load is not None:
            return self.task.load()[1]
        rows, limit = self.prepared.rows, self.config.eval_samples
        encoded = encode_split(rows.test, rows, self.prepared.encoder, self.prepared.loaded, limit, print, "test")
        return self._short(encoded)

    def run(self, method: Method, lr: float, seed: int, *, search: bool) -> dict[str, Any]:
        """One complete run: held-out figures at the marks (in a search: on validation rows, after the last step only)."""
        made, model, optimizer, facts = self.attach(method, lr, seed)
        rows = self.prepared.validation if search else self.test
        collate = Collator(self.prepared.collate.pad_id, packed=self.config.packing)
        warmup = max(1, round(0.05 * self.steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (self.steps - step) / max(1, self.steps - warmup))
        )
        order = random.Random(seed).sample(range(len(self.prepared.train)), self.steps * self.config.batch_size)
        curve: dict[str, Any] = {}
        begin, torch_state = time.process_time(), torch.random.get_rng_state()
        torch.manual_seed(seed)  # dropout
        evaluating = 0.0
        try:
            for step in range(self.steps):
                picked = order[step * self.config.batch_size : (step + 1) * self.config.batch_size]
                model.train()
                model(**collate([self.prepared.train[i] for i in picked])).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if step + 1 == self.steps or (not search and step + 1 in self.marks):
                    paused = time.process_time()
                    curve[str(step + 1)] = self.score(model, rows)
                    evaluating += time.process_time() - paused
        except RankloomError as error:  # gradients that are not finite: the rate is too high, which is a result
            facts["diverged"] = str(error)
        finally:
            torch.random.set_rng_state(torch_state)
            if isinstance(made, rankloom.Adaptation):
                made.detach()
        seconds = time.process_time() - begin - evaluating
        return {**facts, "curve": curve, "step_seconds": seconds / self.steps}

    def score(self, model: nn.Module, rows: Any) -> dict[str, float]:
        """Held-out loss, and accuracy where there is one."""
        prepared = self.prepared
        figures = evaluate(
            model, rows, prepared.collate, batch_size=self.config.eval_batch_size, choices=prepared.choices
        )
        return {key: figures[key] for key in ("loss", "accuracy") if key in figures}

    def attach(self, method: Method, lr: float, seed: int) -> tuple[Any, nn.Module, torch.optim.Optimizer, dict]:
        """The adapted model, its optimizer, and what the start cost; PEFT works on a copy, as it edits weights."""
        prepared, config = self.prepared, self.config.model_copy(update={"seed": seed})
        packed = Collator(prepared.collate.pad_id, packed=config.packing)
        data = calibration_of(config, prepared, packed)
        model = copy.deepcopy(prepared.model) if method.peft else prepared.model
        reset_peak()
        resident, begin = resident_mb(), time.process_time()
        made: Any
        if method.peft:
            made = self._peft(method.peft, model, data, seed)
            model = made
            trained = [p for p in made.parameters() if p.requires_grad]
        else:
            changes = dict(self.task.full if method.row == "full" else method.changes)
            if self.task.modules is not None:
                changes.setdefault("targets.modules", self.task.modules)
            config = config.model_copy(update={"method": method.row, "overrides": changes})
            recipe = build_recipe(config, prepared.loaded.new)
            made = rankloom.adapt(model, recipe, data if recipe.init.evidence != "none" else None, seed=seed)
            trained = made.parameters()
        head = sum(p.numel() for n in prepared.loaded.new for p in prepared.model.get_submodule(n).parameters())
        facts = {
            "init_seconds": time.process_time() - begin,
            "init_mb": peak_mb() - resident,
            "trainable": sum(p.numel() for p in trained) - head,
        }
        if method.peft:
            optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
            optimizer.register_step_pre_hook(lambda *_: clip(trained))
        else:
            optimizer = made.optimizer(lr, total_steps=self.steps, max_grad_norm=1.0)
        return made, model, optimizer, facts

    def _peft(self, start: str, model: nn.Module, data: Calibration, seed: int) -> Any:
        names = [t.module_name for t in find_targets(model, rankloom.Targets(exclude=self.prepared.loaded.new))]
        torch.manual_seed(seed)
        settings = {"target_modules": names, "modules_to_save": list(self.prepared.loaded.new) or None}
        return theirs(start, model, data, RANK, **settings, **PEFT_SETTINGS[start])


def clip(parameters: list[nn.Parameter]) -> None:
    """As our optimizers do: the global norm at most 1, and a gradient that is not finite stops the run."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if not torch.isfinite(norm):
        raise RankloomError("the gradient is not finite")


def fit_head(prepared: Prepared, config: TrainConfig, examples: int = 256) -> None:
    """Logistic regression on the frozen model's features, by L-BFGS, into the new head."""
    (name,) = prepared.loaded.new
    head, seen = prepared.model.get_submodule(name), []
    handle = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    chosen = [prepared.train[i] for i in random.Random(0).sample(range(len(prepared.train)), examples)]
    evaluate(prepared.model, chosen, prepared.collate, batch_size=config.eval_batch_size)
    handle.remove()
    # `evaluate` sorts by length; a stable sort of the same list puts the labels beside their features.
    ordered = sorted(chosen, key=lambda example: len(example["input_ids"]))
    features, labels = torch.cat(seen), torch.tensor([example["labels"] for example in ordered])
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = 1e-3 * sum(p.square().sum() for p in head.parameters())
        loss = nn.functional.cross_entropy(head(features), labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
