"""transformers' Trainer with three things exchanged: the source of the optimizer, the checkpoint, and what is said.

No method is known here. Whatever a recipe does during training (rank schedules, projector refresh, extra losses)
happens inside the hooks of the optimizer that ``adaptation.optimizer`` returns, so this file need not ask.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from rankloom.adapt import Adaptation
from rankloom.attention.accelerate import AcceleratedAttention
from rankloom.errors import GradientError
from rankloom.training.checkpoint import load_state, rng_state, save_checkpoint, set_rng_state
from rankloom.training.config import TrainConfig
from rankloom.training.metrics import count_tokens
from rankloom.training.processes import on_cpu
from rankloom.training.progress import Display, MetricsFile, peak_memory_mb

__all__ = ["AdaptationTrainer", "Stop", "stop_on_signal", "training_arguments"]

_STATE = "state.pt"


@dataclass
class Stop:
    """When to end: a signal sets ``requested``; the trainer looks at both after every optimizer step."""

    after: int
    requested: str = ""


@contextmanager
def stop_on_signal(stop: Stop, say: Callable[[str], None]) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into "stop after this step"; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = signal.Signals(number).name
        say(f"{stop.requested}: finishing this step and writing a checkpoint (again to stop at once)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def training_arguments(config: TrainConfig, steps: int, output: Path) -> TrainingArguments:
    """Our settings in the Trainer's words."""
    warmup = int(config.warmup) if config.warmup >= 1 else int(config.warmup * steps)
    schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        lr_scheduler_type=schedule,
        warmup_steps=warmup,
        # The adaptation's optimizer clips by itself, at the point where its own events expect it.
        max_grad_norm=0.0,
        logging_strategy="steps",
        logging_steps=config.log_every,
        # A loss that is not finite must stop the run, not be smoothed over in the log.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=on_cpu(),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=[],
        seed=config.seed,
        data_seed=config.seed,
    )


