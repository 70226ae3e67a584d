"""Starts and updates informed by gradients, weights and activations, beside LoRA, full fine-tuning and PEFT's own starts.

Question: at equal steps, data and search, which method has the lower loss after 10, 25, 50 and 100 % of the steps, and is the
difference to LoRA larger than the spread over seeds?

Protocol, the same for every method. Rank 8 on the same weights (what trains otherwise is stated beside each). A search of
four learning rates, a factor of about 3 apart, one complete run each with seed 0; the lowest validation loss after the last
step wins. Then runs with fresh seeds (order of the data, calibration examples, random parts) at that rate, whose curves are
taken on test rows that nothing was chosen on. Where a method's rates are known to lie elsewhere, its four are moved along
the same ladder (``Method.shift``). AdamW without decay, clipping at 1, 5 % warm-up, linear decay. Whatever trains is
float32; SmolLM2's frozen weights are bfloat16, and its full fine-tuning trains all linear weights. Intervals are 95 %
Student intervals over seeds; the difference to LoRA is paired, seed by seed, as data and order are the same.

A new classification head starts from ridge-regularised logistic regression on frozen features of training rows, once for
all methods: behind a random head the first gradient is noise.

Every finished run is a line of a JSONL file beside the result, and is not run again.

    python bench/gradient_informed.py --json bench/results/gradient_informed.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import rankloom
from common import peak_mb, provenance, reset_peak, resident_mb, table, write
from init_cost import theirs
from rankloom.calibration import Calibration
from rankloom.errors import RankloomError
from rankloom.targets import find_targets
from rankloom.training.collate import Collator
from rankloom.training.config import TrainConfig
from rankloom.training.metrics import evaluate
from rankloom.training.prepare import Prepared, build_recipe, calibration_of, encode_split, prepare

LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FRACTIONS = (0.1, 0.25, 0.5, 1.0)
RANK = 8


@dataclass(frozen=True)
class Method:
    """One contender: a row of the methods table with changes, or one of PEFT's starts (``peft``)."""

    row: str = ""
    changes: tuple[tuple[str, Any], ...] = ()
    peft: str = ""
    shift: int = 0


# Steps on the ladder against LoRA's rates: starts that are as large as the weights, and updates that mimic full ones, are
# known to want smaller rates (about a third of LoRA's and less), bare cores larger ones.
METHODS = {
    "lora": Method("lora"),
    "full": Method("full", shift=-2),
    "lora-one": Method("lora-one"),
    "lora-ga": Method("lora-ga", shift=-1),
    "lora-sb": Method("lora-sb", shift=1),
    "lora r=32": Method("lora", (("adapter.rank", 32), ("adapter.alpha", 64.0))),  # LoRA-SB's rank: what its cores save
    "pissa": Method("pissa", shift=-1),
    "rslora": Method("rslora"),
    "lora-plus": Method("lora-plus", shift=-1),
    "lora-fa": Method("lora-fa"),
    "lora-pro": Method("lora-pro", shift=-1),
    "riemannian": Method("riemannian"),
    "lora-one + riemannian": Method("lora-one", (("optimizer.kind", "riemannian"),)),
    "dora-one": Method("dora-one"),
    "eva": Method("eva"),
    "allora": Method("allora"),
    "olora": Method("olora", shift=-1),
    "milora": Method("milora", shift=-1),
    "corda": Method("corda", shift=-1),
    "lora-xs": Method("lora-xs", shift=1),
    "peft lora-ga": Method(peft="lora_ga", shift=-1),
    "peft pissa": Method(peft="pissa", shift=-1),
    "peft eva": Method(peft="eva"),
}
PEFT_SETTINGS: dict[str, dict[str, Any]] = {"pissa": {"lora_alpha": RANK}, "lora_ga": {}, "eva": {}}


@dataclass(frozen=True)
class Task:
    """Model, data and sizes. ``first``: of the four rates that LoRA and most others search. ``longest``: keep shorter examples
    only. ``full``: changes to the row of full fine-tuning.
    """

    title: str
    config: TrainConfig
    steps: int
    first: float
    longest: int | None = None
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
        rows, limit = self.prepared.rows, self.config.eval_samples
        encoded = encode_split(rows.test, rows, self.prepared.encoder, self.prepared.loaded, limit, print, "test")
        return self._short(encoded)

    def run(self, method: str, lr: float, seed: int, *, search: bool) -> dict[str, Any]:
        """One complete run: held-out figures at the marks (in a search: on validation rows, after the last step only)."""
        made, model, optimizer, facts = self.attach(METHODS[method], lr, seed)
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


