"""Preconditioned descent does not see the condition number of the target; plain descent pays for it in full.

From the one-step start, steps until the relative error is 1e-6, by ``kappa(Delta)``: plain gradient descent on the factors,
and descent with the factors' Gram matrices inverted (2402.02347; LoRA-One's eq. 9, 2502.01235).

    python examples/theory/condition_number.py
"""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure

from figure import BLUE, ORANGE, panels, program
from linear_model import errors, problem, spectral_start


def steps_to(
    kappa: float, *, preconditioned: bool, size: int = 60, rank: int = 4, lr: float = 0.4, tolerance: float = 1e-6,
    ridge: float = 1e-6, most: int = 4000,
) -> int:  # fmt: skip
    """Steps until the error is below ``tolerance`` for a target of condition number ``kappa``."""
    singular = torch.logspace(0, -math.log10(kappa), rank, dtype=torch.float64)
    model = problem(size, singular, samples=100 * size)
    start = spectral_start(model, rank)
    found = errors(model, *start, lr=lr, steps=most, tolerance=tolerance, preconditioned=preconditioned, ridge=ridge)
    if found[-1] > tolerance:
        raise RuntimeError(f"kappa {kappa}: error {found[-1]:.1e} after {most} steps, not {tolerance:.0e}")
    return len(found) - 1


def measure(kappas: tuple[float, ...] = (1, 2, 3, 5, 10, 20, 30, 50, 100), **settings: Any) -> dict[str, Any]:
    """Steps of both optimizers for every condition number."""
    return {
        "kappas": kappas,
        "plain": [steps_to(k, preconditioned=False, **settings) for k in kappas],
        "preconditioned": [steps_to(k, preconditioned=True, **settings) for k in kappas],
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The numbers as text."""
    rows = zip(result["kappas"], result["plain"], result["preconditioned"], strict=True)
    return ["steps to 1e-6: kappa, plain, preconditioned", *(f"  {k:>5g} {p:>6} {s:>6}" for k, p, s in rows)]


def draw(result: dict[str, Any]) -> Figure:
    """Steps by condition number."""
    figure, (axes,) = panels(1, "Preconditioning removes the condition number")
    axes.loglog(result["kappas"], result["plain"], color=ORANGE, ls="--", marker="s", ms=5, label="gradient descent")
    axes.loglog(result["kappas"], result["preconditioned"], color=BLUE, marker="o", ms=5, label="preconditioned")
    axes.set(xlabel="condition number of Δ", ylabel="steps to relative error 1e-6", ylim=(10, None))
    axes.legend()
    return figure


if __name__ == "__main__":
    program("condition_number", measure, lines, draw)
