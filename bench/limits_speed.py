"""Forward and backward of one attention head through a low-rank factor, beside exact attention.

Claims, on one thread in float32: at L = 65536, d = 16 with entries uniform in [-0.5, 0.5] takes <= 1/15 of SDPA's time without
a mask and <= 1/6 causal, at an output error <= 1e-5 and gradient errors <= 1e-3; d = 64 with entries in [-0.25, 0.25] <= 1/5
without a mask at gradient errors <= 1e-3; d = 64 with a decaying spectrum (Sig_i ~ 1/i, logits of standard deviation 0.6,
offsets in q, k and v) <= 1/5 causal at an output error <= 1e-3, and where half of what values and output gradients vary is
linear in keys and queries ("coherent"; all are functions of one input in a model) at errors of all six factor gradients <= 2e-2.
Time grows with L to a power <= 1.1 where SDPA's is >= 1.9.
A certificate takes <= 10 % of SDPA's time for L >= 32768 (part "certificate"), and L = 131072 fits in under 4 GB with one
(part "memory": the peak of a process that has imported everything, including that).

A run is forward and backward to q, k and v for a random output gradient, the change of coordinates included; its fit, which
a training run repeats every so many steps, is given apart. SDPA gets heads padded to 16 where d < 16, which it is faster for.
Errors are relative Frobenius errors against SDPA in float32: of the output, of dQ, dK, dV, and of the six factor gradients
dA, dB of rank-8 adapters on q, k and v for the input X = [Q, K, V] (its projections select columns). Variants and
lengths are taken in turn on one core; seconds are medians of CPU time, wall those of the clock. A run keeps the rows of an
earlier result that it does not measure.

    python bench/limits_speed.py --json bench/results/limits_speed.json
    python bench/limits_speed.py --parts certificate --lengths 32768 --json bench/results/limits_speed.json
    python bench/limits_speed.py --parts memory --lengths 131072 --json bench/results/limits_speed.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import (
    earlier,
    interleaved,
    peak_mb,
    plain_environment,
    provenance,
    ratios,
    reset_peak,
    resident_mb,
    steady_memory,
    table,
    write,
)
from rankloom.attention.certificate import certify
from rankloom.attention.contract import Factor
from rankloom.attention.exact import factor_gradients
from rankloom.attention.factored import Factored
from rankloom.attention.mehler import Mehler
from rankloom.attention.polynomial import Anisotropic, Isotropic
from rankloom.attention.precondition import Preconditioner
from rankloom.attention.projection import Projection
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
    coherent: bool = False


def with_linear_part(noise: Tensor, of: Tensor) -> Tensor:
    """``noise`` and a random linear function of the rows of ``of`` that is as large."""
    centred = of - of.mean(0)
    part = centred @ torch.randn(of.shape[1], noise.shape[1])
    return noise + part * ((noise - noise.mean(0)).norm() / part.norm())


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
    "d=64, decaying, std 0.6, causal, coherent": Row(
        decaying, 64, 0.6, True, {f"mehler {w}": mehler(w) for w in (512, 1024, 2048)}, coherent=True
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


class Case:
    """One head of one length: exact attention and every factor of its row."""

    def __init__(self, row: Row, length: int) -> None:
        torch.manual_seed(0)
        self.row, self.length, scale = row, length, row.dim**-0.5
        q, k, v = row.head(length, row.dim, row.size)
        self.pull = torch.randn(length, row.dim)
        if row.coherent:
            v, self.pull = with_linear_part(v, k), with_linear_part(self.pull, q)
        self.head = tuple(t.requires_grad_() for t in (q, k, v))
        begin = time.process_time()
        p = Preconditioner.fit(self.head[0], self.head[1], scale)
        self.fit = time.process_time() - begin
        self.approximations = {
            n: Factored(p, make(p), scale=scale, causal=row.causal) for n, make in row.factors.items()
        }
        self.results: dict[str, dict[str, Tensor]] = {}
        self.walls: dict[str, list[float]] = {}

    def run(self, name: str, times: int = 1) -> None:
        """Forward and backward, ``times`` over."""
        q, k, v = self.head
        for _ in range(times):
            begin = time.perf_counter()
            if name in self.approximations:
                out = self.approximations[name](q[None], k, v)[0][0]
            else:
                out = exact(q, k, v, self.row.causal)
            grads = torch.autograd.grad(out, self.head, self.pull)
            self.walls.setdefault(name, []).append(time.perf_counter() - begin)
        self.results[name] = {"out": out.detach(), "dQ": grads[0], "dK": grads[1], "dV": grads[2]}

    def summary(self, times: dict[str, list[float]]) -> dict[str, Any]:
        """Times and errors of every variant."""
        measured: dict[str, Any] = {}
        with torch.no_grad():
            for found in self.results.values():
                found |= adapter_gradients(self.head, (found["dQ"], found["dK"], found["dV"]))
        wanted = self.results["sdpa"]
        for name, values in ratios(times, "sdpa").items():
            wall = median(self.walls[name][1:])
            measured[name] = {**values, "wall": wall, "speed_up": 1 / values["ratio"], "rounds": times[name]}
            if name in self.approximations:
                width = self.approximations[name].factor.width
                nanoseconds = values["seconds"] / self.length / width * 1e9
                errors = {key: float((t - wanted[key]).norm() / t.norm()) for key, t in self.results[name].items()}
                measured[name] |= {"width": width, "ns_per_token_and_feature": nanoseconds, "fit": self.fit}
                measured[name] |= {"errors": errors, "worst_gradient": max(errors["dQ"], errors["dK"], errors["dV"])}
                measured[name]["worst_factor_gradient"] = max(e for k, e in errors.items() if k[:2] in ("dA", "dB"))
        return measured


def measure(row: Row, lengths: list[int], repeats: int) -> dict[int, dict[str, Any]]:
    """All lengths in turn, so that drift does not bend the exponent; cheap variants several times over at short lengths."""
    cases = {length: Case(row, length) for length in lengths}
    turns: dict[str, tuple[int, str, int]] = {}
    for length in lengths:
        for name in ["sdpa", *row.factors]:
            turns[f"{name} at {length}"] = length, name, 1 if name == "sdpa" else max(1, max(lengths) // length)
    times = interleaved({key: (lambda t=t: cases[t[0]].run(*t[1:])) for key, t in turns.items()}, repeats)
    found: dict[int, dict[str, list[float]]] = {length: {} for length in lengths}
    for key, (length, name, count) in turns.items():
        found[length][name] = [seconds / count for seconds in times[key]]
    return {length: cases[length].summary(found[length]) for length in lengths}


def growth(result: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """The exponent of CPU seconds in L: least squares over all rounds of all lengths of a row, and its standard error."""
    exponents: dict[str, dict[str, dict[str, float]]] = {}
    for row, by_length in result["rows"].items():
        for variant in next(iter(by_length.values()))["variants"]:
            points = [
                (math.log(int(length)), math.log(seconds))
                for length, m in by_length.items()
                if (found := m["variants"].get(variant))
                for seconds in found.get("rounds", [found["seconds"]])
            ]
            x, y = torch.tensor(points, dtype=torch.float64).T
            if len(points) > 2 and x.min() < x.max():
                x, y = x - x.mean(), y - y.mean()
                slope = x @ y / (x @ x)
                error = ((y - slope * x).square().sum() / (len(points) - 2) / (x @ x)).sqrt()
                found = {"exponent": float(slope), "standard_error": float(error), "lengths": len(by_length)}
                exponents.setdefault(row, {})[variant] = found
    return exponents


def certificates(row: Row, length: int, repeats: int) -> dict[str, Any]:
    """CPU seconds of a certificate of the output, dQ, dK and dV, or of the output and six factor gradients, beside SDPA."""
    case = Case(row, length)
    q, k, v = case.head
    x = torch.cat(case.head, 1).detach()
    adapter = Linear(x.new_empty(0), None, torch.randn(8, x.shape[1]), torch.randn(row.dim, 8), 1.0)
    projections = {n: Projection(x, adapter) for n in "qkv"}
    runs: dict[str, Callable[[], Any]] = {"sdpa": lambda: case.run("sdpa")}
    case.run("sdpa")
    exact_gradients, looseness, rows = [case.results["sdpa"][n] for n in ("dQ", "dK", "dV")], {}, {}
    for name, approximation in case.approximations.items():
        out, denominators = approximation(q[None], k, v)
        grad = case.pull[None]
        dq, dk, dv = torch.autograd.grad(out, case.head, grad)
        plain = partial(
            certify,
            approximation,
            q[None],
            k,
            v,
            out=out,
            denominators=denominators,
            grad=grad,
            gradients=(dq[None], dk, dv),
        )
        runs[name] = plain
        runs[f"{name}, factors"] = partial(plain, projections=projections)
        rows = {"plain": plain().rows}
        certificate = runs[f"{name}, factors"]()
        rows["factors"], looseness[name] = certificate.rows, {}
        for (n, p), mine, theirs in zip(projections.items(), (dq, dk, dv), exact_gradients, strict=True):
            for f, got, want in zip("AB", p.gradients(mine[None]), p.gradients(theirs[None]), strict=True):
                true = float((got - want).norm() / want.norm())
                limit = certificate.gradients[f"d{f}_{n}"].upper
                looseness[name][f"d{f}_{n}"] = {"true": true, "limit": limit, "limit/true": limit / true}
    variants = ratios(interleaved(runs, repeats), "sdpa")
    return {"provenance": provenance(), "exact_rows": rows, "variants": variants, "factor_gradients": looseness}


def memory(row: str, variant: str, length: int) -> dict[str, Any]:
    """Peak resident memory of forward and backward with a certificate, MB, in a process of its own."""
    command = [sys.executable, __file__, "--peak", row, variant, str(length)]
    found = subprocess.run(command, env=plain_environment(), stdout=subprocess.PIPE, check=True, text=True)
    return {"provenance": provenance(), "row": row, "variant": variant, "length": length, **json.loads(found.stdout)}


def peak(row: str, variant: str, length: int) -> None:
    """Print what :func:`memory` gives, of this process."""
    torch.manual_seed(0)
    kind = ROWS[row]
    q, k, v = (t.requires_grad_() for t in kind.head(length, kind.dim, kind.size))
    p, grad = Preconditioner.fit(q, k, kind.dim**-0.5), torch.randn(1, length, kind.dim)
    approximation = Factored(p, kind.factors[variant](p), scale=kind.dim**-0.5, causal=kind.causal)
    before = resident_mb()
    reset_peak()
    out, denominators = approximation(q[None], k, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    step = peak_mb()
    certify(approximation, q[None], k, v, out=out, denominators=denominators, grad=grad, gradients=(dq[None], dk, dv))
    print(json.dumps({"before": before, "step": step, "with_certificate": peak_mb()}))


def speed(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Every variant of the rows asked for, and the growth of all rows there are."""
    for name in args.rows:
        for length, variants in measure(ROWS[name], args.lengths, args.repeats).items():
            result["rows"].setdefault(name, {})[str(length)] = {"provenance": provenance(), "variants": variants}
            print(f"\n{name}, L={length}: CPU seconds forward and backward, speed-up over SDPA, relative errors")
            shown = [
                {"variant": n, **m, **{key: f"{e:.1e}" for key, e in m.get("errors", {}).items()}}
                for n, m in variants.items()
            ]
            columns = ["variant", "width", "seconds", "wall", "speed_up", "out", "dQ", "dK", "dV"]
            table(shown, columns + [f"d{f}_{n}" for n in "qkv" for f in "AB"])
        result["growth"] = growth(result)
        write(args.json, result)
    print("\nexponent of the time in L")
    table(
        [{"row": r, "variant": v, **e} for r, x in result["growth"].items() for v, e in x.items()],
        ["row", "variant", "exponent", "standard_error", "lengths"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=f"of {list(ROWS)}")
    parser.add_argument("--parts", nargs="+", choices=["speed", "certificate", "memory"], default=["speed"])
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        peak(args.peak[0], args.peak[1], int(args.peak[2]))
        return
    steady_memory()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    result: dict[str, Any] = {"rows": {}, **earlier(args.json)}
    if "speed" in args.parts:
        speed(args, result)
    if "certificate" in args.parts:
        for name in args.rows:
            for length in args.lengths:
                found = certificates(ROWS[name], length, args.repeats)
                result.setdefault("certificate", {}).setdefault(name, {})[str(length)] = found
                print(
                    f"\n{name}, L={length}: CPU seconds of a certificate, and their share of SDPA forward and backward"
                )
                shown = [{"variant": n, **m} for n, m in found["variants"].items()]
                table(shown, ["variant", "seconds", "ratio", "ratio_low", "ratio_high"])
                print("\nlimits of factor gradients over their true errors")
                shown = [
                    {"variant": n, **{key: e["limit/true"] for key, e in m.items()}}
                    for n, m in found["factor_gradients"].items()
                ]
                table(shown, list(shown[0]))
                write(args.json, result)
    if "memory" in args.parts:
        result["memory"] = [
            memory(name, variant, length)
            for name in args.rows
            for variant in ROWS[name].factors
            for length in args.lengths
        ]
        print("\npeak resident memory, MB: before, of forward and backward, with a certificate")
        table(result["memory"], ["row", "variant", "length", "before", "step", "with_certificate"])
        write(args.json, result)


if __name__ == "__main__":
    main()
