"""The ten-minute demonstration: LoRA against LoRA-One on a real model and real sentences.

Both methods get the same targets, rank (so the same number of parameters), steps, data order and learning rates; each
learning rate is one complete run, the best is chosen on validation rows by the mean of its evaluations, and accuracy is
reported on test rows that nothing was chosen on. The first quarter of the chosen runs is repeated with other seeds, because
that is where the two differ. The number of steps follows from the measured speed of this machine, so that it ends in time.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rankloom import methods
from rankloom.adapt import Adaptation, adapt
from rankloom.errors import RankloomError
from rankloom.training.collate import Collator
from rankloom.training.config import TrainConfig
from rankloom.training.encode import Example
from rankloom.training.metrics import token_logprobs
from rankloom.training.prepare import Prepared, encode_split, prepare, score
from rankloom.training.progress import say_to_stderr
from rankloom.training.run import train_prepared

__all__ = ["run_demo"]

METHODS = ("lora", "lora-one")
TITLES = {"lora": "LoRA", "lora-one": "LoRA-One"}
# Each method finds its best inside this range, not at an end of it: about 3e-4 for LoRA-One, 1e-3 for LoRA.
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SENTENCES = (
    "A warm, funny and beautifully acted film.",
    "Two hours of tedium that no amount of popcorn can save.",
    "It is no masterpiece, but it is charming from start to finish.",
)
# Seconds of search that leave room for set-up, repeats and final figures in a quarter of an hour.
_SEARCH_BUDGET = 400.0
_MOST_STEPS, _FEWEST_STEPS = 32, 24


@dataclass
class Trial:
    """One complete run: its settings, its validation losses by step, and what it cost."""

    method: str
    lr: float
    seed: int
    curve: dict[int, float]
    accuracy: float
    seconds: float
    init_seconds: float
    trainable: str
    folder: str

    @property
    def final(self) -> float:
        """Validation loss after the last step."""
        return self.curve[max(self.curve)]

    @property
    def mean(self) -> float:
        """Mean validation loss of the evaluations after the start."""
        losses = [loss for step, loss in self.curve.items() if step]
        return sum(losses) / len(losses)

    @property
    def quarter(self) -> float:
        """Validation loss after a quarter of the steps."""
        return self.curve[max(self.curve) // 4]


@dataclass
class Report:
    """Everything the demo found, as it is written to ``results.json``."""

    steps: int
    dtype: str
    threads: int
    base: dict[str, float]
    trials: list[Trial] = field(default_factory=list)
    best: dict[str, Trial] = field(default_factory=dict)
    quarters: dict[str, list[float]] = field(default_factory=dict)
    test: dict[str, dict[str, float]] = field(default_factory=dict)
    sentences: list[dict[str, Any]] = field(default_factory=list)
    export: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Clock:
    """Headlines with the time since the start, so that somebody who waits sees that it moves."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def __call__(self, text: str) -> None:
        minutes, seconds = divmod(int(self.seconds), 60)
        say_to_stderr(f"[{minutes:2d}:{seconds:02d}] {text}")

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started


def run_demo(
    output: str | Path,
    *,
    seeds: int = 3,
    steps: int | None = None,
    model: str = "smollm2-135m",
    data: str = "movie-reviews",
) -> dict[str, Any]:
    """Run the comparison and write adapter, figure, table and PEFT export into ``output``.

    Args:
        output: a folder of its own; a demo that is there already is replaced.
        seeds: run the first quarter of the chosen runs with this many seeds in all.
        steps: of each run, instead of the number that fits this machine.
        model: another causal language model.
        data: another dataset with prompts and a few distinct completions.
    """
    folder, say = _fresh_folder(Path(output)), Clock()
    dtype = _faster_dtype()
    say(f"{model} in {dtype} on {torch.get_num_threads()} threads; {data}: the answer is a label word")
    config = _config(model, data, dtype)
    prepared = prepare(config, say)
    if not prepared.choices:
        raise RankloomError(f"the demo needs data with a few distinct completions; '{data}' has none or too many")
    test = _test_examples(prepared, say)
    say("timing a step and scoring the untrained model (a minute on two quiet cores)")
    step_seconds, started = _step_seconds(prepared, config), time.perf_counter()
    base = score(prepared, config)
    count = steps or _fitting_steps(step_seconds, time.perf_counter() - started)
    report = Report(count, dtype, torch.get_num_threads(), base)
    report.test["base"] = score(prepared, config, test)
    say(f"before training: accuracy {report.test['base']['accuracy']:.1%} on {len(test)} test sentences")
    best = _search(prepared, config, count, folder, report, say)
    _add_starts(report)
    report.quarters = {method: [report.best[method].quarter] for method in METHODS}
    for seed in range(1, seeds):
        for method in METHODS:
            trial, _ = _trial(prepared, config, method, report.best[method].lr, seed, count, folder, say, quarter=True)
            report.quarters[method].append(trial.final)
    report.sentences = [{"text": text, "base": _chances(prepared, text)} for text in SENTENCES]
    for method in METHODS:
        best[method].attach()
        report.test[method] = score(prepared, config, test)
        if method == METHODS[-1]:
            _finish(prepared, best[method], report, folder)
        best[method].detach()
    report.seconds = round(say.seconds, 1)
    (folder / "results.json").write_text(json.dumps(asdict(report), indent=1))
    _figure(report, folder / "learning_curves.png")
    _show(report, folder)
    return asdict(report)