class Runs:
    """Finished runs, a JSON line each; a run that is there is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def of(self, bench: Bench, **wanted: Any) -> list[dict[str, Any]]:
        """Runs of a task with its present settings and these values."""
        wanted = {"task": bench.name, "settings": bench.settings, **wanted}
        return [line for line in self.lines if all(line.get(key) == value for key, value in wanted.items())]

    def add(self, line: dict[str, Any]) -> None:
        """Keep a run, on disk at once."""
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def rates(bench: Bench, method: str, given: list[float] | None) -> list[float]:
    """The four rates of a method, or the given ones."""
    first = LADDER.index(bench.task.first) + METHODS[method].shift
    return given or list(LADDER[first : first + 4])


def final(line: dict[str, Any]) -> float:
    """The loss after the last step; infinite for a run that did not get there."""
    value = line["curve"].get(str(line["settings"]["steps"]), {}).get("loss", math.inf)
    return value if math.isfinite(value) else math.inf


def chosen(runs: Runs, bench: Bench, method: str, grid: list[float]) -> float | None:
    """The rate of the lowest final validation loss, once every rate of the grid has run and one has not diverged."""
    found = {line["lr"]: final(line) for line in runs.of(bench, method=method, phase="search")}
    if not set(grid) <= found.keys():
        return None
    best = min(grid, key=lambda lr: found[lr])
    return best if math.isfinite(found[best]) else None


def work(bench: Bench, runs: Runs, methods: list[str], seeds: int, given: list[float] | None, late: Callable) -> None:
    """Search, then the measured seeds, method by method; whatever is there already is skipped."""

    def once(method: str, lr: float, seed: int, phase: str) -> None:
        if runs.of(bench, method=method, lr=lr, seed=seed, phase=phase) or late():
            return
        result = bench.run(method, lr, seed, search=phase == "search")
        key = {"task": bench.name, "method": method, "lr": lr, "seed": seed, "phase": phase}
        runs.add({**key, "settings": bench.settings, **result})
        print(f"{bench.name} {method} lr {lr:g} seed {seed} {phase}: {final(runs.lines[-1]):.4f}", flush=True)

    for method in methods:
        grid = rates(bench, method, given)
        for lr in grid:
            once(method, lr, 0, "search")
        best = chosen(runs, bench, method, grid)
        for seed in range(1, seeds + 1) if best is not None else ():
            once(method, best, seed, "measured")


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % Student interval."""
    from scipy.stats import t

    if len(values) < 2:
        return values[0], math.nan
    width = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), width


def summary(bench: Bench, runs: Runs, methods: list[str], given: list[float] | None) -> list[dict[str, Any]]:
    """A row a method: its rate, what it trains and costs, its curve, and its difference to LoRA seed by seed."""
    rows = []
    lora = {line["seed"]: line for line in runs.of(bench, method="lora", phase="measured")}
    for method in methods:
        grid = rates(bench, method, given)
        best = chosen(runs, bench, method, grid)
        lines = runs.of(bench, method=method, phase="measured", lr=best)
        if not lines:
            continue
        row: dict[str, Any] = {"method": method, "lr": best, "edge": best in (grid[0], grid[-1]), "seeds": len(lines)}
        row |= {"trainable": lines[0]["trainable"]}
        row["init_seconds"] = statistics.median(line["init_seconds"] for line in lines)
        # A heap that earlier runs have grown hides what a start takes: the largest is nearest the truth (init_cost.py has it).
        row["init_mb"] = max(line["init_mb"] for line in runs.of(bench, method=method))
        row["step_seconds"] = statistics.median(line["step_seconds"] for line in lines)
        row["curve"] = {}
        for mark in map(str, bench.marks):
            whole = [line for line in lines if mark in line["curve"]]
            point: dict[str, Any] = {}
            for figure in ("loss", "accuracy"):
                values = [line["curve"][mark][figure] for line in whole if figure in line["curve"][mark]]
                if values:
                    point[figure], point[f"{figure}_95"] = interval(values)
            paired = [line for line in whole if mark in lora.get(line["seed"], {}).get("curve", {})]
            gaps = [line["curve"][mark]["loss"] - lora[line["seed"]]["curve"][mark]["loss"] for line in paired]
            if gaps and method != "lora":
                point["to_lora"], point["to_lora_95"] = interval(gaps)
            row["curve"][mark] = point
        rows.append(row)
    return rows


def verdict(point: dict[str, Any]) -> str:
    """Better or worse than LoRA where the paired interval leaves zero out, else no difference shown."""
    if "to_lora" not in point or not math.isfinite(point["to_lora_95"]):
        return ""
    if abs(point["to_lora"]) <= point["to_lora_95"]:
        return "="
    return "better" if point["to_lora"] < 0 else "worse"


