"""The streamed gradient sketch against the exact gradient, on every linear of SmolLM2-135M with real text.

Claim: at r = 8, width 32, 32 samples of 128 tokens, three passes capture >= 0.985 of the energy that the exact rank-8
subspaces do on every target, at <= 1.15x a plain forward and backward pass per pass, in <= 10 % of the model's weight bytes
above a plain LoRA step.

    python bench/sketch.py --json bench/results/sketch.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from typing import Any

import torch

import rankloom
from common import peak_mb, provenance, reset_peak, table, write
from rankloom.calibration import Calibration, exact_gradients, gradient_svd
from rankloom.targets import Targets, find_targets

RANK, OVERSAMPLE, SAMPLES, LENGTH, MICRO = 8, 24, 32, 128, 4


def load(dtype: str) -> tuple[Any, Calibration]:
    """SmolLM2-135M and 32 x 128 tokens of the Python documentation, in micro-batches of 4."""
    import pydoc_data.topics

    from rankloom.training.models import resolve_model

    path = resolve_model("smollm2-135m")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    starts = torch.randperm(len(ids) - LENGTH, generator=torch.Generator().manual_seed(0))[:SAMPLES]
    rows = torch.stack([ids[s : s + LENGTH] for s in starts.tolist()])
    return model, Calibration([{"input_ids": part, "labels": part} for part in rows.split(MICRO)])


def accuracy(dtype: str, most: int) -> list[dict[str, Any]]:
    """Captured energy against the exact subspaces, and the sketch's own estimate of it, for 2 .. ``most`` passes."""
    model, data = load(dtype)
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


def child(mode: str, dtype: str) -> None:
    """Time and peak memory of one mode, in this process."""
    model, data = load(dtype)
    targets = find_targets(model, Targets())
    batches = list(data.batches)
    weight_mb = sum(p.nbytes for p in model.parameters()) / 1e6
    if mode == "lora":
        optimizer = rankloom.adapt(model, rankloom.methods.get("lora")).optimizer(1e-4)

        def run() -> None:
            model(**batches[0]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    elif mode == "plain":
        model.requires_grad_(False)

        def run() -> None:
            for batch in batches:
                embeds = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
                model(inputs_embeds=embeds, labels=batch["labels"]).loss.backward()
    elif mode == "exact":

        def run() -> None:
            exact_gradients(model, targets, data, rank=RANK)
    else:

        def run() -> None:
            gradient_svd(model, targets, data, rank=RANK, oversample=OVERSAMPLE, passes=3)

    if mode in ("lora", "plain"):
        run()
    reset_peak()
    begin = time.process_time()
    run()
    seconds = time.process_time() - begin
    print(json.dumps({"mode": mode, "cpu_seconds": seconds, "peak_mb": peak_mb(), "weights_mb": weight_mb}))


def cost(dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Seconds and peak memory of each mode, a process each, in turn; medians."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(repeats):
        for mode in ("plain", "lora", "sketch", "exact"):
            command = [sys.executable, __file__, "--child", mode, "--dtype", dtype]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.setdefault(mode, []).append(json.loads(output.strip().splitlines()[-1]))
    middle = {m: sorted(r, key=lambda x: x["cpu_seconds"])[len(r) // 2] for m, r in runs.items()}
    plain, lora = middle["plain"], middle["lora"]
    rows = []
    for mode, row in middle.items():
        passes = {"sketch": 3, "exact": 1, "plain": 1}.get(mode)
        per_pass = row["cpu_seconds"] / passes / plain["cpu_seconds"] if passes else float("nan")
        over = row["peak_mb"] - lora["peak_mb"]
        rows.append(
            {**row, "time_per_pass": per_pass, "over_lora_mb": over, "over_lora_share": over / row["weights_mb"]}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.child:
        child(args.child, args.dtype)
        return
    result: dict[str, Any] = {"provenance": provenance(), "dtype": args.dtype}
    result["accuracy"] = accuracy(args.dtype, args.passes)
    table(result["accuracy"], list(result["accuracy"][0]))
    write(args.json, result)
    result["cost"] = cost(args.dtype, args.repeats)
    table(result["cost"], list(result["cost"][0]))
    write(args.json, result)


if __name__ == "__main__":
    main()
