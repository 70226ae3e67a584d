"""Long real text, small heads: LoRA fine-tuning with exact attention and with `accelerate_attention`, step by step in one run.

A byte-level Llama with heads of 16 dimensions is trained on Python's language reference (all its weights, short sequences, once
for both), then fine-tuned with LoRA on the source of the standard library at full length: two copies from the same start, on the
same batches, taking their steps in turn. Reported: training and validation losses of both (validation is exact for both), CPU
and wall seconds a step, with the measuring steps and without them, and which heads were accelerated by what.

    python bench/limits_training.py --json bench/results/limits_training.json
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankloom
from common import provenance, table, write
from rankloom import methods
from rankloom.attention.accelerate import accelerate_attention

VARIANTS = ("exact", "accelerated")


def model_of(layers: int, heads: int, dim: int, length: int, width: int | None = None) -> nn.Module:
    """A Llama over bytes, ``heads * dim`` wide unless said otherwise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = width or heads * dim
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=dim,
            max_position_embeddings=length,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


def reference() -> Tensor:
    """Python's language reference, as bytes."""
    topics = pydoc_data.topics.topics
    return _bytes("\n\n".join(topics[name] for name in sorted(topics)))


def library(length: int, count: int) -> list[Tensor]:
    """The first ``length`` bytes of that many modules of the standard library, spread over the alphabet."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    long = [path for path in files if path.stat().st_size >= length]
    if len(long) < count:
        raise SystemExit(f"only {len(long)} modules have {length} bytes: ask for fewer steps or a shorter length")
    picked = [long[i * len(long) // count] for i in range(count)]
    return [_bytes(path.read_text(encoding="utf-8"))[:length] for path in picked]


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def pretrain(model: nn.Module, steps: int, length: int = 512, rows: int = 8) -> float:
    """Train all weights on short pieces; returns the last loss."""
    text, generator = reference(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = torch.zeros(())
    for _ in range(steps):
        starts = torch.randint(len(text) - length, (rows,), generator=generator)
        batch = torch.stack([text[s : s + length] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@torch.no_grad()
def validate(model: nn.Module, texts: list[Tensor]) -> float:
    """Mean loss, with exact attention."""
    model.eval()
    losses = [float(model(input_ids=text[None], labels=text[None]).loss) for text in texts]
    model.train()
    return statistics.mean(losses)


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Both fine-tunings; everything measured."""
    base = model_of(options.layers, options.heads, options.dim, options.length)
    pretrained = pretrain(base, options.pretrain)
    texts = library(options.length, options.steps + options.validation)
    # Every so many-th text is held out, so that both parts are of all kinds.
    held = set(range(0, len(texts), max(2, len(texts) // options.validation)))
    held = set(sorted(held)[: options.validation])
    train = [text for i, text in enumerate(texts) if i not in held]
    validation = [text for i, text in enumerate(texts) if i in held]
    models = {name: copy.deepcopy(base).train() for name in VARIANTS}
    adapted = {name: rankloom.adapt(model, methods.get("lora"), seed=0) for name, model in models.items()}
    optimizers = {name: a.optimizer(lr=options.lr, total_steps=len(train)) for name, a in adapted.items()}
    before = validate(models["exact"], validation)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    measuring: set[int] = set()
    with accelerate_attention(models["accelerated"], options.eps, refresh=options.refresh) as handle:
        for number, text in enumerate(train):
            booked = handle.report()["budget"]["spent"]
            for name in VARIANTS if number % 2 else reversed(VARIANTS):
                cpu, wall = time.process_time(), time.perf_counter()
                loss = models[name](input_ids=text[None], labels=text[None]).loss
                loss.backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
                steps[name].append({"loss": float(loss.detach()), **spent})
            if handle.report()["budget"]["spent"] > booked:
                measuring.add(number)
            shown = {name: steps[name][-1] for name in VARIANTS}
            print(
                f"step {number + 1}/{len(train)}: "
                + ", ".join(f"{n} {s['loss']:.4f} {s['cpu']:.1f} s" for n, s in shown.items())
            )
        report = handle.report()
        print(handle.summary())
    after = {name: validate(model, validation) for name, model in models.items()}
    return {
        "settings": vars(options),
        "pretraining_loss": pretrained,
        "validation_before": before,
        "validation_after": after,
        "validation_difference": after["accelerated"] / after["exact"] - 1,
        "largest_training_difference": max(
            abs(a["loss"] / e["loss"] - 1) for a, e in zip(steps["accelerated"], steps["exact"], strict=True)
        ),
        "time_ratio": {
            clock: {
                "whole_run": _total(steps["accelerated"], clock) / _total(steps["exact"], clock),
                "between_measurements": _median(steps["accelerated"], clock, measuring)
                / _median(steps["exact"], clock, measuring),
            }
            for clock in ("cpu", "wall")
        },
        "steps": steps,
        "measuring_steps": sorted(measuring),
        "attention": report,
    }


def _total(steps: list[dict[str, float]], clock: str) -> float:
    return sum(step[clock] for step in steps)


def _median(steps: list[dict[str, float]], clock: str, without: set[int]) -> float:
    return statistics.median(step[clock] for number, step in enumerate(steps) if number not in without)


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--pretrain", type=int, default=100, help="steps of training the base model")
    parser.add_argument("--validation", type=int, default=4, help="texts held out")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--eps", type=float, default=1e-2)
    parser.add_argument("--refresh", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the result here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {"provenance": provenance(), **study(options)}
    rows = [
        {"variant": name, "validation": result["validation_after"][name]}
        | {clock: _total(result["steps"][name], clock) for clock in ("cpu", "wall")}
        for name in VARIANTS
    ]
    table(rows, ["variant", "validation", "cpu", "wall"])
    ratio = result["time_ratio"]["cpu"]
    print(
        f"validation loss {result['validation_before']:.4f} before; accelerated differs by "
        f"{100 * result['validation_difference']:+.3f} % after, by at most "
        f"{100 * result['largest_training_difference']:.3f} % in any training step; CPU time x {ratio['whole_run']:.3f} "
        f"of the whole run, x {ratio['between_measurements']:.3f} between measurements"
    )
    write(options.json, result)


if __name__ == "__main__":
    main()
