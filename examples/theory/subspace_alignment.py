"""LoRA finds the singular subspaces of the first full gradient by itself: at once on one side, slowly on the other.

LoRA-One's theorems 3.1 and 3.2 (2502.01235) on the linear model, LoRA's start (``A`` random, ``B`` zero), gradient descent:
the columns of ``B`` never leave the top-r* left singular subspace of ``N = -G``, and the rows of ``A`` align with the right
one, the better the smaller the start. With finitely many samples the alignment turns back: training converges to ``Delta``,
whose rows are not those of ``N = Delta Sigma``.

    python examples/theory/subspace_alignment.py
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from figure import COLOURS, GREY, STYLES, panels, program, thinned
from linear_model import SINGULAR, LinearModel, iterates, lora_start, problem
from rankloom.linalg import principal_angles, truncated_svd


def alignment(
    model: LinearModel, std: float, *, rank: int, lr: float, steps: int, every: int
) -> dict[str, list[float]]:
    """Sine of the largest principal angle to the top-r* singular subspaces of ``N``, every so many steps.

    ``A``: of the leading r* right singular directions of ``A``; ``B``: of the leading left ones of ``B``, from the first
    step on (``B`` starts at zero and spans nothing).
    """
    live = int((SINGULAR > 0).sum())
    u, _, v = truncated_svd(model.negative, live)
    found: dict[str, list[float]] = {"A": [], "B": []}
    for step, (b, a) in enumerate(islice(iterates(model, *lora_start(model, rank, std), lr=lr), steps + 1)):
        if step % every == 0:
            found["A"].append(_sine(v, truncated_svd(a.T, live)[0]))
            found["B"].append(_sine(u, truncated_svd(b, live)[0]) if step else float("nan"))
    return found


def _sine(one: Tensor, other: Tensor) -> float:
    return float(principal_angles(one, other)[-1].sin())


def floor(model: LinearModel) -> float:
    """Sine of the largest angle between the row spaces of ``N`` and of ``Delta``: where the rows of ``A`` have to end."""
    live = int((SINGULAR > 0).sum())
    return _sine(truncated_svd(model.negative, live)[2], truncated_svd(model.delta, live)[2])


def measure(
    size: int = 100,
    rank: int = 8,
    stds: tuple[float, ...] = (0.1, 0.01, 0.001),
    samples: tuple[int, ...] = (1600, 16000),
    lr: float = 0.05,
    steps: int = 3000,
    every: int = 10,
) -> dict[str, Any]:
    """Angles over time: by size of the start with ``Sigma = I``, and by number of samples with the smallest start."""
    settings = {"rank": rank, "lr": lr, "steps": steps, "every": every}
    isotropic = problem(size, SINGULAR, samples=None)
    finite = {n: problem(size, SINGULAR, n) for n in samples}
    return {
        "every": every,
        "by_std": {std: alignment(isotropic, std, **settings) for std in stds},
        "by_samples": {n: alignment(model, min(stds), **settings) for n, model in finite.items()},
        "floors": {n: floor(model) for n, model in finite.items()},
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The numbers as text."""
    made = ["sine of the largest principal angle to the singular subspaces of the first negative gradient"]
    for std, found in result["by_std"].items():
        made.append(f"  Sigma = I, A0 ~ {std}: A at best {min(found['A']):.4f}, B at worst {max(found['B'][1:]):.1e}")
    for n, found in result["by_samples"].items():
        made.append(
            f"  {n} samples: A at best {min(found['A']):.4f}, at the end {found['A'][-1]:.4f}; between N and Delta "
            f"{result['floors'][n]:.4f}; B at worst {max(found['B'][1:]):.1e}"
        )
    return made


def draw(result: dict[str, Any]) -> Figure:
    """Left: the start's size. Right: finitely many samples."""
    figure, (left, right) = panels(2, "LoRA aligns with the first gradient: B at once, A from a small start")
    for (std, found), colour, style in zip(result["by_std"].items(), COLOURS, STYLES, strict=False):
        at, values = thinned(found["A"])
        left.semilogy([i * result["every"] for i in at], values, color=colour, ls=style, label=f"A, start {std:g}")
        at, values = thinned(found["B"])
        left.semilogy([i * result["every"] for i in at], values, color=GREY, lw=1, label=None)
    left.annotate("B, every start", (0.97, 0.12), xycoords="axes fraction", ha="right", color=GREY, fontsize=9)
    left.set_title("isotropic inputs")
    for (n, found), colour, style in zip(result["by_samples"].items(), COLOURS, STYLES, strict=False):
        at, values = thinned(found["A"])
        right.semilogy([i * result["every"] for i in at], values, color=colour, ls=style, label=f"A, {n:,} samples")
        right.axhline(result["floors"][n], color=colour, lw=0.9, ls=":")
    right.set_title("finite samples: A ends on the rows of Δ (dotted)")
    for axes in (left, right):
        axes.set(xlabel="gradient descent step", ylabel="sine of the largest angle to N")
    left.legend(loc="lower right", bbox_to_anchor=(1, 0.2))
    right.legend()
    return figure


if __name__ == "__main__":
    program("subspace_alignment", measure, lines, draw)
