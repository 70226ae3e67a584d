"""What a start costs beside PEFT's, on every linear of SmolLM2-135M with real text, float32, one thread.

Limits at rank 8: PiSSA and OLoRA <= 0.5x the time of PEFT's exact starts, PiSSA with >= 0.999 of the energy of the best rank-8
subspace of every weight; EVA <= 0.7x; LoRA-GA <= 0.5x, in <= 0.1x the memory that PEFT's takes above a LoRA training step.

LoRA-GA's limit on time is missed: the sketch trades three passes over the data for never holding a gradient, where PEFT
takes one pass and holds them all. No choice of passes would meet it: `frozen pass`, one forward and backward pass that
computes no weight's gradient, is the floor of every start that looks at gradients, and stands in the table beside them.
`lora-ga lean` multiplies from one side a pass: half the sketch's memory, four passes for about the same captured energy.

Time: CPU seconds in one process, ours and theirs in turn, attaching included; loading and undoing are not counted. Memory:
peak resident set above the loaded model, a process for each, with the C library told to give every freed block back. All
starts that look at data see the same batches, 8 sequences of 128 tokens by default (the LoRA-GA authors' 8 samples).

    python bench/init_cost.py --json bench/results/init_cost.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rankloom
from common import peak_mb, provenance, reset_peak, resident_mb, table, write
from rankloom.calibration import Calibration
from rankloom.calibration.data import run_pass
from rankloom.targets import find_targets
from sketch import GIVE_BACK, load

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Starts from the same evidence: ours, then PEFT's, whose first is the exact one that ours are held against.
FAMILIES = {
    "pissa": ("pissa", "peft pissa", "peft pissa_niter_16"),
    "olora": ("olora", "peft olora"),
    "gradient": ("lora-ga", "lora-ga lean", "lora-one", "frozen pass", "peft lora_ga"),
    "eva": ("eva", "peft eva"),
    "corda": ("corda", "peft corda"),
}
LIMITS = {"pissa": 0.5, "olora": 0.5, "lora-ga": 0.5, "eva": 0.7}
# One forward and backward pass of the frozen model: no start that looks at gradients can take less.
STEP, PASS = "lora step", "frozen pass"


def ours(start: str, model: Any, data: Calibration, rank: int) -> rankloom.Adaptation:
    """The table's row at this rank; ``lean``: the sketch that holds one side, a pass longer."""
    name, *lean = start.split()
    recipe = rankloom.methods.get(name).with_({"adapter.rank": rank, "adapter.alpha": 2 * rank})
    return rankloom.adapt(model, recipe.with_({"init.lean": True, "init.passes": 4}) if lean else recipe, data)


def theirs(start: str, model: Any, data: Calibration, rank: int, **settings: Any) -> Any:
    """The same with PEFT, as its documentation does it; ``settings`` are LoraConfig's. Edits the model's weights."""
    import peft
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    extra: dict[str, Callable[[], dict[str, Any]]] = {
        "lora_ga": lambda: {"lora_ga_config": peft.LoraGAConfig(), "use_rslora": True},
        "eva": lambda: {"eva_config": peft.EvaConfig(use_label_mask="position_ids" in data.batches[0])},  # type: ignore
        "corda": lambda: {"corda_config": peft.tuners.lora.config.CordaConfig(corda_method="ipm")},
    }
    chosen = {"r": rank, "lora_alpha": 2 * rank, "target_modules": LINEARS, **extra.get(start, dict)(), **settings}
    config = peft.LoraConfig(init_lora_weights=start, **chosen)
    if start == "lora_ga":
        preprocess_loraga(model, config, lambda: [model(**batch).loss.backward() for batch in data.batches])
    elif start == "corda":

        def forwards() -> None:
            with torch.no_grad():
                for batch in data.batches:
                    for row in range(len(batch["input_ids"])):  # its hooks take one sequence at a time
                        model(**{key: value[row : row + 1] for key, value in batch.items()})

        preprocess_corda(model, config, run_model=forwards)
    made = peft.get_peft_model(model, config)
    if start == "eva":
        peft.initialize_lora_eva_weights(made, list(data.batches), show_progress_bar=False)
    return made


def attach(mode: str, model: Any, data: Calibration, rank: int) -> Any:
    """Run one start, ours by its row's name or PEFT's as ``peft NAME``."""
    if mode == STEP:
        handle = rankloom.adapt(model, rankloom.methods.get("lora").with_({"adapter.rank": rank}))
        optimizer = handle.optimizer(1e-4)
        for batch in data.batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return handle
    if mode == PASS:
        run_pass(model, find_targets(model, rankloom.Targets()), data, lambda *_: None)
        return None
    peft_start = mode.removeprefix("peft ")
    return theirs(peft_start, model, data, rank) if peft_start != mode else ours(mode, model, data, rank)


