"""What `accelerate_attention` costs a model none of whose heads passes, and what it brings one whose heads all do.

Training runs with exact attention and with `accelerate_attention`, LoRA on both, step by step in turn in one process; CPU time of
the whole, calibration and measurements included:

- *fails*: the first layers of SmolLM2-135M on real text, at two lengths. The loss is taken on every so many-th token only, so
  that the vocabulary's share of a step is that of the whole model.
- *fails, long*: one layer of eight heads of 64 dimensions with large logits, in a model of which attention is nearly all, for so
  many steps that the budget comes to calibrate and to measure.
- *passes*: a byte-level Llama with small heads of small norms on source code.

A short run of the first kind measures nothing, as its budget does not get that far: *prices* says what a longer one comes to. For
heads of both models (their own queries, keys and values on the first text, and random output gradients) it compares the CPU
time of a measurement and of a calibration with what is booked for them. A long run spends ``budget x measured / booked`` of exact
attention's time.

    python bench/limits_overhead.py --json bench/results/limits_overhead.json

With `--only passes` (or fails) the other cases in that file are kept as they are.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankloom
from common import earlier, provenance, ratios, steady_memory, table, write
from limits_training import library, model_of
from rankloom import methods
from rankloom.attention.accelerate import accelerate_attention
from rankloom.attention.budget import calibration_pairs
from rankloom.attention.capture import capture
from rankloom.attention.cost import calibrate
from rankloom.attention.fitting import Sample, fit
from rankloom.attention.search import search_seconds
from rankloom.training.models import load_model

VARIANTS = ("exact", "accelerated")
EPS, BUDGET = 1e-2, 0.04

Loss = Callable[[nn.Module, Tensor], Tensor]


def smollm2(layers: int, length: int, steps: int) -> tuple[nn.Module, list[Tensor], Loss]:
    """The model's first layers, texts, and its loss."""
    loaded = load_model("smollm2-135m")
    model: Any = loaded.model
    every = round(len(model.model.layers) / layers)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers, model.config.use_cache = layers, False
    topics = pydoc_data.topics.topics
    ids = loaded.tokenizer("\n\n".join(topics[name] for name in sorted(topics)), return_tensors="pt").input_ids[0]
    room = len(ids) - length - 1
    texts = [ids[i * room // steps :][: length + 1] for i in range(steps)]

    def loss(model: Any, text: Tensor) -> Tensor:
        hidden = model.model(input_ids=text[None, :-1]).last_hidden_state[0, every - 1 :: every]
        return F.cross_entropy(model.lm_head(hidden), text[1:][every - 1 :: every])

    return model, texts, loss


def small_heads(layers: int, heads: int, length: int, steps: int) -> tuple[nn.Module, list[Tensor], Loss]:
    """A model as it is drawn, texts, and its loss."""
    texts = library(length, min(steps, 12))
    model = model_of(layers, heads, 16, length)
    return model, [texts[i % len(texts)] for i in range(steps)], lambda m, t: m(input_ids=t[None], labels=t[None]).loss


def large_logits(heads: int, length: int, steps: int) -> tuple[nn.Module, list[Tensor], Loss]:
    """One narrow layer whose logits have a standard deviation near 4, texts, and its loss."""
    texts = library(length, 12)
    model: Any = model_of(1, heads, 64, length, width=64)
    with torch.no_grad():
        for linear in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
            linear.weight *= 2 / (linear.weight.std() * 64**0.5)  # the normed input's entries have variance 1
    return model, [texts[i % len(texts)] for i in range(steps)], lambda m, t: m(input_ids=t[None], labels=t[None]).loss


def run(model: nn.Module, texts: list[Tensor], loss: Loss) -> dict[str, Any]:
    """Both variants, a step each in turn."""
    models = {name: copy.deepcopy(model).train() for name in VARIANTS}
    adapted = {name: rankloom.adapt(each, methods.get("lora"), seed=0) for name, each in models.items()}
    optimizers = {name: each.optimizer(lr=1e-4, total_steps=len(texts)) for name, each in adapted.items()}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}

    def step(name: str, text: Tensor) -> float:
        found = loss(models[name], text)
        found.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        return float(found.detach())

    for name in VARIANTS:  # neither pays for touching its memory first
        step(name, texts[0])
    with accelerate_attention(models["accelerated"], EPS, budget=BUDGET, total_steps=len(texts)) as handle:
        for number, text in enumerate(texts):
            for name in VARIANTS if number % 2 else reversed(VARIANTS):
                begin = time.process_time()
                losses[name].append(step(name, text))
                times[name].append(time.process_time() - begin)
            print(f"step {number + 1}/{len(texts)}: " + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in times.items()))
        print(handle.summary())
        report = handle.report()
    whole = {name: sum(values) for name, values in times.items()}
    return {
        "cpu_seconds": whole,
        "whole_run": whole["accelerated"] / whole["exact"],
        "by_step": ratios(times, "exact")["accelerated"],
        "largest_loss_difference": max(
            abs(a / e - 1) for a, e in zip(losses["accelerated"], losses["exact"], strict=True)
        ),
        "steps": times,
        "attention": report,
    }


