"""The phase transition of nearly-linear attention gradients: what error costs, against the entries' bound B, the length L and d.

A head has independent entries uniform in [-B, B] and logits q k^T / sqrt(d), an output gradient of independent normal entries.
Four parts, each kept from an earlier result where it is not run again:

- degree: the smallest Taylor degree at which the output, and the worst of dQ, dK, dV, have a relative Frobenius error below
  1e-2, 1e-3 and 1e-6, and the features it takes; dense, in float64.
- time: forward and backward of exact attention (SDPA, padded to 16 where d < 16) and of the factor of every degree that
  a gradient error of 1e-2 asks for, in turn, at each length; CPU seconds of one thread, medians; their growth exponents in L.
  Factors wider than --max-width are not run: their time is taken as proportional to L times the features, from the widest one
  measured at that d and L, and marked as extrapolated.
- error: what those factors' output and worst gradient are off by at lengths beyond the dense ones, against SDPA on all rows.
- phase: the speed-up at gradient error 1e-2 over B and L for each d, and for each B and d the length from which it exceeds 1.

Claim: below a bound that falls with d the factor wins from some length on, and its time grows as L^1.1 or less where exact
attention's grows as L^1.9 or more; above it the features needed outnumber any length. Theory puts the threshold at B of order
sqrt(log L) for d of order log L (arXiv 2406.03136): the figure shows it beside the measured border.

    python bench/limits_phase.py --json bench/results/limits_phase.json --figure docs/figures/limits_phase.png
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import earlier, interleaved, provenance, ratios, table, write
from rankloom.attention.exact import attention_gradients, attention_weights
from rankloom.attention.factored import Factored
from rankloom.attention.polynomial import Isotropic
from rankloom.attention.precondition import Preconditioner
from rankloom.attention.trial import Head, errors

EPS = (1e-2, 1e-3, 1e-6)
MOST = 100  # degrees tried
PARTS = ["degree", "time", "error"]


def head(bound: float, length: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v and an output gradient."""
    torch.manual_seed(0)
    q, k, v = ((2 * torch.rand(length, dim, dtype=torch.float64) - 1) * bound for _ in range(3))
    return tuple(t.to(dtype) for t in (q, k, v, torch.randn(length, dim, dtype=torch.float64)))