class AdaptationTrainer(Trainer):
    """Trains an `Adaptation`; see the module's docstring for what differs from its parent."""

    control: Any

    def __init__(
        self,
        adaptation: Adaptation,
        config: TrainConfig,
        *,
        steps: int,
        output: Path,
        train_dataset: Any,
        collate: Callable[[list[Any]], dict[str, torch.Tensor]],
        score: Callable[[], dict[str, float]],
        metrics: MetricsFile,
        display: Display,
        stop: Stop,
        attention: AcceleratedAttention | None = None,
    ) -> None:
        self.adaptation, self.config, self.output, self.attention = adaptation, config, output, attention
        self.score, self.metrics_file, self.display = score, metrics, display
        self.tokens = 0
        self.scored: tuple[int, dict[str, float]] | None = None
        self._restored: dict[str, Any] | None = None
        self._clock, self._clock_tokens = time.perf_counter(), 0
        super().__init__(
            model=adaptation.model,
            args=training_arguments(config, steps, output),
            train_dataset=train_dataset,
            eval_dataset=train_dataset,  # never read: `evaluate` below scores by itself, but the parent insists
            data_collator=collate,
            callbacks=[_Watch(self, stop)],
        )
        # The parent prints every log as a dict; the display does that.
        from transformers.trainer_callback import PrinterCallback

        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The adaptation's own optimizer; its step hooks drive every schedule of the recipe."""
        self.optimizer = self.adaptation.optimizer(
            lr=self.config.lr,
            total_steps=self.args.max_steps,
            weight_decay=self.config.weight_decay,
            max_grad_norm=self.config.max_grad_norm or None,
        )
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The parent's loss, refused when it is not finite: one bad step would spoil every weight it touches."""
        self.tokens += count_tokens(inputs)
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss):
            raise GradientError(
                f"the loss is {float(loss.detach())} at step {self.state.global_step + 1}; lower lr, raise warmup, or use "
                "dtype=float32"
            )
        return result

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the validation rows with our own metrics, which are weighted by token."""
        figures = self.score()
        step = self.state.global_step
        self.scored = (step, figures)
        self.metrics_file.write(event="eval", step=step, **figures)
        self.display.note(f"step {step}: " + ", ".join(f"{k} {_short(v)}" for k, v in figures.items()))
        result = {f"eval_{key}": value for key, value in figures.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        self._restart_clock()
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line into the metrics file and the display for each logged loss."""
        if "loss" not in logs:
            return
        seconds = time.perf_counter() - self._clock
        count = (
            self.args.world_size
        )  # the other processes' batches are alike; asking them would make every log a barrier
        speed = (self.tokens - self._clock_tokens) * count / max(seconds, 1e-9)
        step = self.state.global_step
        self.metrics_file.write(
            event="train",
            step=step,
            epoch=self.state.epoch,
            loss=logs["loss"],
            lr=logs.get("learning_rate"),
            tokens=self.tokens * count,
            tokens_per_second=round(speed, 1),
            peak_memory_mb=round(peak_memory_mb(), 1),
        )
        if self.attention is not None:
            self.metrics_file.write(event="attention", step=step, ran=dict(self.attention.totals))
        self.display.log(step, logs["loss"], speed)
        self._restart_clock()

    def begin(self) -> None:
        """Called when the loop starts: put back what the parent resets (the loss summed since the last log)."""
        self._restart_clock()
        if self._restored is not None:
            self._tr_loss = self._restored["pending_loss"].to(self.args.device)
            self._globalstep_last_logged = self._restored["last_logged"]
        self.display.start(self.state.global_step)

    def _restart_clock(self) -> None:
        self._clock, self._clock_tokens = time.perf_counter(), self.tokens

    # What follows replaces the parent's checkpointing. The names are the parent's.

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        ranks = self._gather(rng_state())
        attention = [] if self.attention is None else self._gather(self.attention.state_dict())
        if self.args.should_save:
            save_checkpoint(
                self.output, self.state.global_step, lambda to: self._write(to, ranks, attention), self.config.keep
            )
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path, ranks: list[dict[str, Any]], attention: list[dict[str, Any]]) -> None:
        self.adaptation.save(folder / "adapter")
        self.state.save_to_json(str(folder / "trainer_state.json"))
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "schedule": self.adaptation.schedule_state(),
            "rng": ranks,
            "attention": attention,
            "tokens": self.tokens,
            "pending_loss": self._tr_loss.detach().cpu(),
            "last_logged": self._globalstep_last_logged,
        }
        torch.save(state, folder / _STATE)

    def _gather(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Every process's own state: each draws its own dropout masks, and measures attention on its own batches."""
        if self.args.world_size == 1:
            return [state]
        from accelerate.utils import gather_object

        gathered: list[dict[str, Any]] = gather_object([state])
        return gathered

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the adaptation was loaded from the checkpoint before this trainer was made."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = self._restored = load_state(Path(checkpoint) / _STATE)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self.adaptation.load_schedule_state(state["schedule"])
        if self.attention is not None:
            self.attention.load_state_dict(self._own(state["attention"]))
        self.tokens = state["tokens"]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._restored is not None:
            set_rng_state(self._own(self._restored["rng"]))

    def _own(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """This process's part of what :meth:`_gather` brought together."""
        return states[self.args.process_index % len(states)]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Not asked for: it would cost one more pass over every gradient."""


class _Watch(TrainerCallback):
    """Keeps the display moving and ends the loop on a signal."""

    def __init__(self, trainer: AdaptationTrainer, stop: Stop) -> None:
        self.trainer, self.stop = trainer, stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The loop starts."""
        self.trainer.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """An optimizer step is done."""
        self.trainer.display.step(state.global_step)
        if self.stop.requested or state.global_step >= self.stop.after:
            control.should_save = True
            control.should_training_stop = True
        return control


def _short(value: float) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
