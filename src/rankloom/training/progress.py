"""What a run says: one JSON line an event for programs, one live line for people."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rankloom.training.checkpoint import write_text

__all__ = ["Display", "MetricsFile", "peak_memory_mb", "say_to_stderr"]


def say_to_stderr(line: str) -> None:
    """The default voice of a run; results go to stdout, everything else here."""
    print(line, file=sys.stderr, flush=True)


def peak_memory_mb() -> float:
    """Peak memory of this process so far: of the GPU where one is used, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform != "darwin" else 2**20)


class MetricsFile:
    """``metrics.jsonl``: one line an event, each with its step, never a step twice.

    A resumed run repeats the steps after its checkpoint, so the lines of those steps, and a last line that the death
    of the process cut short, are taken out first.
    """

    def __init__(self, path: Path, resume_step: int, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        if not writes:
            return
        kept = [line for line in self._lines() if line["step"] <= resume_step] if resume_step else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **event: Any) -> None:
        """Append one event and flush it."""
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")

    def write_once(self, *, event: str, step: int, **figures: Any) -> None:
        """Append an event unless its step has it already (a finished run that is resumed once more)."""
        if not any(line["event"] == event and line["step"] == step for line in self._lines()):
            self.write(event=event, step=step, **figures)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        return lines


class Display:
    """A live bar on a terminal, a plain line at every log elsewhere: step, loss, tokens/s, time left, peak memory."""

    def __init__(self, title: str, total: int, *, live: bool | None = None, say: Callable[[str], None] = say_to_stderr):
        self.title, self.total, self.say = title, total, say
        self.live = sys.stderr.isatty() if live is None else live
        self._started = time.perf_counter()
        self._first = 0
        self._fields = {"loss": "-", "speed": "-", "memory": "-"}
        self._bar: Any = None
        self._task: Any = None

    def start(self, step: int) -> None:
        """Begin at ``step`` (not zero after a resume)."""
        self._first, self._started = step, time.perf_counter()
        if self.live:
            self._bar = _rich_bar()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=step, **self._fields)

    def step(self, step: int) -> None:
        """One optimizer step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, loss: float, tokens_per_second: float) -> None:
        """New figures are there."""
        self._fields = {
            "loss": f"{loss:.4f}",
            "speed": f"{tokens_per_second:,.0f} tok/s",
            "memory": f"{peak_memory_mb():,.0f} MB peak",
        }
        if self._bar is not None:
            self._bar.update(self._task, completed=step, **self._fields)
            return
        done = max(step - self._first, 1)
        left = (time.perf_counter() - self._started) / done * (self.total - step)
        figures = "  ".join(self._fields.values())
        self.say(f"{self.title}: step {step}/{self.total}  loss {figures}  {_clock(left)} left")

    def note(self, text: str) -> None:
        """A line of its own that stays on the screen."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            self.say(text)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _rich_bar() -> Any:
    """A rich progress bar on stderr, or ``None`` without rich (it comes with the ``cli`` extra)."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
        console=Console(stderr=True),
    )
