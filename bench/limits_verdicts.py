"""The probe's verdict on planted heads, beside what measuring finds: is there a factor within eps that is faster than SDPA?

Claim: on >= 90 % of 60 heads (d = 16 and 64; flat and decaying spectra; logits of standard deviation 0.1 to 2; three settings
of mask and length) the verdict agrees with the measurement, at eps = 1e-2 on the output and on each of dQ, dK and dV.

A head has Gaussian queries and keys of a given spectrum in mixed coordinates, off centre, and independent normal values and
output gradients. ``probe_head`` fits on one text of it and judges on a second, with the cost model calibrated in this very
process. The measurement is made on a third, with the seconds of forward and backward in turn with SDPA's:

- A factor is confirmed where it is within eps there and faster.
- ``exact`` is confirmed where no factor is. Of every kind the narrowest within eps is looked for, on a ladder that knows
  nothing of the cost model: every degree, widths doubling, up to as many features as tokens (half as many where causal, and
  of landmarks). All that are found are timed.

Most heads of the grid are beyond every factor, so the two kinds of verdict are counted apart as well.
Speed-ups between 0.9 and 1.1 are marked close: the verdict then hardly matters, but counts all the same. A run keeps
the rows of an earlier result that it does not measure.

    python bench/limits_verdicts.py --json bench/results/limits_verdicts.json
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from common import earlier, interleaved, provenance, ratios, table, write
from limits_phase import approximate, exact
from rankloom.attention.contract import Factor
from rankloom.attention.cost import KINDS, CostModel, Kind, calibrate
from rankloom.attention.factored import Factored
from rankloom.attention.mehler import Mehler
from rankloom.attention.nystrom import Nystrom
from rankloom.attention.polynomial import Anisotropic, Isotropic
from rankloom.attention.precondition import Preconditioner
from rankloom.attention.probe import probe_head
from rankloom.attention.report import HeadReport
from rankloom.attention.trial import Head, errors

CLOSE = (0.9, 1.1)


@dataclass(frozen=True)
class Planted:
    """A head of the grid."""

    dim: int
    spectrum: str
    std: float
    causal: bool
    length: int

    def texts(self, count: int) -> list[Head]:
        """Independent texts of it."""
        g = torch.Generator().manual_seed(0)
        values = torch.ones(self.dim) if self.spectrum == "flat" else 1 / torch.arange(1, self.dim + 1)
        root = (values * self.std / values.norm()).sqrt() * self.dim**0.25
        mix = torch.linalg.qr(torch.randn(self.dim, self.dim, generator=g)).Q
        centre = 0.5 * torch.randn(3, 1, self.dim, generator=g)

        def text() -> Head:
            q, k, v, grad = torch.randn(4, self.length, self.dim, generator=g)
            q, k, v = q * root @ mix + centre[0], k * root @ mix + centre[1], v + centre[2]
            return Head(q[None], k, v, grad[None], self.dim**-0.5, self.causal)

        return [text() for _ in range(count)]


def build(kind: Kind, size: int, preconditioner: Preconditioner, keys: torch.Tensor) -> Factor:
    """A factor from its degree (isotropic) or its features."""
    if kind == "isotropic":
        return Isotropic(len(preconditioner.spectrum), size)
    if kind == "nystrom":
        return Nystrom.fit(keys, size, generator=torch.Generator().manual_seed(0))
    return (Mehler if kind == "mehler" else Anisotropic)(preconditioner.spectrum, size)


def ladder(kind: Kind, dim: int, length: int, causal: bool) -> Iterator[int]:
    """Degrees or numbers of features worth looking at, ascending."""
    most = length // 2 if causal or kind == "nystrom" else length
    if kind == "isotropic":
        degree = 1
        while math.comb(dim + degree, dim) <= most:
            yield degree
            degree += 1
    else:
        yield from (2**n for n in range(5, most.bit_length()))


class Measured:
    """One head's candidates, fitted to its first text and measured on its last."""

    def __init__(self, head: Planted, texts: list[Head], eps: float, repeats: int) -> None:
        self.head, self.judged, self.eps, self.repeats = head, texts[-1], eps, repeats
        fitted = texts[0]
        generator = torch.Generator().manual_seed(0)
        self.preconditioner = Preconditioner.fit(fitted.q[0], fitted.k, fitted.scale, generator=generator)
        self.keys = self.preconditioner.keys(fitted.k)
        self.found: dict[str, dict[str, Any]] = {}
        self._made: dict[str, Factored] = {}

    def within(self, kind: Kind, size: int) -> bool:
        """Whether a candidate's error is within eps; it is kept for timing then."""
        factor = build(kind, size, self.preconditioner, self.keys)
        made = Factored(self.preconditioner, factor, scale=self.judged.scale, causal=self.judged.causal)
        error = max(errors(made, self.judged))
        if error <= self.eps:
            self._made[name := f"{kind} {factor.width}"] = made
            self.found[name] = {"kind": kind, "width": factor.width, "error": error}
        return error <= self.eps

    def time(self) -> None:
        """Seconds of all candidates kept, in turn with SDPA's."""
        head = self.judged
        leaves = tuple(t.requires_grad_() for t in (head.q[0].clone(), head.k.clone(), head.v.clone()))
        runs: dict[str, Callable[[], Any]] = {"sdpa": exact(leaves, head.grad[0], head.causal)}
        runs |= {name: approximate(made, leaves, head.grad[0]) for name, made in self._made.items()}
        measured = ratios(interleaved(runs, self.repeats), "sdpa")
        for name in self._made:
            own = measured[name]
            self.found[name] |= {"seconds": own["seconds"], "sdpa_seconds": measured["sdpa"]["seconds"]}
            self.found[name] |= {
                "speed_up": 1 / own["ratio"],
                "low": 1 / own["ratio_high"],
                "high": 1 / own["ratio_low"],
            }

    def best(self) -> dict[str, Any] | None:
        """The fastest candidate within eps."""
        return max(self.found.values(), key=lambda c: c["speed_up"], default=None)


