"""A training run from settings to a saved adapter; killed at any moment, it resumes to the same bits."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rankloom.adapt import Adaptation, adapt, load
from rankloom.attention.accelerate import AcceleratedAttention, accelerate_attention
from rankloom.errors import ArtifactError, GradientError, RankloomError
from rankloom.training.checkpoint import clean, list_checkpoints, newest, replace_folder, write_text
from rankloom.training.collate import Collator
from rankloom.training.config import TrainConfig
from rankloom.training.prepare import Prepared, build_recipe, calibration_of, prepare, score
from rankloom.training.processes import is_main, process_count, wait
from rankloom.training.progress import Display, MetricsFile, peak_memory_mb, say_to_stderr

__all__ = ["Interrupted", "RunResult", "train", "train_prepared"]

_CONFIG, _METRICS, _SUMMARY, _RUN = "config.yaml", "metrics.jsonl", "summary.json", "run.json"


class Interrupted(Exception):
    """The run was stopped by a signal after it wrote a checkpoint; the message says how to resume."""


@dataclass
class RunResult:
    """What a finished run leaves: where, how far, how good, at what cost."""

    output: str
    adapter: str
    steps: int
    metrics: dict[str, float]
    seconds: float
    peak_memory_mb: float
    trainable: str
    init: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)


def train(config: TrainConfig, *, say: Callable[[str], None] = say_to_stderr, live: bool | None = None) -> RunResult:
    """Train as ``config`` says; with ``resume`` continue from the newest whole checkpoint of the output folder.

    Raises:
        Interrupted: a signal came; a checkpoint was written.
        RankloomError: anything the user can mend, before or during training.
    """
    build_recipe(config)  # a misspelt method should not wait for a model to load
    output = Path(config.output)
    say = say if is_main() else _silent
    checkpoint = _open_output(output, config, say)
    try:
        prepared = prepare(config, say)
        _record_data(output, config, prepared)
        return train_prepared(config, prepared, output=output, checkpoint=checkpoint, say=say, live=live)[0]
    except KeyboardInterrupt:  # before the loop, after it, or a second Ctrl-C in it
        raise Interrupted(f"interrupted; continue with: rankloom train {output / _CONFIG} resume=true") from None


def train_prepared(
    config: TrainConfig,
    prepared: Prepared,
    *,
    output: Path,
    checkpoint: Path | None = None,
    stop_after: int | None = None,
    say: Callable[[str], None] = say_to_stderr,
    live: bool | None = None,
) -> tuple[RunResult, Adaptation]:
    """The part of `train` after loading: attach, train, score, save. The adapter stays attached.

    ``stop_after`` ends the run at that step, on the schedule of the whole run: the start of a run, as it would be.
    """
    started = time.perf_counter()
    collate = Collator(prepared.collate.pad_id, packed=config.packing)
    adaptation = _attach(config, prepared, collate, checkpoint)
    say(adaptation.summary())
    steps = _total_steps(config, len(prepared.train))
    end = min(steps, stop_after or steps)
    metrics = MetricsFile(output / _METRICS, _step_of(checkpoint), writes=is_main())
    if config.eval_first and checkpoint is None:
        metrics.write(event="eval", step=0, **score(prepared, config))
    figures, attention = None, None
    if _step_of(checkpoint) < end:
        with _limits(config, prepared, steps) as attention:
            figures = _fit(
                config, prepared, adaptation, collate, (steps, end), output, checkpoint, metrics, say, live, attention
            )
        if attention is not None:
            say(attention.summary())
    if figures is None:
        figures = score(prepared, config)
        metrics.write_once(event="eval", step=end, **figures)
        say(f"validation after {end} steps: " + ", ".join(f"{k} {v:,.4g}" for k, v in figures.items()))
    result = RunResult(
        output=str(output),
        adapter=str(output / "adapter"),
        steps=end,
        metrics=figures,
        seconds=round(time.perf_counter() - started, 2),
        peak_memory_mb=round(peak_memory_mb(), 1),
        trainable=adaptation.summary(),
        init=_plain(adaptation.report),
        attention={} if attention is None else attention.report(),
    )
    if is_main():
        replace_folder(output / "adapter", lambda folder: _save_into(adaptation, folder))
        write_text(output / _SUMMARY, json.dumps(result.__dict__, indent=1))
    wait()
    return result, adaptation


def _fit(
    config: TrainConfig,
    prepared: Prepared,
    adaptation: Adaptation,
    collate: Collator,
    extent: tuple[int, int],
    output: Path,
    checkpoint: Path | None,
    metrics: MetricsFile,
    say: Callable[[str], None],
    live: bool | None,
    attention: AcceleratedAttention | None,
) -> dict[str, float] | None:
    """Run the loop; returns the figures of an evaluation at the very last step, if one was due there.

    ``extent``: the steps that the schedule is planned for, and the one to end at.
    """
    from rankloom.training.trainer import AdaptationTrainer, Stop, stop_on_signal

    steps, end = extent
    stop = Stop(after=end)
    display = Display(
        config.method if config.recipe is None else "training", end, live=live if is_main() else False, say=say
    )
    trainer = AdaptationTrainer(
        adaptation,
        config,
        steps=steps,
        output=output,
        train_dataset=prepared.train,
        collate=collate,
        score=lambda: score(prepared, config),
        metrics=metrics,
        display=display,
        stop=stop,
        attention=attention,
    )
    try:
        with stop_on_signal(stop, display.note):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except GradientError as error:
        last = newest(output)
        kept = f"the last good checkpoint is {last}" if last else "there was no checkpoint yet"
        raise GradientError(f"{error}; {kept}") from error
    finally:
        display.stop()
    if stop.requested and trainer.state.global_step < end:
        raise Interrupted(
            f"stopped by {stop.requested} after step {trainer.state.global_step} of {steps}; continue with: "
            f"rankloom train {output / _CONFIG} resume=true"
        )
    return trainer.scored[1] if trainer.scored and trainer.scored[0] == end else None


def _limits(config: TrainConfig, prepared: Prepared, steps: int) -> AbstractContextManager[AcceleratedAttention | None]:
    """The attention that the settings ask for, for as long as the context lasts."""
    if config.attention is None or config.attention.limits is None:
        return nullcontext()
    settings = config.attention.limits.model_dump()
    return accelerate_attention(prepared.model, **settings, total_steps=steps, seed=config.seed)


def _attach(config: TrainConfig, prepared: Prepared, collate: Collator, checkpoint: Path | None) -> Adaptation:
    if checkpoint is not None:
        return load(prepared.model, checkpoint / "adapter")
    recipe = build_recipe(config, prepared.loaded.new)
    return adapt(prepared.model, recipe, calibration=calibration_of(config, prepared, collate), seed=config.seed)


def _open_output(output: Path, config: TrainConfig, say: Callable[[str], None]) -> Path | None:
    """Make or reopen the run's folder; returns the checkpoint to continue from.

    Without ``resume`` a folder that holds a run is refused: overwriting hours of work must be somebody's decision.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RankloomError(f"cannot make the output folder {output} ({error.strerror}); choose another") from error
    if not config.resume and (list_checkpoints(output) or (output / _SUMMARY).is_file()):
        raise RankloomError(f"{output} already holds a run; continue it with resume=true or choose another output")
    if config.resume:
        _same_run(output, config)
    if is_main():
        clean(output)
        plain = config.model_copy(update={"resume": False}).model_dump()
        write_text(output / _CONFIG, yaml.safe_dump(plain, sort_keys=False))
    wait()
    if not config.resume:
        return None
    checkpoint = newest(output, say)
    say(f"resuming from {checkpoint}" if checkpoint else f"no checkpoint in {output} yet: starting from the beginning")
    return checkpoint