def show(bench: Bench, rows: list[dict[str, Any]]) -> None:
    """The table: losses with half widths, and the verdict after all steps."""
    printed = []
    for row in sorted(rows, key=lambda r: r["curve"][str(bench.steps)]["loss"]):
        cells = {key: row[key] for key in ("method", "trainable")} | {"lr": f"{row['lr']:g}" + "*" * row["edge"]}
        cells |= {f"loss @{m}": f"{p['loss']:.4f} ±{p['loss_95']:.4f}" for m, p in row["curve"].items()}
        last = row["curve"][str(bench.steps)]
        if "accuracy" in last:
            cells["accuracy"] = f"{last['accuracy']:.1%} ±{last['accuracy_95']:.1%}"
        if "to_lora" in last:
            cells["to lora"] = f"{last['to_lora']:+.4f} ±{last['to_lora_95']:.4f} {verdict(last)}"
        cells |= {"init s": f"{row['init_seconds']:.1f}", "init MB": f"{row['init_mb']:.0f}"}
        printed.append(cells)
    print(f"\n{bench.task.title}; {bench.steps} steps (* best rate at an end of its grid)")
    table(printed, list(dict.fromkeys(key for cells in printed for key in cells)))


def figure(bench: Bench, rows: list[dict[str, Any]], path: Path) -> None:
    """Left: curves of the methods most asked for. Right: every method's difference to LoRA at the end, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "rankloom"
    known = {row["method"]: row for row in rows}
    colours = {"lora": "tab:gray", "lora-one": "tab:blue", "lora-ga": "tab:orange", "lora-sb": "tab:green"}
    colours |= {"pissa": "tab:purple", "full": "black"}
    height = max(3.6, 0.22 * len(rows) + 1)
    drawing, (left, right) = plt.subplots(1, 2, figsize=(10, height), layout="constrained")
    for method, colour in colours.items():
        if method in known:
            marks = [int(mark) for mark in known[method]["curve"]]
            points = list(known[method]["curve"].values())
            spread = [point["loss_95"] for point in points]
            left.errorbar(
                marks, [p["loss"] for p in points], spread, color=colour, label=method, marker="o", markersize=3
            )
    left.set(xlabel="optimizer step", ylabel="test loss (mean, 95 % interval)", title=bench.task.title)
    left.title.set_fontsize(9)
    left.grid(alpha=0.3)
    left.legend()
    compared = [row for row in rows if "to_lora" in row["curve"][str(bench.steps)]]
    compared.sort(key=lambda row: -row["curve"][str(bench.steps)]["to_lora"])
    for place, row in enumerate(compared):
        last = row["curve"][str(bench.steps)]
        colour = {"better": "tab:green", "worse": "tab:red"}.get(verdict(last), "tab:gray")
        right.errorbar(last["to_lora"], place, xerr=last["to_lora_95"], color=colour, marker="o", markersize=3)
    right.axvline(0, color="tab:gray", linewidth=1)
    right.set_yticks(range(len(compared)), [row["method"] for row in compared])
    right.set(xlabel="test loss after all steps, minus LoRA's (paired by seed)")
    right.grid(alpha=0.3, axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, metadata={"Date": None})
    plt.close(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", default="bench/results/gradient_informed.json")
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, help="of each run, instead of the task's own")
    parser.add_argument("--seeds", type=int, default=3, help="runs at the chosen rate")
    parser.add_argument("--lrs", type=float, nargs="+", help="one grid for all methods, instead of their own")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
    parser.add_argument("--figures", default="docs/figures", help="folder of the figures")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    path, begin = Path(args.json), time.monotonic()
    runs = Runs(path.with_suffix(".jsonl"))
    result = json.loads(path.read_text()) if path.is_file() else {"tasks": {}}
    for name in args.task:
        bench = Bench(name, args.steps)
        work(bench, runs, args.methods, args.seeds, args.lrs, lambda: time.monotonic() - begin > 60 * args.minutes)
        rows = summary(bench, runs, list(METHODS), args.lrs)
        if not rows:
            continue
        show(bench, rows)
        figure(bench, rows, Path(args.figures) / f"gradient_informed_{name}.svg")
        left_out = sorted(set(METHODS) - {row["method"] for row in rows})
        settings = {**bench.settings, "title": bench.task.title, "ladder": LADDER}
        result["tasks"][name] = {"settings": settings, "cut": left_out, "methods": rows, "provenance": provenance()}
        write(args.json, result)


if __name__ == "__main__":
    main()
