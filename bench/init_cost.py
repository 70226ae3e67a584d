"""What starts cost beside PEFT's, on every linear of SmolLM2-135M with real text, in float32, in turn in one process.

Claim: at rank 16, PiSSA and OLoRA take <= 0.5x PEFT's exact time at >= 0.999 of the best rank-16 energy, LoRA-GA <= 0.5x and
EVA <= 0.7x; LoRA-GA's start needs <= 0.1x the memory above the model that PEFT's does.

    python bench/init_cost.py --json bench/results/init_cost.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from typing import Any

import torch

import rankloom
from common import peak_mb, provenance, reset_peak, resident_mb, table, write
from rankloom.calibration import Calibration
from sketch import load

RANK, STARTS = 16, ("pissa", "olora", "lora-ga", "eva")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ours(start: str, model: Any, data: Calibration) -> rankloom.Adaptation:
    """The table's row at this rank, every target with the same."""
    recipe = rankloom.methods.get(start).with_({"adapter.rank": RANK, "adapter.alpha": RANK})
    return rankloom.adapt(model, recipe.with_({"init.rho": 1.0}) if start == "eva" else recipe, data)


def theirs(start: str, model: Any, data: Calibration) -> Any:
    """The same with PEFT, as its documentation does it."""
    import peft
    from peft.tuners.lora.loraga import preprocess_loraga

    settings = {
        "lora-ga": {"lora_ga_config": peft.LoraGAConfig()},
        "eva": {"eva_config": peft.EvaConfig(rho=1.0)},
    }.get(start, {})
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=LINEARS, init_lora_weights=start.replace("-", "_"), **settings
    )
    if start == "lora-ga":
        preprocess_loraga(model, config, lambda: [model(**batch).loss.backward() for batch in data.batches])
    made = peft.get_peft_model(model, config)
    if start == "eva":
        peft.initialize_lora_eva_weights(made, list(data.batches), show_progress_bar=False)
    return made


def run(who: str, start: str, model: Any, data: Calibration) -> float:
    """CPU seconds of one start; taking it off again is not counted, nor is undoing PEFT's edits of the weights."""
    before = None if who == "rankloom" else {n: p.detach().clone() for n, p in model.named_parameters()}
    begin = time.process_time()
    made = (ours if who == "rankloom" else theirs)(start, model, data)
    seconds = time.process_time() - begin
    if before is None:
        made.detach()
        return seconds
    made.unload()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
            parameter.requires_grad_(True)
    return seconds


def memory(who: str, start: str) -> float:
    """Peak MB above the loaded model, in this process."""
    model, data = load("float32")
    if start == "lora-ga":  # a first backward pass, so that what any training step takes is there already
        model(**data.batches[0]).loss.backward()  # type: ignore[index]
        model.zero_grad()
    resident = resident_mb()
    reset_peak()
    (ours if who == "rankloom" else theirs)(start, model, data)
    return peak_mb() - resident


def energy(model: Any, data: Calibration) -> float:
    """The lowest share of the best rank-16 energy of a weight that PiSSA's start holds, by the full decomposition."""
    handle, shares = ours("pissa", model, data), []
    for b in handle.bindings:
        gram = b.adapter.scale**2 * (b.adapter.B.mT @ b.adapter.B) * (b.adapter.A @ b.adapter.A.mT)
        shares.append(float(gram.sum().detach() / torch.linalg.svdvals(b.layer.weight())[:RANK].square().sum()))
    handle.detach()
    return min(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json")
    parser.add_argument("--starts", nargs="+", default=STARTS, choices=STARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.memory_of:
        print(memory(*args.memory_of))
        return
    model, data = load("float32")
    rows = []
    for start in args.starts:
        times: dict[str, list[float]] = {"peft": [], "rankloom": []}
        for _ in range(args.repeats):
            for who, own in times.items():
                own.append(run(who, start, model, data))
        row = {"start": start, **{who: min(own) for who, own in times.items()}}
        row["ratio"] = row["rankloom"] / row["peft"]
        for who in () if args.no_memory else times:
            command = [sys.executable, __file__, "--memory-of", who, start]  # peaks are per process
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row[f"{who} MB"] = float(out.split()[-1])
        rows.append({**row, "rounds": times})
    table(rows, [column for column in rows[0] if column != "rounds"])
    share = energy(model, data)
    print(f"lowest share of the best rank-{RANK} energy in PiSSA's start: {share:.6f}")
    write(args.json, {"provenance": provenance(), "rank": RANK, "starts": rows, "captured": share})


if __name__ == "__main__":
    main()
