"""One step along the full gradient recovers the target: exactly for isotropic inputs, else up to ``||Sigma - I||``.

LoRA-One's theorem 3.3 (2502.01235): its start at step size one has ``||B0 A0 - Delta|| <= ||Sigma - I|| ||Delta||`` in
operator norm, before any training. The right panel goes on from there, against LoRA's own start.

    python examples/theory/one_step_recovery.py
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from figure import BLUE, GREY, ORANGE, panels, program, thinned
from linear_model import SINGULAR, errors, lora_start, problem, spectral_start


def _operator(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def recovery(size: int, rank: int, samples: int | None) -> tuple[float, float]:
    """``||B0 A0 - Delta|| / ||Delta||`` in operator norm, and the theorem's bound on it."""
    model = problem(size, SINGULAR, samples)
    b, a = spectral_start(model, rank)
    bound = _operator(model.sigma - torch.eye(size, dtype=torch.float64))
    return _operator(b @ a - model.delta) / _operator(model.delta), bound


def measure(
    size: int = 60,
    rank: int = 4,
    samples: tuple[int, ...] = (200, 600, 2000, 6000, 20000, 60000),
    lr: float = 0.1,
    steps: int = 600,
) -> dict[str, Any]:
    """Error of the start and its bound by number of samples, and the errors of training from both starts."""
    middle = problem(size, SINGULAR, 6000)
    return {
        "samples": samples,
        "found": [recovery(size, rank, n) for n in samples],
        "isotropic": recovery(size, rank, None)[0],
        "lora-one": errors(middle, *spectral_start(middle, rank), lr=lr, steps=steps),
        "lora": errors(middle, *lora_start(middle, rank, size**-0.5), lr=lr, steps=steps),
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The numbers as text."""
    made = ["||B0 A0 - Delta|| / ||Delta|| of the one-step start (operator norm)"]
    for n, (error, bound) in zip(result["samples"], result["found"], strict=True):
        made.append(f"  {n:>6} samples: {error:.3f} <= {bound:.3f}")
    made.append(f"  Sigma = I: {result['isotropic']:.1e}")
    end = len(result["lora"]) - 1
    made.append(f"after {end} steps: one-step start {result['lora-one'][-1]:.1e}, LoRA's {result['lora'][-1]:.1e}")
    return made


def draw(result: dict[str, Any]) -> Figure:
    """Left: the start against its bound. Right: training from there."""
    figure, (left, right) = panels(2, "The one-step start is next to the target before training begins")
    error, bound = zip(*result["found"], strict=True)
    left.loglog(result["samples"], bound, color=GREY, ls="--", marker="s", ms=4, label="bound ‖Σ − I‖")
    left.loglog(result["samples"], error, color=BLUE, marker="o", ms=5, label="one-step start")
    left.set(xlabel="samples", ylabel="relative error (operator norm)", title="step 0")
    for name, label, colour, style in (
        ("lora", "LoRA's start", ORANGE, "--"),
        ("lora-one", "one-step start", BLUE, "-"),
    ):
        right.semilogy(*thinned(result[name]), color=colour, ls=style, label=label)
    right.set(
        xlabel="gradient descent step", ylabel="relative error (Frobenius)", title="6,000 samples, same step size"
    )
    for axes in (left, right):
        axes.legend()
    return figure


if __name__ == "__main__":
    program("one_step_recovery", measure, lines, draw)
