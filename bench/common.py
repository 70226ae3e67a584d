"""What every bench shares: interleaved CPU timing, peak memory, provenance, JSON and a table."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def provenance(packages: tuple[str, ...] = ("rankloom", "torch", "transformers", "peft")) -> dict[str, Any]:
    """Versions, processor, command and date: what a figure needs to be repeated."""
    import torch

    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now().isoformat(timespec="seconds"),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


STEADY_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""The C library keeps freed memory: otherwise page faults, which depend on what ran before, hit whichever variant runs then."""
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""The C library asks for transparent huge pages: over gigabytes of 4 KiB pages, misses of address translation add up to 3 %
to whatever touches many tensors, by an amount that depends on where those happen to lie."""


def steady_memory(pages: str = "huge") -> None:
    """Start this very program again with :data:`STEADY_MEMORY` (and :data:`HUGE_PAGES`) unless it has them already (glibc)."""
    wanted = {**STEADY_MEMORY, **(HUGE_PAGES if pages == "huge" else {})}
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def plain_environment() -> dict[str, str]:
    """The environment without what :func:`steady_memory` adds, for processes whose memory is measured."""
    return {key: value for key, value in os.environ.items() if key not in {**STEADY_MEMORY, **HUGE_PAGES}}


def interleaved(variants: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """CPU seconds of each variant, taken in turn A B C A B C ..., so that the machine's drift falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(repeats + warmup):
        for name, run in variants.items():
            gc.collect()
            begin = time.process_time()
            run()
            if round_ >= warmup:
                times[name].append(time.process_time() - begin)
    return times


def ratios(times: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Median CPU seconds, and ratios to the reference: of the medians, of the fastest rounds, and quartiles round by round."""
    table = {}
    for name, values in times.items():
        ratio = sorted(v / r for v, r in zip(values, times[reference], strict=True))
        table[name] = {
            "seconds": statistics.median(values),
            "ratio": statistics.median(values) / statistics.median(times[reference]),
            "ratio_fastest": min(values) / min(times[reference]),
            "ratio_low": ratio[len(ratio) // 4],
            "ratio_high": ratio[-1 - len(ratio) // 4],
        }
    return table


def reset_peak() -> None:
    """Forget the process's peak memory so far (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Peak resident memory since :func:`reset_peak`, MB (1e6 bytes)."""
    return _status("VmHWM")


def resident_mb() -> float:
    """Resident memory now, MB."""
    return _status("VmRSS")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"{key} not reported by this kernel")


def earlier(path: str | None) -> dict[str, Any]:
    """The result that a run continues: parts it does not measure anew are kept. Empty where there is none."""
    return json.loads(Path(path).read_text()) if path and Path(path).is_file() else {}


def write(path: str | None, result: dict[str, Any]) -> None:
    """Write the result as JSON where asked."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")


def table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print rows under column heads."""
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in cells)) if cells else len(c) for i, c in enumerate(columns)]
    for line in [columns, *cells]:
        print("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
