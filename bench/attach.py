"""Import time, attaching, saving and loading on SmolLM2-135M's shape (210 linears), beside PEFT's, in CPU seconds.

Claims: attaching LoRA to 210 linears takes <= 0.05 s; ``import rankloom`` adds <= 0.2 s to ``import torch``.

    python bench/attach.py --json bench/results/attach.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import rankloom
from common import provenance, table, write
from step_overhead import LINEARS, build

IMPORT = "import time; import torch; t=time.process_time(); import {module}; print(time.process_time()-t)"


def import_seconds(module: str, repeats: int) -> float:
    """Median CPU seconds of importing a module after torch, a fresh process each."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORT.format(module=module)]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(repeats)]
    return statistics.median(float(out.strip().splitlines()[-1]) for out in runs)


def timed(run: Callable[[], Any], undo: Callable[[Any], Any], repeats: int) -> float:
    """Median CPU seconds of ``run``; ``undo`` gets its result, untimed."""
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        made = run()
        seconds.append(time.process_time() - begin)
        undo(made)
    return statistics.median(seconds)


def ours(model: torch.nn.Module, method: str, repeats: int) -> dict[str, float]:
    """Attach, save and load with rankloom."""
    recipe = rankloom.methods.get(method).with_({"adapter.rank": 16})
    row = {"attach": timed(lambda: rankloom.adapt(model, recipe), lambda a: a.detach(), repeats)}
    with tempfile.TemporaryDirectory() as folder:
        handle = rankloom.adapt(model, recipe)
        row["save"] = timed(lambda: handle.save(f"{folder}/adapter"), lambda _: None, repeats)
        handle.detach()
        row["load"] = timed(lambda: rankloom.load(model, f"{folder}/adapter"), lambda a: a.detach(), repeats)
    return row


def theirs(model: torch.nn.Module, dora: bool, repeats: int) -> dict[str, float]:
    """The same with PEFT."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=16, target_modules=LINEARS, use_dora=dora)
    row = {"attach": timed(lambda: get_peft_model(model, config), lambda m: m.unload(), repeats)}
    with tempfile.TemporaryDirectory() as folder:
        wrapped = get_peft_model(model, config)
        row["save"] = timed(lambda: wrapped.save_pretrained(folder), lambda _: None, repeats)
        wrapped.unload()
        row["load"] = timed(lambda: PeftModel.from_pretrained(model, folder), lambda m: m.unload(), repeats)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    model = build(30, torch.float32)
    rows = [
        {"what": "rankloom lora", **ours(model, "lora", args.repeats)},
        {"what": "peft lora", **theirs(model, False, args.repeats)},
        {"what": "rankloom dora", **ours(model, "dora", args.repeats)},
        {"what": "peft dora", **theirs(model, True, args.repeats)},
    ]
    table(rows, list(rows[0]))
    imports = {module: import_seconds(module, args.repeats) for module in ("rankloom", "peft")}
    print(f"import over torch: {json.dumps({k: round(v, 3) for k, v in imports.items()})}")
    write(args.json, {"provenance": provenance(), "seconds": rows, "import_over_torch": imports})


if __name__ == "__main__":
    main()
