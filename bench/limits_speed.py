"""Forward and backward of one attention head through a low-rank factor, beside exact attention.

Claims, on one thread in float32: at L = 65536, d = 16 with entries uniform in [-0.5, 0.5] takes <= 1/15 of SDPA's time without
a mask and <= 1/6 causal, at an output error <= 1e-5 and gradient errors <= 1e-3; d = 64 with entries in [-0.25, 0.25] <= 1/5
without a mask at gradient errors <= 1e-3; d = 64 with a decaying spectrum (Sig_i ~ 1/i, logits of standard deviation 0.6,
offsets in q, k and v) <= 1/5 causal at an output error <= 1e-3. Time grows with L to a power <= 1.1 where SDPA's is >= 1.9.

A run is forward and backward to q, k and v for a random output gradient, the change of coordinates included; its fit, which
a training run repeats every so many steps, is given apart. SDPA gets heads padded to 16 where d < 16, which it is faster for.
Errors are relative Frobenius errors against SDPA in float32: of the output, of dQ, dK, dV, and of the six factor gradients
dA, dB of rank-8 adapters on q, k and v for the input X = [Q, K, V] (its projections select columns). Variants are taken in turn
on one core; seconds are medians of CPU time, wall those of the clock. A run keeps the rows of an earlier result that
it does not measure.

    python bench/limits_speed.py --json bench/results/limits_speed.json
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import earlier, interleaved, provenance, ratios, table, write
from rankloom.attention.contract import Factor
from rankloom.attention.exact import factor_gradients
from rankloom.attention.factored import Factored
from rankloom.attention.mehler import Mehler
from rankloom.attention.polynomial import Anisotropic, Isotropic
from rankloom.attention.precondition import Preconditioner
from rankloom.kernels.lowrank import Linear

Head = tuple[Tensor, Tensor, Tensor]


def uniform(length: int, dim: int, bound: float) -> Head:
    """Independent entries in [-bound, bound]."""
    q, k, v = ((torch.rand(length, dim) * 2 - 1) * bound for _ in range(3))
    return q, k, v


def decaying(length: int, dim: int, std: float) -> Head:
    """Logits of standard deviation ``std`` from a spectrum ``Sig_i ~ 1/i``, in mixed coordinates and off centre."""
    spectrum = 1 / torch.arange(1, dim + 1)
    spectrum *= std / spectrum.norm()
    mix = torch.linalg.qr(torch.randn(dim, dim)).Q
    q, k = (torch.randn(length, dim) * spectrum.sqrt() @ mix * dim**0.25 for _ in range(2))
    q, k, v = (t + 0.5 * torch.randn(dim) for t in (q, k, torch.randn(length, dim)))
    return q, k, v


@dataclass(frozen=True)
class Row:
    """A kind of head and the factors to try on it."""

    head: Callable[[int, int, float], Head]
    dim: int
    size: float
    causal: bool
    factors: dict[str, Callable[[Preconditioner], Factor]]


def taylor(degree: int) -> Callable[[Preconditioner], Factor]:
    return lambda p: Isotropic(len(p.spectrum), degree)


def anisotropic(width: int) -> Callable[[Preconditioner], Factor]:
    return lambda p: Anisotropic(p.spectrum, width)


def mehler(width: int) -> Callable[[Preconditioner], Factor]:
    return lambda p: Mehler(p.spectrum, width)


SMALL = {"taylor 2": taylor(2), "taylor 3": taylor(3), "mehler 969": mehler(969), "mehler 1400": mehler(1400)}
ROWS = {
    "d=16, entries 0.5": Row(uniform, 16, 0.5, False, SMALL),
    "d=16, entries 0.5, causal": Row(uniform, 16, 0.5, True, SMALL),
    "d=64, entries 0.25": Row(
        uniform, 64, 0.25, False, {"taylor 1": taylor(1), "taylor 2": taylor(2), "mehler 2145": mehler(2145)}
    ),
    "d=64, decaying, std 0.6, causal": Row(
        decaying,
        64,
        0.6,
        True,
        {"anisotropic 1024": anisotropic(1024), **{f"mehler {w}": mehler(w) for w in (512, 1024, 2048)}},
    ),
    "d=8, entries 1": Row(uniform, 8, 1.0, False, {"taylor 4": taylor(4), "mehler 495": mehler(495)}),
}


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """SDPA on (L, d), padded to 16."""
    dim = q.shape[1]
    q, k, v = (F.pad(t, (0, max(16 - dim, 0)))[None, None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=dim**-0.5, is_causal=causal)[0, 0, :, :dim]


def adapter_gradients(head: Head, grads: tuple[Tensor, ...], rank: int = 8) -> dict[str, Tensor]:
    """The six factor gradients for ``X = [Q, K, V]``."""
    g = torch.Generator().manual_seed(1)
    x, found = torch.cat(head, 1), {}
    for name, grad in zip("qkv", grads, strict=True):
        a, b = torch.randn(rank, x.shape[1], generator=g), torch.randn(grad.shape[1], rank, generator=g)
        selector = x.new_empty(0)  # the frozen weight plays no part in these gradients
        found[f"dA_{name}"], found[f"dB_{name}"] = factor_gradients(x, Linear(selector, None, a, b, 1.0), grad)
    return found


def measure(row: Row, length: int, repeats: int) -> dict[str, Any]:
    """Times and errors of every variant on one head."""
    torch.manual_seed(0)
    head = row.head(length, row.dim, row.size)
    leaves = tuple(t.requires_grad_() for t in head)
    pull, scale = torch.randn(length, row.dim), row.dim**-0.5
    begin = time.process_time()
    p = Preconditioner.fit(head[0], head[1], scale)
    fit = time.process_time() - begin
    heads = {n: Factored(p, make(p), scale=scale, causal=row.causal) for n, make in row.factors.items()}
    results: dict[str, dict[str, Tensor]] = {}
    walls: dict[str, list[float]] = {}

    def run(name: str) -> None:
        begin = time.perf_counter()
        q, k, v = leaves
        out = heads[name](q[None], k, v)[0][0] if name in heads else exact(q, k, v, row.causal)
        grads = torch.autograd.grad(out, leaves, pull)
        walls.setdefault(name, []).append(time.perf_counter() - begin)
        results[name] = {"out": out.detach(), "dQ": grads[0], "dK": grads[1], "dV": grads[2]}

    times = interleaved({n: (lambda n=n: run(n)) for n in ["sdpa", *heads]}, repeats)
    measured: dict[str, Any] = {}
    with torch.no_grad():
        for found in results.values():
            found |= adapter_gradients(head, (found["dQ"], found["dK"], found["dV"]))
    for name, values in ratios(times, "sdpa").items():
        errors = {key: float((t - results["sdpa"][key]).norm() / t.norm()) for key, t in results[name].items()}
        measured[name] = {**values, "wall": median(walls[name][1:]), "speed_up": 1 / values["ratio"]}
        if name in heads:
            width = heads[name].factor.width
            seconds = values["seconds"]
            measured[name] |= {"width": width, "ns_per_token_and_feature": seconds / length / width * 1e9, "fit": fit}
            measured[name] |= {"errors": errors, "worst_gradient": max(errors["dQ"], errors["dK"], errors["dV"])}
            measured[name]["worst_factor_gradient"] = max(e for key, e in errors.items() if key[:2] in ("dA", "dB"))
    return measured


def growth(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The exponent of CPU seconds in L, by least squares over all lengths of a row, where there are two or more."""
    exponents: dict[str, dict[str, float]] = {}
    for row, by_length in result["rows"].items():
        for variant in next(iter(by_length.values()))["variants"]:
            points = [
                (math.log(int(length)), math.log(m["variants"][variant]["seconds"]))
                for length, m in by_length.items()
                if variant in m["variants"]
            ]
            if len(points) > 1:
                x, y = torch.tensor(points, dtype=torch.float64).T
                x = x - x.mean()
                exponents.setdefault(row, {})[variant] = float(x @ y / (x @ x))
    return exponents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=f"of {list(ROWS)}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    result: dict[str, Any] = {"rows": {}, **earlier(args.json)}
    for name in args.rows:
        for length in args.lengths:
            variants = measure(ROWS[name], length, args.repeats)
            result["rows"].setdefault(name, {})[str(length)] = {"provenance": provenance(), "variants": variants}
            result["growth"] = growth(result)
            print(f"\n{name}, L={length}: CPU seconds forward and backward, speed-up over SDPA, relative errors")
            shown = [
                {"variant": n, **m, **{key: f"{e:.1e}" for key, e in m.get("errors", {}).items()}}
                for n, m in variants.items()
            ]
            columns = ["variant", "width", "seconds", "wall", "speed_up", "out", "dQ", "dK", "dV"]
            table(shown, columns + [f"d{f}_{n}" for n in "qkv" for f in "AB"])
            write(args.json, result)
    print("\nexponent of the time in L")
    table(
        [{"row": r, "variant": v, "exponent": e} for r, x in result["growth"].items() for v, e in x.items()],
        ["row", "variant", "exponent"],
    )


if __name__ == "__main__":
    main()
