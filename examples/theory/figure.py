"""What the programs share: one look for the figures, and the command line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by every common kind of colour vision; styles differ too, for print in grey.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"
COLOURS = (BLUE, ORANGE, GREEN, RED, GREY)
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))

_LOOK = {
    "svg.hashsalt": "rankloom",  # the same figure is the same file
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}


def panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels side by side under a title that states the result."""
    plt.rcParams.update(_LOOK)
    figure, axes = plt.subplots(1, count, figsize=(6.4 if count == 1 else 4.6 * count, 3.6), squeeze=False)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    return figure, list(axes[0])


def thinned(values: list[float], points: int = 300) -> tuple[list[int], list[float]]:
    """At most about ``points`` of a long curve, with their positions: a figure shows no more and its file stays small."""
    stride = max(1, len(values) // points)
    steps = [*range(0, len(values) - 1, stride), len(values) - 1]
    return steps, [values[step] for step in steps]


def program(
    name: str,
    measure: Callable[[], dict[str, Any]],
    lines: Callable[[dict[str, Any]], list[str]],
    draw: Callable[[dict[str, Any]], Figure],
) -> None:
    """The command line of every program: measure, print the numbers, write ``<out>/<name>.svg``."""
    parser = argparse.ArgumentParser(description=name.replace("_", " "))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the figure")
    out = parser.parse_args().out
    begin = time.perf_counter()
    result = measure()
    print("\n".join(lines(result)))
    out.mkdir(parents=True, exist_ok=True)
    draw(result).savefig(out / f"{name}.svg", metadata={"Date": None})
    print(f"{out / name}.svg, {time.perf_counter() - begin:.1f} s")
