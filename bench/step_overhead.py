"""A training step over the frozen limit, beside PEFT's, on the shape of SmolLM2-135M.

Claim: LoRA r=16 on all linears costs <= 1.08x the frozen limit on a 4-layer slice (bf16 and fp32) and <= 1.10x on 30
layers, DoRA <= 1.18x, and at most half of PEFT's extra peak memory.

"thin products" is what no implementation by matrix products can go below: the frozen limit plus the six bare products a
rank-16 update needs (A x^T, B h; B^T g, A^T d, d x, h g; shared inputs stacked), timed on buffers of their own, without
autograd, casts or optimizer. "dora's products" adds what DoRA cannot do without: W A^T for the norms, and per output one
multiplication forward, and backward the gain's gradient and another multiplication.

The frozen limit is the bare model's forward pass and the backward pass to its inputs. A step is forward, backward and
AdamW, 4 x 256 tokens, dropout off. CPU seconds of one thread, variants in turn, medians. For the timing the C library is
told to keep freed memory, for all variants alike: otherwise page faults, which depend on what ran before, add up to a tenth
to whichever variant they hit; and to ask for huge pages (``--pages small``: not to), because over 4 KiB pages the 30 layers'
heap costs every variant 2-4 % of address translation, by where its tensors happen to lie. Memory is the peak resident set
of one step (the second, so that optimizer state exists) in a process of its own, with the library's defaults. A run with
``--layers``, ``--dtype`` or ``--no-memory`` replaces its own part of an earlier result and keeps the rest.

    python bench/step_overhead.py --json bench/results/step_overhead.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from common import (
    earlier,
    interleaved,
    peak_mb,
    plain_environment,
    provenance,
    ratios,
    reset_peak,
    steady_memory,
    table,
    write,
)

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = [
    "limit",
    "thin products",
    "dora's products",
    "rankloom lora",
    "peft lora",
    "peft lora (base dtype)",
    "rankloom dora",
    "peft dora",
]


def build(layers: int, dtype: torch.dtype) -> torch.nn.Module:
    """SmolLM2-135M's shape; a slice keeps the head's share of the work by cutting the vocabulary in proportion."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = 49152 * layers // 30 if layers < 30 else 49152
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def step_of(variant: str, model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], Any]:
    """A callable that runs one step of a variant."""
    if variant == "limit":
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()

        def limit() -> None:
            model(inputs_embeds=embeds, labels=ids).loss.backward()
            embeds.grad = None

        return limit
    if variant.endswith("products"):
        alone = thin_products(model, ids.numel(), dora=variant.startswith("dora"))
        frozen = step_of("limit", model, ids)

        def both() -> None:
            frozen()
            alone()

        return both
    parameters = ours(variant, model) if variant.startswith("rankloom") else theirs(variant, model)
    target = model if variant.startswith("rankloom") else parameters[1]
    optimizer = parameters[0]

    def step() -> None:
        target(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def thin_products(model: torch.nn.Module, tokens: int, *, dora: bool, rank: int = 16) -> Callable[[], Any]:
    """The six products of every low-rank update, alone; with ``dora`` also what its norms, gains and their gradients take."""
    groups = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups += [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]]
        groups += [[mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
    buffers = []
    for group in groups:
        weight, ranks = group[0].weight, rank * len(group)
        a, x, h, d = (
            weight.new_zeros(s) for s in ((ranks, weight.shape[1]), (tokens, weight.shape[1]), *[(ranks, tokens)] * 2)
        )
        each = [(weight.new_zeros(len(m.weight), rank), weight.new_zeros(tokens, len(m.weight))) for m in group]
        gains = [(m.weight, weight.new_ones(len(m.weight)), weight.new_zeros(tokens, len(m.weight))) for m in group]
        buffers.append((a, x, h, d, each, gains if dora else ()))

    def forward_backward() -> None:
        for a, x, h, _, each, gains in buffers:
            for weight, gain, out in gains:
                torch.mm(weight, a[:rank].mT)
                out.mul_(gain)
            torch.mm(a, x.mT, out=h)
            for (b, y), part in zip(each, h.split(rank), strict=True):
                y.addmm_(part.mT, b.mT)
        for a, x, h, d, each, gains in reversed(buffers):
            for (_, y), (_, gain, out) in zip(each, gains, strict=False):
                product = y * out
                product.sum(0)
                torch.mul(y, gain, out=product)
            for (b, y), part in zip(each, d.split(rank), strict=True):
                torch.mm(b.mT, y.mT, out=part)
            torch.mm(d, x)
            x.addmm_(d.mT, a)
            for (_, y), part in zip(each, h.split(rank), strict=True):
                torch.mm(part, y)

    return forward_backward


def ours(variant: str, model: torch.nn.Module) -> tuple[Any]:
    """rankloom's adaptation and its optimizer."""
    import rankloom

    recipe = rankloom.methods.get(variant.split()[1]).with_({"adapter.rank": 16, "adapter.alpha": 32.0})
    return (rankloom.adapt(model, recipe).optimizer(1e-4),)


def theirs(variant: str, model: torch.nn.Module) -> tuple[Any, Any]:
    """PEFT's model and AdamW."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, use_dora="dora" in variant)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype="base dtype" not in variant)
    wrapped.train()
    return torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4), wrapped


def times(
    layers: int, dtype: torch.dtype, repeats: int, variants: list[str], tokens: tuple[int, int]
) -> dict[str, Any]:
    """Interleaved step times of all variants."""
    base = build(layers, dtype)
    ids = torch.randint(0, base.config.vocab_size, tokens, generator=torch.Generator().manual_seed(0))
    steps = {variant: step_of(variant, copy.deepcopy(base), ids) for variant in variants}
    return ratios(interleaved(steps, repeats), "limit")


def child(variant: str, layers: int, dtype: str) -> None:
    """Measure one variant's peak memory in this process and print it."""
    import peft  # noqa: F401 - every process imports the same, so that imports cancel

    import rankloom  # noqa: F401

    model = build(layers, getattr(torch, dtype))
    ids = torch.randint(0, model.config.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))
    step = step_of(variant, model, ids)
    step()
    reset_peak()
    step()
    print(json.dumps({"peak_mb": peak_mb()}))


def memory(layers: int, dtype: str, variants: list[str], repeats: int = 3) -> dict[str, dict[str, Any]]:
    """Peak memory of each variant, processes of its own, in turn: medians, and the median excess over the limit of its round."""
    rounds: dict[str, list[float]] = {variant: [] for variant in variants if not variant.endswith("products")}
    for _ in range(repeats):
        for variant, peaks in rounds.items():
            command = [sys.executable, __file__, "--child", variant, "--layers", str(layers), "--dtype", dtype]
            child = subprocess.run(command, check=True, capture_output=True, text=True, env=plain_environment())
            peaks.append(json.loads(child.stdout.strip().splitlines()[-1])["peak_mb"])
    return {
        variant: {
            "peak_mb": statistics.median(peaks),
            "over_limit_mb": statistics.median(p - q for p, q in zip(peaks, rounds["limit"], strict=True)),
            "rounds_mb": peaks,
        }
        for variant, peaks in rounds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 30])
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float32"], help="none: memory alone")
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--pages", choices=["huge", "small"], default="huge", help="of the memory behind the timing")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.child:
        child(args.child, args.layers[0], args.dtype[0])
        return
    steady_memory(args.pages)
    result: dict[str, Any] = {"time": {}, "memory": {}, **earlier(args.json)}
    for layers in args.layers:
        for dtype in args.dtype:
            measured = times(layers, getattr(torch, dtype), args.repeats, args.variants, (4, 256))
            part = f"{layers} layers {dtype}" + (", small pages" if args.pages == "small" else "")
            result["time"][part] = {"provenance": provenance(), "variants": measured}
            print(f"\n{layers} layers, {dtype}: CPU seconds a step and ratio to the frozen limit (quartiles)")
            columns = ["variant", "seconds", "ratio", "ratio_fastest", "ratio_low", "ratio_high"]
            table([{"variant": n, **m} for n, m in measured.items()], columns)
            write(args.json, result)
    if not args.no_memory:
        layers = max(args.layers)
        measured = memory(layers, "float32", args.variants)
        result["memory"][f"{layers} layers float32"] = {"provenance": provenance(), "variants": measured}
        print(f"\n{layers} layers, float32: peak resident memory of one step, MB")
        table([{"variant": n, **m} for n, m in measured.items()], ["variant", "peak_mb", "over_limit_mb"])
    write(args.json, result)


if __name__ == "__main__":
    main()