def prices(model: nn.Module, text: Tensor, heads: int) -> dict[str, Any]:
    """CPU seconds of a calibration and of some heads' measurements, and what is booked for them."""
    call = capture(model, {"input_ids": text[None]})[-1]
    group, dim = len(call.q) // len(call.k), call.q.shape[-1]
    place = (dim, call.v.shape[-1], group, call.causal, "cpu", "torch.float32")
    begin = time.process_time()
    cost = calibrate(dim, group=group, causal=call.causal)
    calibration = time.process_time() - begin
    rows = []
    for head in range(min(heads, len(call.k))):
        mine = slice(head * group, (head + 1) * group)
        q = call.q[mine]
        grad = torch.randn(*q.shape[:2], call.v.shape[-1], generator=torch.Generator().manual_seed(head))
        sample = Sample(q, call.k[head], call.v[head], grad)
        begin = time.process_time()
        found = fit(
            [sample],
            scale=call.scale,
            causal=call.causal,
            eps=EPS,
            cost=cost,
            generator=torch.Generator().manual_seed(head),
        )
        spent = time.process_time() - begin
        rows.append(
            {
                "choice": found.reason,
                "error": found.error,
                "seconds": spent,
                "booked": found.spent,
                "expected": search_seconds(cost, dim, [len(call.k[head])]),
            }
        )
    exact = cost.exact(len(text))
    return {
        "exact": exact,
        "calibration": {"seconds": calibration, "booked": cost.quadratic[1] * calibration_pairs(place)},
        "measurement": {name: statistics.mean(row[name] for row in rows) for name in ("seconds", "booked", "expected")},
        "heads": rows,
    }


def main() -> None:
    """Measure, print the table and write the result."""
    steady_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=6, help="of the failing model at 2048 tokens; a third of it at 4096"
    )
    parser.add_argument("--small-heads", type=int, default=4, help="a layer")
    parser.add_argument("--small-length", type=int, default=8192)
    parser.add_argument("--small-steps", type=int, default=24)
    parser.add_argument("--long-steps", type=int, default=400, help="of the long run of failing heads")
    parser.add_argument("--only", help="run only the cases whose names begin with this")
    parser.add_argument("--json", help="write the result here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = f"passes, {options.small_length} tokens"
    cases: dict[str, Callable[[], tuple[nn.Module, list[Tensor], Loss]]] = {
        small: lambda: small_heads(options.layers, options.small_heads, options.small_length, options.small_steps),
        "fails, 2048 tokens": lambda: smollm2(options.layers, 2048, options.steps),
        "fails, 4096 tokens": lambda: smollm2(options.layers, 4096, max(2, options.steps // 3)),
        "fails, long, 2048 tokens": lambda: large_logits(8, 2048, options.long_steps),
    }
    cases = {name: case for name, case in cases.items() if name.startswith(options.only or "")}
    measured: dict[str, Any] = {}
    for name, case in cases.items():
        print(name)
        measured[name] = {"provenance": provenance(), "settings": vars(options), **run(*case())}
    for name, case in cases.items():  # last: a process calibrates once, and the runs must pay for it
        model, texts, _ = case()
        measured[name]["prices"] = prices(model, texts[0], heads=1)
    result = {"budget": BUDGET, "eps": EPS, "cases": {**earlier(options.json).get("cases", {}), **measured}}
    columns = ["case", "exact", "accelerated", "whole", "step", "low", "high", "calibration", "measurement", "long_run"]
    rows = []
    for name, found in result["cases"].items():
        price, step = found["prices"], found["by_step"]
        over = {n: price[n]["seconds"] / price[n]["booked"] for n in ("calibration", "measurement")}
        rows.append(
            {"case": name, **found["cpu_seconds"], "whole": found["whole_run"], "step": step["ratio"]}
            | {"low": step["ratio_low"], "high": step["ratio_high"], **over}
            | {"long_run": 1 + BUDGET * over["measurement"]}
        )
    table(rows, columns)
    print(
        "whole: CPU time of the accelerated run over the exact one; step, low, high: of a step, median and quartiles; "
        "calibration, measurement: seconds measured over seconds booked (0: calibrated before, in a run); long_run: the bound on "
        "attention's time that follows"
    )
    write(options.json, {**result, "table": rows})


if __name__ == "__main__":
    main()
