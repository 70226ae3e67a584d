"""A LoRA step over a base in bfloat16, int8 and packed int4: bytes of the weights, peak memory and CPU time of a step.

Claim: over an int8 base a step needs no dense copy of the weights for the backward pass, which torchao's own autograd keeps
for every layer at once; packed int4 on a CPU, which autograd cannot differentiate at all, trains.

    python bench/quantized_base.py --layers 4 --json bench/results/quantized_base.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from typing import Any

import torch
import torch.nn.functional as F

import rankloom
import rankloom.targets
from common import interleaved, peak_mb, provenance, ratios, reset_peak, resident_mb, table, write
from rankloom.quantized import unroute


def model(layers: int) -> Any:
    """SmolLM2-135M's shape with fewer layers and a small vocabulary, whose head would drown the rest."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            pad_token_id=0,
        )
    ).to(torch.bfloat16)


def variant(base: str, layers: int) -> rankloom.Adaptation:
    """LoRA at rank 8 on every linear of a base in the given storage."""
    recipe = rankloom.methods.get("lora").with_(base=base)
    made = model(layers)
    recipe.base.prepare(made, recipe.targets)
    return rankloom.adapt(made, recipe)


def step(handle: rankloom.Adaptation, ids: torch.Tensor, *, own: bool = False) -> None:
    """Forward and backward; ``own``: the storage's own autograd instead of ours."""
    routed, ours = handle._routed, rankloom.targets.frozen_linear
    if own:
        unroute(routed)
        rankloom.targets.frozen_linear = F.linear
    try:
        handle.model(input_ids=ids, labels=ids).loss.backward()
    finally:
        rankloom.targets.frozen_linear = ours
    for parameter in handle.parameters():
        parameter.grad = None


def weights_mb(handle: rankloom.Adaptation) -> float:
    """Bytes of the adapted layers' weights as stored."""
    total = 0
    for target in handle.targets:
        stored = target.layer.stored
        parts = stored.__tensor_flatten__()[0] if hasattr(stored, "__tensor_flatten__") else None
        inner = [getattr(stored, name) for name in parts] if parts else [stored]
        total += sum(t.numel() * t.element_size() for t in inner)
    return total / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    ids = torch.randint(3, 2048, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    handles = {name: variant(name, args.layers) for name in ("as-loaded", "torchao-int8", "torchao-int4")}
    runs = {name: (lambda h=handle: step(h, ids)) for name, handle in handles.items()}
    runs["torchao-int8, its own autograd"] = lambda: step(handles["torchao-int8"], ids, own=True)
    peaks = {}
    for name, run in runs.items():
        run()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or memory an earlier variant freed would be used again, unseen
        before = resident_mb()
        reset_peak()
        run()
        peaks[name] = peak_mb() - before
    timed = ratios(interleaved(runs, args.repeats), "as-loaded")
    rows = [
        {
            "base": name,
            "weights_mb": weights_mb(handles[name.split(",")[0]]),
            "step_extra_mb": peaks[name],
            "seconds": timed[name]["seconds"],
            "ratio": timed[name]["ratio"],
        }
        for name in runs
    ]
    table(rows, ["base", "weights_mb", "step_extra_mb", "seconds", "ratio"])
    write(args.json, {**provenance(), "settings": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
