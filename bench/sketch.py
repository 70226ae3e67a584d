"""The streamed gradient sketch against the exact gradient, on every linear of SmolLM2-135M with real text.

Claim: at r = 8, width 32, 32 samples of 128 tokens, three passes capture >= 0.985 of the energy that the exact rank-8
subspaces do on every target, at <= 1.15x a plain forward and backward pass per pass, in <= 10 % of the model's weight bytes
above a plain LoRA step; and LoRA-One trains alike from the sketch and from the exact gradient.

Time: CPU seconds of one thread. Memory: peak resident set in a process of its own, over several micro-batches, with the C
library told to give every freed block back, so that the figure is what is alive and not how the heap happens to be holed.

    python bench/sketch.py --json bench/results/sketch.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import rankloom
from common import peak_mb, provenance, reset_peak, table, write
from rankloom.calibration import Calibration, exact_gradients, gradient_svd
from rankloom.calibration.data import mean_loss
from rankloom.targets import Targets, find_targets

RANK, OVERSAMPLE, SAMPLES, LENGTH, MICRO = 8, 24, 32, 128, 4
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MODES = ("plain", "lora", "sketch", "exact")


def load(dtype: str) -> tuple[Any, Calibration, Calibration]:
    """SmolLM2-135M, 32 x 128 tokens of the Python documentation in micro-batches of 4, and as many others to test on."""
    import pydoc_data.topics

    from rankloom.training.models import resolve_model

    path = resolve_model("smollm2-135m")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    pieces = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
    return model, batched(pieces[:SAMPLES]), batched(pieces[SAMPLES : 2 * SAMPLES])


def batched(rows: torch.Tensor) -> Calibration:
    """Rows of tokens as micro-batches."""
    return Calibration([{"input_ids": part, "labels": part} for part in rows.split(MICRO)])


def accuracy(dtype: str, most: int) -> list[dict[str, Any]]:
    """Captured energy against the exact subspaces, and the sketch's own estimate of it, for 2 .. ``most`` passes."""
    model, data, _ = load(dtype)
    targets = find_targets(model, Targets())
    gradients, exact = exact_gradients(model, targets, data, rank=RANK)
    rows = []
    for passes in range(2, most + 1):
        report = gradient_svd(model, targets, data, rank=RANK, oversample=OVERSAMPLE, passes=passes)
        shares, worst = [], ""
        for name, svd in report.svds.items():
            u, _, v = svd.top(RANK)
            best = float(exact.svds[name].S[:RANK].square().sum())
            shares.append((float((u.mT @ gradients[name] @ v).square().sum()) / best, svd.captured, name))
        shares.sort()
        worst = shares[0][2]
        error = max(abs(true - estimate) for true, estimate, _ in shares)
        rows.append(
            {
                "passes": passes,
                "captured_min": shares[0][0],
                "captured_median": shares[len(shares) // 2][0],
                "worst": worst,
                "estimate_min": min(e for _, e, _ in shares),
                "estimate_error_max": error,
            }
        )
    return rows


def child(mode: str, dtype: str, batches: int) -> None:
    """Time and peak memory of one mode over the first ``batches`` micro-batches, in this process."""
    model, data, _ = load(dtype)
    data = Calibration(list(data.batches)[:batches])
    targets = find_targets(model, Targets())
    optimizer = None
    if mode == "lora":
        optimizer = rankloom.adapt(model, rankloom.methods.get("lora")).optimizer(1e-4)
    elif mode == "plain":
        model.requires_grad_(False)

    def run() -> None:
        if mode == "exact":
            exact_gradients(model, targets, data, rank=RANK)
        elif mode == "sketch":
            gradient_svd(model, targets, data, rank=RANK, oversample=OVERSAMPLE, passes=3)
        else:
            for batch in data.batches:
                embeds = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
                model(inputs_embeds=embeds, labels=batch["labels"]).loss.backward()
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()

    reset_peak()
    begin = time.process_time()
    run()
    seconds = time.process_time() - begin
    weights = sum(p.nbytes for p in model.parameters()) / 1e6
    print(json.dumps({"mode": mode, "cpu_seconds": seconds, "peak_mb": peak_mb(), "weights_mb": weights}))


def measure(mode: str, dtype: str, batches: int, **environment: str) -> dict[str, Any]:
    """What a child process says."""
    command = [sys.executable, __file__, "--child", mode, "--dtype", dtype, "--batches", str(batches)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    return json.loads(output.stdout.strip().splitlines()[-1])


def cost(dtype: str, repeats: int) -> list[dict[str, Any]]:
    """CPU seconds of each mode, a process each, in turn; and the peak memory of each."""
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(repeats):
        for mode in MODES:
            seconds[mode].append(measure(mode, dtype, SAMPLES // MICRO)["cpu_seconds"])
    peaks = {mode: measure(mode, dtype, 3, **GIVE_BACK) for mode in MODES}
    rows = []
    for mode in MODES:
        passes = 3 if mode == "sketch" else 1
        each = sorted(s / passes / p for s, p in zip(seconds[mode], seconds["plain"], strict=True))
        over = peaks[mode]["peak_mb"] - peaks["lora"]["peak_mb"]
        rows.append(
            {
                "mode": mode,
                "cpu_seconds": statistics.median(seconds[mode]),
                "time_per_pass": statistics.median(each),
                "time_per_pass_low": each[0],
                "time_per_pass_high": each[-1],
                "peak_mb": peaks[mode]["peak_mb"],
                "over_lora_mb": over,
                "over_lora_share": over / peaks[mode]["weights_mb"],
            }
        )
    return rows


def runs(dtype: str, steps: int, seeds: int) -> list[dict[str, Any]]:
    """Test loss of LoRA-One runs started from the sketch and from the exact gradient, same data orders."""
    rows = []
    for method in ("sketch", "exact"):
        model, data, test = load(dtype)
        recipe = rankloom.methods.get("lora-one").with_({"init.method": method})
        adaptation = rankloom.adapt(model, recipe, calibration=data)
        start = {name: t.clone() for name, t in adaptation.state_dict().items()}
        for seed in range(seeds):
            adaptation.load_state_dict(start)
            optimizer = adaptation.optimizer(3e-4)
            batches = list(data.batches)
            generator = torch.Generator().manual_seed(seed)
            first = mean_loss(model, test)
            for step in range(steps):
                if step % len(batches) == 0:
                    order = torch.randperm(len(batches), generator=generator).tolist()
                model.train()
                model(**batches[order[step % len(batches)]]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            rows.append({"start": method, "seed": seed, "loss_first": first, "loss_last": mean_loss(model, test)})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="of each LoRA-One run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["accuracy", "cost", "runs"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=SAMPLES // MICRO, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.child:
        child(args.child, args.dtype, args.batches)
        return
    result = json.loads(Path(args.json).read_text()) if args.json and Path(args.json).is_file() else {}
    parts = {
        "accuracy": lambda: accuracy(args.dtype, args.passes),
        "cost": lambda: cost(args.dtype, args.repeats),
        "runs": lambda: runs(args.dtype, args.steps, args.seeds),
    }
    for name in args.parts:  # parts that are not run again stay in the file, each with its own provenance
        rows = parts[name]()
        result[name] = {"provenance": provenance(), "dtype": args.dtype, "rows": rows}
        table(rows, list(rows[0]))
        write(args.json, result)


if __name__ == "__main__":
    main()