def _fresh_folder(folder: Path) -> Path:
    """An empty folder; one that holds an earlier demo is emptied, anything else is left alone."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / ".rankloom-demo").is_file():
            raise RankloomError(f"{folder} holds other files; give --output another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".rankloom-demo").touch()
    return folder


def _faster_dtype() -> str:
    """bf16 where this machine multiplies it faster than fp32 (recent server CPUs, GPUs), else fp32."""
    if torch.cuda.is_available():
        return "bfloat16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(320, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        times = []
        for _ in range(8):
            started = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return "bfloat16" if seconds[torch.bfloat16] < seconds[torch.float32] else "float32"


def _config(model: str, data: str, dtype: str) -> TrainConfig:
    """Common to every run. Packed: ten sentences a step without a padded token, none of which sees another."""
    return TrainConfig(
        model=model,
        data=data,
        dtype=dtype,
        packing=True,
        batch_size=2,
        max_length=160,
        append_eos=False,
        schedule="linear",
        warmup=0.05,
        eval_samples=200,
        eval_batch_size=10,
        calibration_samples=6,
        save_every=10**6,
        keep=1,
        log_every=5,
    )


def _test_examples(prepared: Prepared, say: Clock) -> Sequence[Example]:
    rows = prepared.rows
    chosen = rows.test if rows.test is not None else rows.validation
    return encode_split(chosen, rows, prepared.encoder, prepared.loaded, 500, say, "test")


def _step_seconds(prepared: Prepared, config: TrainConfig) -> float:
    """The time of one training step: the second of two, the first of which warms up."""
    adaptation = adapt(prepared.model, methods.get("lora"))
    adaptation.optimizer(lr=1e-5, total_steps=10)
    collate = Collator(prepared.collate.pad_id, packed=True)
    seconds = 0.0
    for step in range(2):
        started = time.perf_counter()
        batch = collate([prepared.train[2 * step], prepared.train[2 * step + 1]])
        device = next(prepared.model.parameters()).device
        prepared.model(**{key: value.to(device) for key, value in batch.items()}).loss.backward()
        adaptation.step()
        seconds = time.perf_counter() - started
    adaptation.detach()
    return seconds


def _fitting_steps(step: float, evaluation: float) -> int:
    """Steps a run, a multiple of 4, so that all runs of the search with their four evaluations fit the budget."""
    each = _SEARCH_BUDGET / (len(METHODS) * len(LEARNING_RATES))
    fitting = int((each - 4 * evaluation) / step) // 4 * 4
    return max(_FEWEST_STEPS, min(_MOST_STEPS, fitting))


def _search(
    prepared: Prepared, config: TrainConfig, steps: int, folder: Path, report: Report, say: Clock
) -> dict[str, Adaptation]:
    """Every learning rate with every method; keeps the adaptation with the lowest mean validation loss of each.

    Of all evaluations of the run: one alone moves by several hundredths from step to step.
    """
    say(f"{steps} steps a run; {len(LEARNING_RATES)} learning rates for each of {len(METHODS)} methods")
    best: dict[str, Adaptation] = {}
    for method in METHODS:
        for lr in LEARNING_RATES:
            trial, adaptation = _trial(prepared, config, method, lr, 0, steps, folder, say)
            report.trials.append(trial)
            if method not in best or trial.mean < report.best[method].mean:
                report.best[method], best[method] = trial, adaptation
    return best


def _add_starts(report: Report) -> None:
    """Give every curve its step 0, which is measured once: it does not depend on the learning rate."""
    starts = {"lora": report.base["loss"]}
    starts |= {trial.method: trial.curve[0] for trial in report.trials if 0 in trial.curve}
    for trial in report.trials:
        trial.curve = {0: starts[trial.method], **trial.curve}


def _trial(
    prepared: Prepared,
    config: TrainConfig,
    method: str,
    lr: float,
    seed: int,
    steps: int,
    folder: Path,
    say: Clock,
    quarter: bool = False,
) -> tuple[Trial, Adaptation]:
    """One run (or its first quarter); the adapter is detached again, so that the next starts from the same model."""
    name = f"{method}-lr{lr:g}-seed{seed}"
    say(f"{TITLES[method]}, learning rate {lr:g}, seed {seed}" + (", first quarter" if quarter else ""))
    settings = {"method": method, "lr": lr, "seed": seed, "steps": steps, "eval_every": steps // 4}
    # What a run starts from: LoRA at the base model, LoRA-One in the same place for every learning rate.
    settings["eval_first"] = method == "lora-one" and lr == LEARNING_RATES[0] and not quarter
    output = folder / "runs" / name
    output.mkdir(parents=True)
    stop = steps // 4 if quarter else None
    result, adaptation = train_prepared(config.model_copy(update=settings), prepared, output=output, stop_after=stop)
    adaptation.detach()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["loss"] for line in lines if line["event"] == "eval"}
    trial = Trial(
        method=method,
        lr=lr,
        seed=seed,
        curve=curve,
        accuracy=result.metrics["accuracy"],
        seconds=result.seconds,
        init_seconds=result.init.get("attach_seconds", 0.0),
        trainable=result.trainable,
        folder=str(output),
    )
    return trial, adaptation


def _finish(prepared: Prepared, adaptation: Adaptation, report: Report, folder: Path) -> None:
    """With the last method's best adapter attached: classify the sentences, keep the adapter, export it."""
    for entry in report.sentences:
        entry["trained"] = _chances(prepared, entry["text"])
    adaptation.save(folder / "adapter")
    report.export = adaptation.export(folder / "peft", "peft")