def judge(head: Planted, cost: CostModel, eps: float, repeats: int) -> dict[str, Any]:
    """The verdict on one head, and what was measured."""
    texts = head.texts(3)
    first = texts[0]
    begin = time.process_time()
    report = probe_head(
        first.q,
        first.k,
        first.v,
        grad=first.grad,
        scale=first.scale,
        causal=head.causal,
        eps=eps,
        lengths=[head.length],
        cost=cost,
        held_out=texts[1:2],
    )
    row = {**asdict(head), "verdict": report.verdicts[head.length], "probe_seconds": time.process_time() - begin}
    row |= chosen(report, head, cost)
    measured = Measured(head, texts, eps, repeats)
    if row["verdict"] != "exact":
        trial = report.cheapest["gradients"]
        assert trial is not None
        if not measured.within(trial.kind, trial.degree or trial.width):
            return row | {"agrees": False, "why": f"{row['factor']} errs more than {eps:g} on the third text"}
    else:
        for kind in KINDS:
            sizes = ladder(kind, head.dim, head.length, head.causal)
            next((size for size in sizes if measured.within(kind, size)), None)
    if measured.found:
        measured.time()
    best = measured.best()
    faster = best is not None and best["speed_up"] > 1
    row |= {"candidates": measured.found, "best": best, "agrees": faster == (row["verdict"] != "exact")}
    if not row["agrees"] and best is not None:
        near = "close: " if CLOSE[0] < best["speed_up"] < CLOSE[1] else ""
        predicted = cost.exact(head.length) / cost.approximate(head.length, best["width"], best["kind"])
        row["why"] = (
            f"{near}{best['kind']} {best['width']}, error {best['error']:.1e}, is {best['speed_up']:.2f} times as fast "
            f"({best['low']:.2f} to {best['high']:.2f}), predicted {predicted:.2f}"
        )
    return row


def chosen(report: HeadReport, head: Planted, cost: CostModel) -> dict[str, Any]:
    """The factor that the verdict rests on, if any reached eps."""
    trial = report.cheapest["gradients"]
    if trial is None:
        return {"factor": "", "reason": report.reason}
    predicted = cost.exact(head.length) / cost.approximate(head.length, trial.width, trial.kind)
    return {
        "factor": f"{trial.kind} {trial.width}",
        "probe_error": max(trial.errors),
        "predicted": predicted,
        "reason": report.reason,
    }


def shares(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many verdicts agree, in all and by what they said."""
    by_verdict = {}
    for said in sorted({row["verdict"] for row in rows}):
        own = [row for row in rows if row["verdict"] == said]
        by_verdict[said] = {"heads": len(own), "agree": sum(row["agrees"] for row in own)}
    agree = sum(row["agrees"] for row in rows)
    return {"heads": len(rows), "agree": agree, "share": agree / len(rows), "by_verdict": by_verdict}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--eps", type=float, default=1e-2)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--spectra", nargs="+", choices=["flat", "decaying"], default=["flat", "decaying"])
    parser.add_argument("--stds", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0, 2.0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096], help="without a mask")
    parser.add_argument("--causal-lengths", type=int, nargs="*", default=[4096])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = [(False, n) for n in args.lengths] + [(True, n) for n in args.causal_lengths]
    result: dict[str, Any] = {"runs": {}, "rows": [], **earlier(args.json)}
    for (causal, length), dim in product(settings, args.dims):
        begin = time.process_time()
        cost = calibrate(dim, causal=causal)
        spent = time.process_time() - begin
        run = f"d={dim}, L={length}{', causal' if causal else ''}"
        result["runs"][run] = {"provenance": provenance(), "eps": args.eps, "calibration_seconds": spent}
        result["rows"] = [r for r in result["rows"] if (r["dim"], r["causal"], r["length"]) != (dim, causal, length)]
        for spectrum, std in product(args.spectra, args.stds):
            row = judge(Planted(dim, spectrum, std, causal, length), cost, args.eps, args.repeats)
            result["rows"].append(row)
            result["agreement"] = shares(result["rows"])
            print(
                *(f"{row[n]}" for n in ("dim", "spectrum", "std", "causal", "length", "verdict", "agrees")), flush=True
            )
        write(args.json, result)
    shown = [
        {**row, **{n: (row.get("best") or {}).get(n, "") for n in ("speed_up", "error")}}
        | {"best": f"{row['best']['kind']} {row['best']['width']}" if row.get("best") else ""}
        for row in result["rows"]
    ]
    columns = [
        "dim",
        "spectrum",
        "std",
        "causal",
        "length",
        "verdict",
        "factor",
        "predicted",
        "best",
        "speed_up",
        "error",
    ]
    table(shown, [*columns, "agrees"])
    print("\nwhere verdict and measurement differ")
    table([row for row in result["rows"] if not row["agrees"]], [*columns[:6], "why"])
    found = result["agreement"]
    print(f"\n{found['agree']} of {found['heads']} agree ({found['share']:.1%}): {found['by_verdict']}")


if __name__ == "__main__":
    main()
