"""Which starts can reach the target at all: LoRA-One's does, LoRA-GA's offset and LoRA-SB's frozen bases leave a floor.

The toy of LoRA-One's Fig. 4 (2502.01235). LoRA-GA (2407.05000) starts from other directions on either side and subtracts
them again, so its factors have to hold ``Delta + B0 A0``, of rank r* + r > r: what the best rank-r fit of that leaves, no
optimizer gets below. LoRA-SB (2411.19557) trains only the core ``R`` between bases of the first update, and what of
``Delta`` lies outside of them stays lost. Both floors are computed here without any training, as dotted lines.

    python examples/theory/start_floors.py
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from figure import BLUE, GREEN, GREY, ORANGE, RED, panels, program, thinned
from linear_model import SINGULAR, LinearModel, errors, lora_ga_start, lora_start, problem, spectral_start
from rankloom.linalg import best_rank, truncated_svd


def offset_floor(model: LinearModel, b: Tensor, a: Tensor) -> float:
    """Error of the best ``P - B0 A0`` with ``rank(P) <= r`` in the loss's own metric: Eckart-Young on ``(.) Sigma^1/2``."""
    root = torch.linalg.cholesky(model.sigma)
    fitted = best_rank((model.delta + b @ a) @ root, len(a)) @ torch.linalg.inv(root)
    return model.error(fitted - b @ a)


def core_errors(model: LinearModel, rank: int, *, sign: bool, lr: float, steps: int) -> tuple[list[float], float]:
    """LoRA-SB: descent on ``R`` in ``B R A`` from ``R0 = diag(S)``, and the error of the best ``R`` there is.

    ``B``, ``A`` are singular bases of the first update: ``sign`` of the negative gradient (the released AdamW estimate,
    scaled to the gradient's own norm) or the negative gradient itself.
    """
    update = model.negative
    if sign:
        update = update.sign() * (update.norm() / update.numel() ** 0.5)
    b, s, v = truncated_svd(update, rank)
    core, found = torch.diag(s), []
    for _ in range(steps + 1):
        product = b @ core @ v.T
        found.append(model.error(product))
        core = core - lr * b.T @ model.gradient(product) @ v
    best = b.T @ model.delta @ model.sigma @ v @ torch.linalg.inv(v.T @ model.sigma @ v)
    return found, model.error(b @ best @ v.T)


def measure(size: int = 100, rank: int = 8, samples: int = 1600, lr: float = 0.3, steps: int = 1500) -> dict[str, Any]:
    """Errors over time by start, and the floors."""
    model = problem(size, SINGULAR, samples)
    one, lora, (b, a) = spectral_start(model, rank), lora_start(model, rank, size**-0.5), lora_ga_start(model, rank)
    run = {"lr": lr, "steps": steps}
    released, released_floor = core_errors(model, rank, sign=True, **run)
    raw, raw_floor = core_errors(model, rank, sign=False, **run)
    return {
        "curves": {
            "LoRA": errors(model, *lora, **run),
            "LoRA-GA": errors(model, b, a, offset=b @ a, **run),
            "LoRA-GA, preconditioned": errors(model, b, a, offset=b @ a, preconditioned=True, **run),
            "LoRA-SB": released,
            "LoRA-SB, raw gradient": raw,
            "LoRA-One": errors(model, *one, **run),
            "LoRA-One, preconditioned": errors(model, *one, preconditioned=True, **run),
        },
        "floors": {
            "LoRA-GA": offset_floor(model, b, a),
            "LoRA-SB": released_floor,
            "LoRA-SB, raw gradient": raw_floor,
        },
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The numbers as text."""
    made = [f"relative error at the start, after {len(result['curves']['LoRA']) - 1} steps, and the least possible"]
    for name, values in result["curves"].items():
        floor = result["floors"].get(name.removesuffix(", preconditioned"), 0.0)
        made.append(f"  {name:<26} {values[0]:.3f}  {values[-1]:.3e}  {floor:.3f}")
    return made


def draw(result: dict[str, Any]) -> Figure:
    """Errors over time; floors dotted."""
    figure, (axes,) = panels(1, "LoRA-One reaches the target; LoRA-GA and LoRA-SB cannot")
    looks = {
        "LoRA": (GREY, "-"),
        "LoRA-GA": (ORANGE, "--"),
        "LoRA-SB": (RED, "-."),
        "LoRA-One": (GREEN, "--"),
        "LoRA-One, preconditioned": (BLUE, "-"),
    }
    for name, (colour, style) in looks.items():
        axes.semilogy(*thinned(result["curves"][name]), color=colour, ls=style, label=name)
        if name in result["floors"]:
            axes.axhline(result["floors"][name], color=colour, ls=":", lw=1)
    axes.set(xlabel="gradient descent step", ylabel="relative error")
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.3))
    return figure


if __name__ == "__main__":
    program("start_floors", measure, lines, draw)