def _chances(prepared: Prepared, sentence: str) -> dict[str, float]:
    """The probability of each label word after the sentence, among the label words."""
    encoder, choices = prepared.encoder, prepared.choices
    assert encoder is not None and choices is not None
    prompt = encoder.ids(f"Review: {sentence}\nSentiment:")
    examples = [{"input_ids": prompt + choice, "labels": [-100] * len(prompt) + choice} for choice in choices]
    device = next(prepared.model.parameters()).device
    batch = {key: value.to(device) for key, value in prepared.collate(examples).items()}
    labels = batch.pop("labels")
    prepared.model.eval()
    with torch.no_grad():
        scores = token_logprobs(prepared.model(**batch).logits, labels)[0].softmax(0)
    words = [encoder.tokenizer.decode(choice).strip() for choice in choices]
    return dict(zip(words, scores.tolist(), strict=True))


def _figure(report: Report, path: Path) -> None:
    """Validation loss by step: every run thin, the chosen one of each method bold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method, colour in zip(METHODS, ("tab:gray", "tab:blue"), strict=True):
        for trial in report.trials:
            if trial.method == method:
                axes.plot(*zip(*sorted(trial.curve.items()), strict=True), color=colour, alpha=0.3, linewidth=1)
        best = report.best[method]
        label = f"{TITLES[method]} (learning rate {best.lr:g})"
        axes.plot(*zip(*sorted(best.curve.items()), strict=True), color=colour, linewidth=2.5, marker="o", label=label)
    axes.set(xlabel="optimizer step", ylabel="validation loss of the label word", yscale="log")
    axes.set_title("SmolLM2-135M, movie-review sentiment")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _show(report: Report, folder: Path) -> None:
    """The result on stderr, beside the progress; stdout stays free for ``--json``."""
    for line in summary_lines(report):
        say_to_stderr(line)
    say_to_stderr(f"\nwritten to {folder}: adapter/ (rankloom), peft/ (PEFT), learning_curves.png, results.json")


def summary_lines(report: Report) -> list[str]:
    """The table, the verdict and the sentences as text."""
    quarter = report.steps // 4
    head = f"{'':<10}{'lr':>8}{'init':>9}{f'loss @{quarter}':>11}{f'loss @{report.steps}':>11}{'test accuracy':>15}"
    base = report.test["base"]
    lines = ["", head, f"{'untrained':<10}{'':>17}{'':>11}{report.base['loss']:>11.3f}{base['accuracy']:>15.1%}"]
    for method in METHODS:
        best, accuracy = report.best[method], report.test[method]["accuracy"]
        lines.append(
            f"{TITLES[method]:<10}{best.lr:>8g}{best.init_seconds:>7.1f} s{best.quarter:>11.3f}{best.final:>11.3f}"
            f"{accuracy:>15.1%}"
        )
    lines += ["", f"both: {report.best['lora'].trainable}", *_verdict(report), ""]
    for entry in report.sentences:
        word, chance = max(entry["trained"].items(), key=lambda pair: pair[1])
        lines.append(f"{word:>9} ({chance:.0%}; untrained {entry['base'][word]:.0%})  {entry['text']}")
    return lines


def _verdict(report: Report) -> list[str]:
    """What the comparison shows and how sure it is: the quarter-way losses, over seeds where there are several."""
    losses = report.quarters
    means = {method: sum(values) / len(values) for method, values in losses.items()}
    word = "at or below" if means["lora-one"] <= means["lora"] else "above"
    count = len(losses["lora"])
    each = "; ".join(f"{TITLES[m]} {', '.join(f'{v:.3f}' for v in losses[m])}" for m in METHODS)
    lines = [
        f"after a quarter of the steps LoRA-One's validation loss is {word} LoRA's: {means['lora-one']:.3f} against "
        f"{means['lora']:.3f}, mean of {count} seed{'s' if count > 1 else ''} ({each})"
    ]
    size = int(report.test["base"]["examples"])
    error = (0.12 / size) ** 0.5  # sqrt(p (1 - p) / n) near p = 0.86
    lines.append(f"test accuracies have a standard error of about {error:.1%}: smaller differences are noise")
    return lines
