"""Gradient flow of LoRA factors: alignment, saturation at ``log(1 / alpha) / S1``, modes one by one; and misalignment.

2503.06982's setting by gradient descent with a small step ``eta``. One module with residual ``R = Delta - B A``:
``dB/dt = R A^T``, ``dA/dt = B^T R``.

- From a spectral start (``B0 = a U``, ``A0 = a V^T``) the singular vectors of ``B A`` stay where they are and each mode follows
  ``s_i(t) = S_i / (1 + (S_i / s_i(0) - 1) exp(-2 S_i t))``.
- From a random start of size ``alpha`` the top mode saturates at ``log(1 / alpha) / S1`` plus a constant.
- ``B^T B - A A^T`` is conserved; descent drifts from it by ``O(eta)``.

Two frozen factors with LoRA on both, ``min 1/2 ||Y - (W2 + B2 A2)(W1 + B1 A1)||^2``: where the base's singular vectors are the
target's, a smaller start ends lower (until it is so small that the time runs out), and a spectral one lower still. Where
they are not, a smaller start only takes longer, and the naive spectral start (each layer's own top singular pair) stalls.

    python examples/theory/gradient_flow.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from figure import BLUE, COLOURS, GREEN, GREY, ORANGE, RED, panels, program
from linear_model import SINGULAR, iterates, problem
from rankloom.linalg import principal_angles, truncated_svd


def logistic(target: Tensor, start: float, time: Tensor) -> Tensor:
    """The closed form of every mode (times, modes)."""
    return target / (1 + (target / start - 1) * torch.exp(-2 * target * time[:, None]))


def modes(size: int, start: float, eta: float, horizon: float) -> dict[str, Any]:
    """Singular values of ``B A`` from a spectral start, their closed form, and how far their vectors turned."""
    model = problem(size, SINGULAR, samples=None)
    u, s, v = truncated_svd(model.delta, len(SINGULAR))
    b, a = start**0.5 * u, start**0.5 * v.T
    found, turned, drift = [], 0.0, 0.0
    for b_t, a_t in islice(iterates(model, b, a, lr=eta), int(horizon / eta) + 1):
        found.append((u * (b_t @ (a_t @ v))).sum(0))
        drift = max(drift, float((b_t.T @ b_t - a_t @ a_t.T).norm()))
        if len(found) % 100 == 1:
            turned = max(turned, float(principal_angles(u[:, :1], (b_t @ a_t @ v)[:, :1])))
    time = eta * torch.arange(len(found), dtype=torch.float64)
    measured = torch.stack(found)
    closed = logistic(s, start, time)
    return {
        "time": time,
        "measured": measured,
        "closed": closed,
        "deviation": float((measured - closed).abs().max()),
        "turned": turned,
        "drift": drift,
    }


def random_start(size: int, rank: int, alpha: float, eta: float, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterates from factors that are both ``N(0, alpha^2)``."""
    g = torch.Generator().manual_seed(seed)
    b, a = (alpha * torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((size, rank), (rank, size)))
    return iterates(problem(size, SINGULAR, samples=None), b, a, lr=eta)


def saturation(size: int, rank: int, alpha: float, eta: float, most: float = 200.0) -> float:
    """The time at which the top mode of ``B A`` reaches half its target."""
    half = float(SINGULAR[0]) / 2
    for step, (b, a) in enumerate(islice(random_start(size, rank, alpha, eta), int(most / eta))):
        if float(torch.linalg.matrix_norm(b @ a, 2)) >= half:
            return step * eta
    raise RuntimeError(f"alpha {alpha}: the top mode is not there after time {most}")


def conservation(size: int, rank: int, alpha: float, eta: float, horizon: float) -> float:
    """How far ``B^T B - A A^T`` drifts within a given time."""
    path = list(islice(random_start(size, rank, alpha, eta), int(horizon / eta) + 1))
    (b0, a0), (b, a) = path[0], path[-1]
    return float(((b.T @ b - a @ a.T) - (b0.T @ b0 - a0 @ a0.T)).norm())


def two_layers(
    alphas: tuple[float, ...], seeds: int, *, aligned: bool, spectral: bool, size: int, eta: float, steps: int
) -> list[float]:
    """Mean final loss for every ``alpha`` over seeds: rank-one LoRA on both factors of a rank-4 base, ``||Delta|| = 1``."""
    bases = [_base(size, seed, aligned) for seed in range(seeds)]
    w2, w1, y = (torch.stack(parts).repeat(len(alphas), 1, 1) for parts in zip(*bases, strict=True))
    scale = torch.tensor(alphas, dtype=torch.float64).repeat_interleave(seeds)[:, None, None]
    g = torch.Generator().manual_seed(100)

    def draw(*shape: int) -> Tensor:
        return scale * torch.randn(seeds, *shape, generator=g, dtype=torch.float64).repeat(len(alphas), 1, 1)

    b2, a2, b1, a1 = draw(size, 1), draw(1, size), draw(size, 1), draw(1, size)
    if spectral:
        residual = y - w2 @ w1
        (b2, a2), (b1, a1) = _top_pair(residual @ w1.mT, scale), _top_pair(w2.mT @ residual, scale)
    for _ in range(steps):
        v2, v1 = w2 + b2 @ a2, w1 + b1 @ a1
        residual = y - v2 @ v1
        g2, g1 = residual @ v1.mT, v2.mT @ residual
        b2, a2 = b2 + eta * g2 @ a2.mT, a2 + eta * b2.mT @ g2
        b1, a1 = b1 + eta * g1 @ a1.mT, a1 + eta * b1.mT @ g1
    loss = (y - (w2 + b2 @ a2) @ (w1 + b1 @ a1)).square().sum((1, 2)) / 2
    return loss.view(len(alphas), seeds).mean(1).tolist()