def degrees(bound: float, dim: int, length: int) -> dict[str, Any]:
    """The smallest degrees for each error, from the dense polynomial ``p_g`` and its derivative ``p_{g-1}``."""
    q, k, v, grad = head(bound, length, dim, torch.float64)
    scale = dim**-0.5
    exact = attention_weights(q[None], k, scale=scale, causal=False)[0] @ v
    wanted = [t.view(-1, dim) for t in attention_gradients(q[None], k, v, grad[None], scale=scale, causal=False)]
    k = k - k.mean(0)  # which moves no attention weight, and is what the preconditioner does
    logits = scale * q @ k.mT
    power, below, inner = torch.ones_like(logits), torch.zeros_like(logits), grad @ v.mT
    value = power.clone()
    found: dict[str, Any] = {"B": bound, "d": dim, "R": float(logits.abs().max()), "std": float(logits.std())}
    for degree in range(1, MOST + 1):
        power.mul_(logits).div_(degree)
        below, value = value, value + power
        weights, sums = value / value.sum(1, keepdim=True), value.sum(1, keepdim=True)
        out = weights @ v
        slope = scale * below * (inner - (grad * out).sum(1, keepdim=True)) / sums
        got = (slope @ k, slope.mT @ q, weights.mT @ grad)
        gradient = max(float((g - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True))
        for name, error in (("out", float((out - exact).norm() / exact.norm())), ("grad", gradient)):
            for eps in EPS:
                if error <= eps:
                    found.setdefault(f"{name} {eps:.0e}", degree)
        if all(f"{name} {eps:.0e}" in found for name in ("out", "grad") for eps in EPS):
            break
    for eps in EPS:
        if degree_ := found.get(f"grad {eps:.0e}"):
            found[f"width {eps:.0e}"] = math.comb(dim + degree_, dim)
    return found


def exact(leaves: tuple[Tensor, ...], grad: Tensor, causal: bool) -> Callable[[], Any]:
    """Forward and backward of exact attention."""
    dim = leaves[0].shape[1]

    def run() -> None:
        q, k, v = (F.pad(t, (0, max(16 - dim, 0)))[None, None] for t in leaves)
        out = F.scaled_dot_product_attention(q, k, v, scale=dim**-0.5, is_causal=causal)[0, 0, :, :dim]
        torch.autograd.grad(out, leaves, grad)

    return run


def factored(bound: float, length: int, dim: int, degree: int, causal: bool) -> tuple[Factored, tuple[Tensor, ...]]:
    """The factor of a degree, fitted to a head."""
    q, k, v, grad = head(bound, length, dim)
    preconditioner = Preconditioner.fit(q, k, dim**-0.5)
    return Factored(preconditioner, Isotropic(dim, degree), scale=dim**-0.5, causal=causal), (q, k, v, grad)


def approximate(approximation: Factored, leaves: tuple[Tensor, ...], grad: Tensor) -> Callable[[], Any]:
    """Forward and backward of a factor."""

    def run() -> None:
        out, _ = approximation(leaves[0][None], *leaves[1:])
        torch.autograd.grad(out, leaves, grad[None])

    return run


def times(dim: int, length: int, degree_of: dict[float, int], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of exact attention and of each degree."""
    bounds = {d: b for b, d in degree_of.items() if math.comb(dim + d, d) <= args.max_width}  # one bound a degree
    *leaves, grad = head(min(degree_of), length, dim)
    inputs = tuple(t.requires_grad_() for t in leaves)
    variants = {"exact": exact(inputs, grad, args.causal)}
    for degree, bound in sorted(bounds.items()):
        approximation, (*own, pull) = factored(bound, length, dim, degree, args.causal)
        variants[str(degree)] = approximate(approximation, tuple(t.requires_grad_() for t in own), pull)
    rounds = max(2, min(args.repeats, args.repeats * 8192 // length))
    measured = ratios(interleaved(variants, rounds), "exact")
    seconds = {n: m["seconds"] for n, m in measured.items()}
    spread = {n: [m["ratio_low"], m["ratio_high"]] for n, m in measured.items()}
    return {"d": dim, "L": length, "rounds": rounds, "seconds": seconds, "ratio_quartiles": spread}


def deviations(dim: int, length: int, degree_of: dict[float, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """True errors of every degree that was run, on the head of the largest bound that asks for it."""
    rows = []
    for degree, bound in sorted({degree: bound for bound, degree in sorted(degree_of.items())}.items()):
        if (width := math.comb(dim + degree, dim)) <= args.max_width:
            approximation, (q, k, v, grad) = factored(bound, length, dim, degree, args.causal)
            whole = Head(q[None], k, v, grad[None], approximation.scale, args.causal)
            found = errors(approximation, whole)
            row = {"d": dim, "L": length, "B": bound, "degree": degree, "width": width}
            rows.append(row | {"output": found.output, "gradient": found.gradients})
    return rows


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``seconds ~ L^exponent`` by least squares in logarithms, for every d and variant at two lengths or more."""
    fitted = []
    for dim in sorted({row["d"] for row in rows}):
        own = [row for row in rows if row["d"] == dim]
        for variant in sorted({v for row in own for v in row["seconds"]}, key=lambda v: (v != "exact", len(v), v)):
            points = [(math.log(r["L"]), math.log(r["seconds"][variant])) for r in own if variant in r["seconds"]]
            if len(points) > 1:
                x, y = torch.tensor(points, dtype=torch.float64).T
                slope = float(((x - x.mean()) * y).sum() / (x - x.mean()).square().sum())
                fitted.append({"d": dim, "variant": variant, "lengths": len(points), "exponent": slope})
    return fitted


def phase(degree_rows: list[dict[str, Any]], time_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed-up at gradient error 1e-2 for every B, d and L."""
    cells = []
    for row in time_rows:
        measured = {int(v): s for v, s in row["seconds"].items() if v != "exact"}
        for wanted in degree_rows:
            degree = wanted.get("grad 1e-02")
            if wanted["d"] != row["d"] or degree is None or not measured:
                continue
            seconds = measured.get(degree)
            if seconds is None:
                widest = max(measured)
                dim = row["d"]
                seconds = measured[widest] * math.comb(dim + degree, dim) / math.comb(dim + widest, dim)
            cells.append(
                {
                    "d": row["d"],
                    "B": wanted["B"],
                    "L": row["L"],
                    "degree": degree,
                    "speed_up": row["seconds"]["exact"] / seconds,
                    "extrapolated": degree not in measured,
                }
            )
    return cells


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each d and B: speed-ups by length (``~`` where extrapolated), and the first length that is faster, if any."""
    rows = []
    for dim, bound in sorted({(c["d"], c["B"]) for c in cells}):
        own = sorted((c for c in cells if (c["d"], c["B"]) == (dim, bound)), key=lambda c: c["L"])
        shown = {f"L={c['L']}": f"{'~' if c['extrapolated'] else ''}{c['speed_up']:.2g}" for c in own}
        faster = next((c["L"] for c in own if c["speed_up"] > 1), None)
        rows.append({"d": dim, "B": bound, "degree": own[0]["degree"], **shown, "faster from": faster})
    return rows


def figure(result: dict[str, Any], path: str) -> None:
    """Above, speed-ups over B and L with the threshold; below, seconds against L, and degrees against the logits' range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    cells, rows, fitted = result["phase"]["rows"], result["time"]["rows"], result["time"]["growth"]
    dims = sorted({c["d"] for c in cells})
    plot, axes = plt.subplots(
        2, max(len(dims), 3), figsize=(4.6 * max(len(dims), 3), 8.4), squeeze=False, layout="constrained"
    )
    for ax in axes.flat:
        ax.set_visible(False)
    for ax, dim in zip(axes[0], dims, strict=False):
        own = [c for c in cells if c["d"] == dim]
        lengths, bounds = sorted({c["L"] for c in own}), sorted({c["B"] for c in own})
        values = torch.full((len(bounds), len(lengths)), math.nan)
        for c in own:
            values[bounds.index(c["B"]), lengths.index(c["L"])] = max(-4.0, min(4.0, math.log2(c["speed_up"])))
        ax.set_visible(True)
        image = ax.pcolormesh(edges(lengths), edges(bounds), values, cmap="RdBu", norm=TwoSlopeNorm(0, -4, 4))
        for c in own:
            label = f"{c['speed_up']:.{0 if c['speed_up'] >= 10 else 1 if c['speed_up'] >= 1 else 2}f}"
            label = label if c["speed_up"] >= 0.01 else "<.01"
            slant, ink = (
                ("italic" if c["extrapolated"] else "normal"),
                ("white" if abs(math.log2(c["speed_up"])) > 2.5 else "k"),
            )
            ax.text(c["L"], c["B"], label, ha="center", va="center", fontsize=7, style=slant, color=ink)
        ax.plot(lengths, [math.log(x) ** 0.5 for x in lengths], "--", color="gold", linewidth=2)
        ax.set(xscale="log", yscale="log", xlabel="length L", ylabel="entries' bound B", title=f"d = {dim}")
        plain(ax.yaxis, bounds)
        plain(ax.xaxis, lengths)
        ax.set_ylim(edges(bounds)[0], max(edges(bounds)[-1], 1.1 * math.log(lengths[-1]) ** 0.5))
    plot.colorbar(image, ax=axes[0].tolist(), label=r"$\log_2$ speed-up at gradient error 1e-2")
    left, right, last = axes[1, :3]
    exponents = {(f["d"], f["variant"]): f["exponent"] for f in fitted}
    for colour, dim in enumerate(dims):
        own = sorted((r for r in rows if r["d"] == dim), key=lambda r: r["L"])
        least = min((int(v) for r in own for v in r["seconds"] if v != "exact"), default=None)
        for variant, style in (("exact", "o-"), (str(least), "s--")):
            points = [(r["L"], r["seconds"][variant]) for r in own if variant in r["seconds"]]
            name = "exact" if variant == "exact" else f"degree {variant}"
            slope = exponents.get((dim, variant))
            power = "" if slope is None else f": $L^{{{slope:.2f}}}$"
            left.plot(*zip(*points, strict=True), style, color=f"C{colour}", label=f"d = {dim}, {name}{power}")
        ladder = sorted(
            (r["R"], r["grad 1e-02"]) for r in result["degree"]["rows"] if r["d"] == dim and "grad 1e-02" in r
        )
        right.plot(*zip(*ladder, strict=True), "o-", color=f"C{colour}", label=f"d = {dim}")
        bounds, lengths = zip(*borders(cells, dim), strict=True)
        last.plot(bounds, lengths, "o-", color=f"C{colour}", label=f"d = {dim}")
    line = torch.linspace(1.5, max(c["B"] for c in cells), 50)
    last.plot(line, line.square().exp(), "--", color="gold", linewidth=2, label=r"$B = \sqrt{\ln L}$")
    measured = {c["L"] for c in cells}
    last.axhspan(min(measured), max(measured), color="0.9", zorder=0)
    last.set(xscale="log", yscale="log", ylim=(1e2, 1e8), xlabel="entries' bound B", ylabel="length L")
    last.set_title("The factor wins from L on (grey: measured)")
    plain(last.xaxis, sorted({c["B"] for c in cells}))
    left.set(
        xscale="log", yscale="log", xlabel="length L", ylabel="CPU seconds, forward and backward", title="Growth in L"
    )
    right.set(xscale="log", yscale="log", xlabel="largest |logit| R", ylabel="degree for gradient error 1e-2")
    right.set_title("The degree follows R, hardly d")
    for ax in (left, right, last):
        ax.set_visible(True)
        ax.legend(fontsize=7, framealpha=0.6)
    plain(left.xaxis, sorted({r["L"] for r in rows}))
    plain(right.yaxis, [2, 3, 5, 10, 20, 50])
    plot.suptitle(
        r"Speed-up of polynomial attention gradients over exact ones (italic: extrapolated; dashed: $B = \sqrt{\ln L}$)"
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, dpi=130, bbox_inches="tight")
    print(f"figure in {path}")


def borders(cells: list[dict[str, Any]], dim: int) -> list[tuple[float, float]]:
    """``B`` and the length at which the speed-up is 1: between two measured lengths, or beyond them by ``speed-up ~ L``."""
    found = []
    for bound in sorted({c["B"] for c in cells if c["d"] == dim}):
        own = sorted((c["L"], c["speed_up"]) for c in cells if (c["d"], c["B"]) == (dim, bound))
        crossing = next((pair for pair in pairwise(own) if pair[0][1] <= 1 < pair[1][1]), None)
        if crossing is None:
            length, speed_up = own[0] if own[0][1] > 1 else own[-1]
            found.append((bound, length / speed_up))
        else:
            (low, slow), (high, fast) = crossing
            found.append((bound, low * (high / low) ** (math.log(1 / slow) / math.log(fast / slow))))
    return found


def plain(axis: Any, values: list[float]) -> None:
    """Label exactly these values, in full."""
    axis.set_ticks(values, labels=[f"{v:g}" if v < 1024 else f"{v / 1024:g}k" for v in values])
    axis.set_ticks([], minor=True)


def edges(values: list[float]) -> list[float]:
    """Borders between values on a logarithmic axis."""
    logs = [math.log(v) for v in values]
    step = (logs[-1] - logs[0]) / max(len(logs) - 1, 1) or 1.0
    middles = [(a + b) / 2 for a, b in pairwise(logs)]
    return [math.exp(x) for x in [logs[0] - step / 2, *middles, logs[-1] + step / 2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--figure", help="draw the phase diagram here")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--bounds", type=float, nargs="+", default=[0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0])
    parser.add_argument("--dims", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--dense-length", type=int, default=768, help="of the dense heads that the degrees come from")
    parser.add_argument("--error-length", type=int, default=16384, help="longest that errors are measured at")
    parser.add_argument("--max-width", type=int, default=5000, help="features of the widest factor that is run")
    parser.add_argument(
        "--repeats", type=int, default=5, help="up to 8192 tokens; fewer in proportion beyond, 2 at least"
    )
    parser.add_argument("--causal", action="store_true", help="time with a causal mask")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = earlier(args.json)

    if "degree" in args.parts:
        rows = [degrees(bound, dim, args.dense_length) for dim in args.dims for bound in args.bounds]
        result["degree"] = {"provenance": provenance(), "L": args.dense_length, "rows": rows}
        columns = ["d", "B", "R", "std", *(f"{n} {e:.0e}" for e in EPS for n in ("out", "grad", "width"))]
        table([{n: f"{x:.4g}" if n[:5] == "width" else x for n, x in row.items()} for row in rows], columns)
        write(args.json, result)
    degree_of = {
        dim: {
            r["B"]: r["grad 1e-02"]
            for r in result["degree"]["rows"]
            if r["d"] == dim and r["B"] in args.bounds and "grad 1e-02" in r
        }
        for dim in args.dims
    }
    if "time" in args.parts:
        result["time"] = {"provenance": provenance(), "causal": args.causal, "rows": []}
        rows = result["time"]["rows"]
        for dim in args.dims:
            for length in args.lengths:
                rows.append(times(dim, length, degree_of[dim], args))
                print(f"d={dim} L={length}", {n: round(s, 4) for n, s in rows[-1]["seconds"].items()}, flush=True)
                result["time"]["growth"] = growth(rows)
                cells = phase(result["degree"]["rows"], rows)
                result["phase"] = {"rows": cells, "summary": summary(cells)}
                write(args.json, result)
        table(result["time"]["growth"], ["d", "variant", "lengths", "exponent"])
        table(summary(result["phase"]["rows"]), ["d", "B", "degree", *(f"L={n}" for n in args.lengths), "faster from"])
    if "error" in args.parts:
        lengths = [length for length in args.lengths if length <= args.error_length]
        pairs = [(dim, length) for dim in args.dims for length in lengths]
        rows = [row for dim, length in pairs for row in deviations(dim, length, degree_of[dim], args)]
        result["error"] = {"provenance": provenance(), "causal": args.causal, "rows": rows}
        columns = ["d", "B", "degree", "width", "L", "output", "gradient"]
        table([{**row, **{n: f"{row[n]:.1e}" for n in columns[-2:]}} for row in rows], columns)
        write(args.json, result)
    if args.figure:
        figure(result, args.figure)


if __name__ == "__main__":
    main()
