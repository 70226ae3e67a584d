"""A study: methods on tasks under one protocol, with an equal search, fresh seeds, intervals, a table and figures.

Every finished run is a line of a JSONL file beside the result, and is not run again. The protocol is told where it is used:
:mod:`gradient_informed`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import provenance, table, write
from fine_tuning import TASKS, Bench, Method
from search import LADDER, Grid, Search, best


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


def final(line: dict[str, Any]) -> float:
    """The loss after the last step; infinite for a run that did not get there."""
    value = line["curve"].get(str(line["settings"]["steps"]), {}).get("loss", math.inf)
    return value if math.isfinite(value) else math.inf


def searched(runs: Runs, bench: Bench, method: str) -> dict[float, float]:
    """The final validation loss of every rate that a method has been run with in a search."""
    return {line["lr"]: final(line) for line in runs.of(bench, method=method, phase="search")}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % Student interval."""
    from scipy.stats import t

    if len(values) < 2:
        return values[0], math.nan
    width = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), width


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
    print(f"\n{bench.task.title}; {bench.steps} steps (* a neighbour of the best rate was not tried)")
    table(printed, list(dict.fromkeys(key for cells in printed for key in cells)))


@dataclass(frozen=True)
class Study:
    """Methods by label; ``drawn``: the colours of those whose curves are shown; ``tasks``: of :data:`fine_tuning.TASKS`;
    ``rule``: how every method's rate is searched, instead of four of the ladder around where its rates are known to lie.

    Differences are to the method called ``lora``, paired by seed, as data and order are the same.
    """

    name: str
    about: str
    methods: dict[str, Method]
    drawn: dict[str, str] = field(default_factory=dict)
    tasks: tuple[str, ...] = tuple(TASKS)
    rule: Search | None = None

    def search(self, bench: Bench, method: str, given: list[float] | None) -> Search:
        """How a method's rate is found: among the given ones, or by the study's rule."""
        if given:
            return Grid(tuple(given))
        if self.rule is not None:
            return self.rule
        first = LADDER.index(bench.task.first) + self.methods[method].shift
        return Grid(LADDER[first : first + 4])

    def work(
        self, bench: Bench, runs: Runs, methods: list[str], seeds: int, given: list[float] | None, late: Callable
    ) -> None:
        """Search, then the measured seeds, method by method; whatever is there already is skipped."""

        def once(method: str, lr: float, seed: int, phase: str) -> bool:
            if runs.of(bench, method=method, lr=lr, seed=seed, phase=phase):
                return True
            if late():
                return False
            result = bench.run(self.methods[method], lr, seed, search=phase == "search")
            key = {"task": bench.name, "method": method, "lr": lr, "seed": seed, "phase": phase}
            runs.add({**key, "settings": bench.settings, **result})
            print(f"{bench.name} {method} lr {lr:g} seed {seed} {phase}: {final(runs.lines[-1]):.4f}", flush=True)
            return True

        for method in methods:
            search = self.search(bench, method, given)
            while (wanted := search.visit(searched(runs, bench, method))[1]) is not None:
                if not once(method, wanted, 0, "search"):
                    break
            rate = best(search, searched(runs, bench, method))
            for seed in range(1, seeds + 1) if rate is not None else ():
                once(method, rate, seed, "measured")

    def summary(self, bench: Bench, runs: Runs, methods: list[str], given: list[float] | None) -> list[dict[str, Any]]:
        """A row a method: its rate, what it trains and costs, its curve, and its difference to LoRA seed by seed."""
        rows = []
        lora = {line["seed"]: line for line in runs.of(bench, method="lora", phase="measured")}
        for method in methods:
            search = self.search(bench, method, given)
            found = searched(runs, bench, method)
            rate = best(search, found)
            lines = runs.of(bench, method=method, phase="measured", lr=rate)
            if not lines:
                continue
            row: dict[str, Any] = {
                "method": method,
                "lr": rate,
                "edge": search.at_edge(rate, found),
                "seeds": len(lines),
            }
            row |= {"trainable": lines[0]["trainable"]}
            row["init_seconds"] = statistics.median(line["init_seconds"] for line in lines)
            # A heap that earlier runs have grown hides what a start takes: the largest is nearest the truth (see init_cost.py).
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

    def figure(self, bench: Bench, rows: list[dict[str, Any]], path: Path) -> None:
        """Left: curves of the methods most asked for. Right: every method's difference to LoRA at the end, with intervals."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        matplotlib.rcParams["svg.hashsalt"] = "rankloom"
        known = {row["method"]: row for row in rows}
        height = max(3.6, 0.22 * len(rows) + 1)
        drawing, (left, right) = plt.subplots(1, 2, figsize=(10, height), layout="constrained")
        for method, colour in self.drawn.items():
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
            shade = {"better": "tab:green", "worse": "tab:red"}.get(verdict(last), "tab:gray")
            right.errorbar(last["to_lora"], place, xerr=last["to_lora_95"], color=shade, marker="o", markersize=3)
        right.axvline(0, color="tab:gray", linewidth=1)
        right.set_yticks(range(len(compared)), [row["method"] for row in compared])
        right.set(xlabel="test loss after all steps, minus LoRA's (paired by seed)")
        right.grid(alpha=0.3, axis="x")
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, metadata={"Date": None})
        plt.close(drawing)

    def main(self, argv: list[str] | None = None) -> None:
        """The command line: run what is missing, then table, figure and result."""
        parser = argparse.ArgumentParser(description=self.about)
        parser.add_argument("--json", default=f"bench/results/{self.name}.json")
        parser.add_argument("--task", nargs="+", default=list(self.tasks), choices=list(self.tasks))
        parser.add_argument("--methods", nargs="+", default=list(self.methods), choices=list(self.methods))
        parser.add_argument("--steps", type=int, help="of each run, instead of the task's own")
        parser.add_argument("--seeds", type=int, default=3, help="runs at the chosen rate")
        parser.add_argument("--lrs", type=float, nargs="+", help="one grid for all methods, instead of their own")
        parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
        parser.add_argument("--figures", default="docs/figures", help="folder of the figures")
        args = parser.parse_args(argv)
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        path, begin = Path(args.json), time.monotonic()
        runs = Runs(path.with_suffix(".jsonl"))
        for name in args.task:
            bench = Bench(name, args.steps)
            self.work(
                bench, runs, args.methods, args.seeds, args.lrs, lambda: time.monotonic() - begin > 60 * args.minutes
            )
            rows = self.summary(bench, runs, list(self.methods), args.lrs)
            if not rows:
                continue
            show(bench, rows)
            self.figure(bench, rows, Path(args.figures) / f"{self.name}_{name}.svg")
            left_out = sorted(set(self.methods) - {row["method"] for row in rows})
            # Read only now: another task of the same study may have ended meanwhile.
            result = json.loads(path.read_text()) if path.is_file() else {"tasks": {}}
            settings = {**bench.settings, "title": bench.task.title, "ladder": LADDER}
            result["tasks"][name] = {"settings": settings, "cut": left_out, "methods": rows, "provenance": provenance()}
            write(args.json, result)