def _top_pair(gradient: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    u, _, vh = torch.linalg.svd(gradient)
    return scale * u[..., :1], scale * vh[..., :1, :]


def _base(size: int, seed: int, aligned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A balanced factorisation of a rank-4 base, and the target that adds one rank-one direction of size one."""
    g = torch.Generator().manual_seed(seed)

    def basis(columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, columns, generator=g, dtype=torch.float64)).Q

    u, hidden, v, other = basis(4), basis(4), basis(4), basis(2)
    root = torch.tensor([1.0, 0.9, 0.8, 0.7], dtype=torch.float64).sqrt()
    w2, w1 = (u * root) @ hidden.T, (hidden * root) @ v.T
    left, right = (u[:, :1], v[:, :1]) if aligned else (other[:, :1], other[:, 1:])
    return w2, w1, w2 @ w1 + left @ right.T


def measure(
    size: int = 20,
    rank: int = 4,
    eta: float = 0.01,
    alphas: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    seeds: int = 3,
    two_layer_steps: int = 8000,
) -> dict[str, Any]:
    """Everything the figure shows."""
    followed = modes(size, 1e-4, eta, horizon=40.0)
    small = alphas[1:]
    times = [saturation(size, rank, alpha, eta) for alpha in small]
    logs = torch.tensor([math.log(1 / alpha) for alpha in small], dtype=torch.float64)
    slope = float(torch.linalg.lstsq(torch.stack([logs, torch.ones_like(logs)], 1), torch.tensor(times).double()[:, None])
                  .solution[0])  # fmt: skip
    kinds = {"aligned": (True, False), "aligned, spectral": (True, True), "misaligned": (False, False),
             "misaligned, spectral": (False, True)}  # fmt: skip
    return {
        "modes": followed,
        "alphas": alphas,
        "saturation": {"alphas": small, "times": times, "slope": slope, "expected": 1 / float(SINGULAR[0])},
        "drift": {step: conservation(size, rank, 0.1, step, horizon=20.0) for step in (4 * eta, 2 * eta, eta)},
        "two_layers": {
            name: two_layers(
                alphas, seeds, aligned=aligned, spectral=spectral, size=10, eta=0.02, steps=two_layer_steps
            )
            for name, (aligned, spectral) in kinds.items()
        },
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The numbers as text."""
    followed, saturated = result["modes"], result["saturation"]
    made = [
        f"spectral start: modes within {followed['deviation']:.1e} of the closed form, top vector turned by "
        f"{followed['turned']:.1e} rad, ||B^T B - A A^T|| <= {followed['drift']:.1e}",
        f"random start: the top mode saturates after {', '.join(f'{t:.1f}' for t in saturated['times'])} for alpha "
        f"{', '.join(f'{a:g}' for a in saturated['alphas'])}: slope {saturated['slope']:.3f} per log(1/alpha), 1/S1 = "
        f"{saturated['expected']:.3f}",
        "drift of B^T B - A A^T by step size: " + ", ".join(f"{s:g}: {d:.2e}" for s, d in result["drift"].items()),
        "two layers, final loss by alpha " + ", ".join(f"{a:g}" for a in result["alphas"]),
    ]
    for name, losses in result["two_layers"].items():
        made.append(f"  {name:<21} " + "  ".join(f"{loss:.0e}" for loss in losses))
    return made


def draw(result: dict[str, Any]) -> Figure:
    """Modes against the closed form; saturation times; two layers."""
    figure, (left, middle, right) = panels(
        3, "Small starts align first, then learn mode by mode; a misaligned base spoils it"
    )
    followed = result["modes"]
    every = max(1, len(followed["time"]) // 200)
    for index, colour in zip(range(len(SINGULAR)), COLOURS, strict=False):
        left.plot(followed["time"][::every], followed["measured"][::every, index], color=colour, lw=3, alpha=0.35)
        left.plot(followed["time"][::every], followed["closed"][::every, index], color=colour, ls="--", lw=1.2)
    left.set(xlabel="time (step × η)", ylabel="singular value of BA", title="spectral start; closed form dashed")
    saturated = result["saturation"]
    middle.semilogx(saturated["alphas"], saturated["times"], color=BLUE, marker="o", label="measured")
    anchor = saturated["times"][0]
    line = [anchor + saturated["expected"] * math.log(saturated["alphas"][0] / a) for a in saturated["alphas"]]
    middle.semilogx(saturated["alphas"], line, color=GREY, ls="--", label="slope 1/S₁")
    middle.set(xlabel="size of the random start α", ylabel="time to half of S₁", title="alignment takes log(1/α)/S₁")
    looks = {
        "aligned": (BLUE, "-", "o"),
        "aligned, spectral": (GREEN, "--", "s"),
        "misaligned": (ORANGE, "-.", "^"),
        "misaligned, spectral": (RED, ":", "v"),
    }
    for name, (colour, style, marker) in looks.items():
        losses = [max(loss, 1e-33) for loss in result["two_layers"][name]]
        right.loglog(result["alphas"], losses, color=colour, ls=style, marker=marker, ms=5, label=name)
    right.set(xlabel="size of the start α", ylabel="final loss", title="two layers, fixed time")
    middle.legend()
    right.legend(loc="center right", bbox_to_anchor=(1, 0.35))
    return figure


if __name__ == "__main__":
    program("gradient_flow", measure, lines, draw)