def timed(family: str, model: Any, data: Calibration, rank: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of a family's starts, in turn; PEFT works on a copy, as it edits weights for good."""
    times: dict[str, list[float]] = {mode: [] for mode in FAMILIES[family]}
    for _ in range(repeats):
        for mode, own in times.items():
            subject = copy.deepcopy(model) if mode.startswith("peft ") else model
            begin = time.process_time()
            made = attach(mode, subject, data, rank)
            own.append(time.process_time() - begin)
            if isinstance(made, rankloom.Adaptation):
                made.detach()
            del made, subject
    return times


def summary(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Median seconds and spread of each start, and its share of PEFT's exact one with the extremes over rounds."""
    peer = next(mode for mode in times if mode.startswith("peft "))
    rows = []
    for mode, own in times.items():
        share = sorted(a / b for a, b in zip(own, times[peer], strict=True))
        row = {"start": mode, "seconds": statistics.median(own), "low": min(own), "high": max(own)}
        row |= {"of_peft": statistics.median(own) / statistics.median(times[peer])}
        row |= {"of_peft_low": share[0], "of_peft_high": share[-1], "rounds": own}
        if mode in LIMITS:
            row |= {"limit": LIMITS[mode], "met": row["of_peft"] <= LIMITS[mode]}
        rows.append(row)
    return rows


def energies(model: Any, data: Calibration, rank: int) -> list[dict[str, Any]]:
    """Share of the best rank-r energy of every weight in the subspace that ``B`` starts on: lowest and median."""
    exact = {t.module_name: t.layer.weight() for t in find_targets(model, rankloom.Targets())}
    best = {name: torch.linalg.svdvals(weight)[:rank].square().sum() for name, weight in exact.items()}
    rows = []
    for mode in ("pissa", "peft pissa_niter_16"):
        made = attach(mode, copy.deepcopy(model), data, rank)
        if mode == "pissa":
            factors = {b.target.module_name: b.adapter.B.detach() for b in made.bindings}
        else:
            layers = ((name, made.base_model.model.get_submodule(name)) for name in exact)
            factors = {name: layer.lora_B["default"].weight.detach() for name, layer in layers}
        shares = []
        for name, weight in exact.items():
            basis = torch.linalg.qr(factors[name]).Q
            shares.append(float((basis.mT @ weight).square().sum() / best[name]))
        row = {"start": mode, "targets": len(shares), "min": min(shares), "median": statistics.median(shares)}
        rows.append(row)
    return rows


def memory(mode: str, rank: int, batches: int) -> dict[str, float]:
    """MB that a start takes at its peak above the loaded model; in this process."""
    model, data = some_data(batches)
    sum(float(p.detach().sum()) for p in model.parameters())  # weights are mapped from disk: read them all in first
    reset_peak()
    before = resident_mb()
    attach(mode, model, data, rank)
    return {"over_model_mb": peak_mb() - before}


def memories(families: list[str], rank: int, batches: int) -> list[dict[str, Any]]:
    """The peak of every start, a process each, and what that is over LoRA steps on the same batches."""
    rows: list[dict[str, Any]] = []
    for mode in [STEP, *(mode for family in families for mode in FAMILIES[family])]:
        command = [sys.executable, __file__, "--child", mode, "--rank", str(rank), "--batches", str(batches)]
        out = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **GIVE_BACK})
        rows.append({"start": mode, **json.loads(out.stdout.strip().splitlines()[-1])})
        rows[-1]["over_step_mb"] = rows[-1]["over_model_mb"] - rows[0]["over_model_mb"]
        print(rows[-1], flush=True)
    peer = next((row["over_step_mb"] for row in rows if row["start"] == "peft lora_ga"), None)
    for row in rows:
        if peer is not None and row["start"].startswith("lora-ga"):
            row["of_peft"] = row["over_step_mb"] / peer
    return rows


def some_data(batches: int) -> tuple[Any, Calibration]:
    """SmolLM2 in float32 and the first batches of 4 x 128 tokens."""
    model, data, _ = load("float32")
    return model, Calibration(list(data.batches)[:batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batches", type=int, default=2, help="calibration batches of 4 x 128 tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["time", "energy", "memory"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(memory(args.child, args.rank, args.batches)))
        return
    model, data = some_data(args.batches)
    settings = {"rank": args.rank, "batches": args.batches, "repeats": args.repeats}
    result: dict[str, Any] = {"provenance": provenance(), **settings, "time": []}
    if args.json and Path(args.json).is_file():  # families and parts that are not measured now keep what they had
        before = json.loads(Path(args.json).read_text())
        if all(before.get(key) == value for key, value in settings.items()):
            anew = {mode for family in args.families for mode in FAMILIES[family] if "time" in args.parts}
            before["time"] = [row for row in before["time"] if row["start"] not in anew]
            result = {**before, "provenance": provenance()}
    for family in args.families if "time" in args.parts else ():
        result["time"] += summary(timed(family, model, data, args.rank, args.repeats))
        table(result["time"], ["start", "seconds", "low", "high", "of_peft", "of_peft_low", "of_peft_high", "limit"])
        write(args.json, result)
    if "energy" in args.parts:
        result["energy"] = energies(model, data, args.rank)
        table(result["energy"], list(result["energy"][0]))
        write(args.json, result)
    del model
    if "memory" in args.parts:
        rows = memories(args.families, args.rank, args.batches)
        anew = {row["start"] for row in rows}
        result["memory"] = [row for row in result.get("memory", []) if row["start"] not in anew] + rows
        write(args.json, result)


if __name__ == "__main__":
    main()