def _same_run(output: Path, config: TrainConfig) -> None:
    """Refuse to resume with settings that would give another result."""
    path = output / _CONFIG
    if not path.is_file():
        return
    try:
        before = TrainConfig(**yaml.safe_load(path.read_text())).deciding()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ArtifactError(f"{path} is damaged; restore it or start a run in another output folder") from error
    changed = [key for key, value in config.deciding().items() if before[key] != value]
    if changed:
        key = changed[0]
        raise RankloomError(
            f"cannot resume: {', '.join(changed)} differ from the run in {output} ({key} was {before[key]!r}); resume "
            f"with: rankloom train {path} resume=true"
        )


def _record_data(output: Path, config: TrainConfig, prepared: Prepared) -> None:
    """Keep the classes for `eval` and `generate`, and refuse to resume on data that has changed."""
    record = {"labels": prepared.rows.labels, "train_examples": len(prepared.train)}
    path = output / _RUN
    if config.resume and path.is_file() and json.loads(path.read_text()) != record:
        raise RankloomError(f"cannot resume: the data has changed since the run in {output}; choose another output")
    wait()
    if is_main():
        write_text(path, json.dumps(record))


def _total_steps(config: TrainConfig, examples: int) -> int:
    if config.steps is not None:
        return config.steps
    batches = math.ceil(examples / (config.batch_size * process_count()))
    return max(1, math.ceil(config.epochs * math.ceil(batches / config.accumulation)))


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0


def _save_into(adaptation: Adaptation, folder: Path) -> None:
    adaptation.save(folder)


def _silent(_line: str) -> None:
    pass


def _plain(report: Any) -> dict[str, Any]:
    """The init's report without what JSON cannot hold."""
    kept: dict[str, Any] = json.loads(json.dumps(report, default=lambda _value: None))
    return kept
