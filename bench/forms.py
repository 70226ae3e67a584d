"""Every adapter form over the frozen limit, beside PEFT's same form: step time, peak memory, injection, file size, merge drift.

Limits: a form's step takes <= 0.95x of PEFT's and <= 1.25x of its own arithmetic bound; the cheap forms <= 1.10x the frozen
limit, Kronecker <= 1.30x, RandLoRA and the Fourier and cosine forms <= half of PEFT's excess over it.

The frozen limit is the bare model's forward pass and the backward pass to its inputs. A form's *bound* is
``1 + extra / frozen``: the multiply-adds its mathematics adds (:func:`extra_macs`: forward, gradient of the input, of what
trains) over those of the limit, counted by torch. *counted* is the same for the products that our step really ran. A step is
forward, backward and AdamW, dropout off, all linear layers adapted. CPU seconds of one thread, all variants in turn, medians
and quartiles. Memory is the peak resident set of the second step in a process of its own, over the limit's. Injection is
attaching alone. The file is what is saved after three steps; drift is the largest change of the output by merging then, over
the largest output.

    python bench/forms.py --json bench/results/forms.json --figure docs/figures/forms.png
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rankloom
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
from rankloom.adapters import FactoredAdapter
from rankloom.kernels import contraction, contraction_macs
from step_overhead import LINEARS
from step_overhead import build as llama

BERT_LINEARS = ["query", "key", "value", "dense"]
LIMIT = "limit"


@dataclass(frozen=True)
class Form:
    """A row of the methods table with its sizes, and PEFT's configuration of the same form."""

    row: str
    changes: tuple[tuple[str, Any], ...] = ()
    peft: tuple[str, tuple[tuple[str, Any], ...]] | None = None
    most: float | None = None
    """Of the step's ratio to the limit."""
    decoders: bool = False
    """Sits on decoder layers, which the encoder does not have."""


RANK = (("adapter.rank", 16), ("adapter.alpha", 32.0))
LORA = (("r", 16), ("lora_alpha", 32))
CHEAP = 1.10
FORMS = {
    "lora": Form("lora", RANK, ("LoraConfig", LORA)),
    "dora": Form("dora", RANK, ("LoraConfig", (*LORA, ("use_dora", True)))),
    "pissa": Form("pissa", RANK),
    "pissa, folded": Form("pissa", (*RANK, ("adapter.fold", True))),
    "lora-fa": Form("lora-fa", RANK),
    "lora-xs": Form("lora-xs", RANK, most=CHEAP),
    "svfit": Form("svfit", (("adapter.rank", 16),), most=CHEAP),
    "svf": Form("svf"),
    "loldu": Form("loldu", RANK, most=CHEAP),
    "cora": Form("cora", RANK, most=CHEAP),
    "sbora-fa": Form("sbora-fa", RANK, most=CHEAP),
    "sbora-fb": Form("sbora-fb", RANK, most=CHEAP),
    "lamda": Form("lamda", RANK, most=CHEAP),
    "salt": Form("salt", most=CHEAP),
    "hydra": Form("hydra", (("adapter.rank", 8), ("adapter.alpha", 8.0)), most=CHEAP),
    "miss": Form("miss", (("adapter.rank", 64),), ("MissConfig", (("r", 64),)), most=CHEAP),
    "vera": Form("vera", (("adapter.rank", 256),), ("VeraConfig", (("r", 256),))),
    "nola": Form("nola"),
    "randlora": Form("randlora", (("adapter.rank", 32),), ("RandLoraConfig", (("r", 32), ("randlora_alpha", 640)))),
    "flylora": Form("flylora"),
    "fourierft": Form("fourierft", (), ("FourierFTConfig", (("n_frequency", 1000),))),
    "loca": Form("loca"),
    "bat": Form("bat", (("adapter.rank", 64),), ("MissConfig", (("r", 64), ("init_weights", "bat")))),
    "sara": Form("sara"),
    "snell": Form("snell"),
    "lokr": Form("lokr", (("adapter.rank", 16),), ("LoKrConfig", (("r", 16), ("alpha", 16))), most=1.30),
    "loha": Form("loha", (("adapter.rank", 16),), ("LoHaConfig", (("r", 16), ("alpha", 16)))),
    "soka": Form("soka", most=1.30),
    "tlora": Form("tlora"),
    "gin-attention": Form("gin-attention", decoders=True),
}


def encoder(dtype: torch.dtype) -> nn.Module:
    """MiniLM's shape without its vocabulary."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False).to(dtype).requires_grad_(False)


MODELS: dict[str, tuple[Callable[[torch.dtype], nn.Module], tuple[int, int], list[str]]] = {
    "slice": (lambda dtype: llama(4, dtype), (4, 256), LINEARS),
    "encoder": (encoder, (16, 64), BERT_LINEARS),
}
"""The model, sequences x tokens, and PEFT's names of its linear layers."""


def some_ids(model: nn.Module, tokens: tuple[int, int]) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, tokens, generator=torch.Generator().manual_seed(0))


def loss_of(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """A language model's loss, or the mean square of an encoder's states."""
    out = model(**inputs)
    return out.loss if "labels" in inputs else out.last_hidden_state.float().square().mean()


def labelled(kind: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"labels": ids} if kind == "slice" else {}


def adapted(form: Form, model: nn.Module) -> rankloom.Adaptation:
    """Our adaptation, the sizes as the bench has them."""
    return rankloom.adapt(model, rankloom.methods.get(form.row).with_(dict(form.changes)))


def theirs(form: Form, model: nn.Module, linears: list[str]) -> nn.Module:
    """PEFT's model."""
    import peft

    assert form.peft is not None
    kind, settings = form.peft
    config = getattr(peft, kind)(target_modules=linears, **dict(settings))
    return peft.get_peft_model(model, config)


def step_of(variant: str, kind: str, model: nn.Module, ids: torch.Tensor) -> Callable[[], Any]:
    """A callable that runs one step of a variant: ``limit``, a form, or ``peft`` and a form."""
    own = labelled(kind, ids)
    if variant == LIMIT:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()

        def limit() -> None:
            loss_of(model, inputs_embeds=embeds, **own).backward()
            embeds.grad = None

        return limit
    name = variant.removeprefix("peft ")
    if name == variant:
        target, optimizer = model, adapted(FORMS[name], model).optimizer(1e-4, total_steps=1000)
    else:
        target = theirs(FORMS[name], model, MODELS[kind][2]).train()
        optimizer = torch.optim.AdamW([p for p in target.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        loss_of(target, input_ids=ids, **own).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def extra_macs(adapter: Any, out: int, into: int, tokens: int, length: int) -> float:
    """Multiply-adds that a form's mathematics adds to a step of one frozen linear layer (out, in).

    Two factors of rank k: ``k (out + in)`` a token forward, the gradient of the input the same again, and ``k`` times its other
    side for each factor that takes a gradient. A formed update: the weight's gradient, ``out in`` a token, and what forming it
    takes, three times (forward, again in the backward pass, its gradient). Forms with several ways are counted by the cheapest.
    What factors themselves are made of is not counted: it does not grow with the tokens. A graph over ``length`` tokens: the
    probabilities of the earlier half twice, messages along it forward and back.
    """

    def factored(rank: int, left: bool = True, right: bool = True) -> float:
        return tokens * rank * (2 * (out + into) + out * left + into * right)

    def formed(entry: float) -> float:
        return out * into * (tokens + 3 * entry)

    def kronecker() -> float:
        terms = adapter.terms()
        macs = contraction_macs(contraction(terms, tokens), into)
        return min(3.0 * tokens * macs, 1.0 * out * into * (tokens + 4 * len(terms.left)))

    def low_rank() -> float:
        b, a = adapter.sides() if getattr(adapter, "fold", False) else adapter.effective()
        trained = b.requires_grad + a.requires_grad
        whole = out * into * (tokens * (trained > 0) + len(a) * (2.0 + trained))
        return min(factored(len(a), b.requires_grad, a.requires_grad), whole)

    def ring() -> float:
        sizes, bond, rank = adapter.sizes, adapter.bonds.shape[-1], adapter.rank**2
        inner = sum(bond * (size + 2) for size in sizes[1:-1])
        token, once = into * bond**2 * (sizes[0] + sizes[-1] + inner + 2 * bond), into**2 * (bond**2 + 1)
        row = into * (bond**2 + 1) * (into // sizes[-1] + sizes[-1])
        by_weight = out * (3.0 * min(row, into**2) + into * (4 * rank + tokens)) + once
        return min(by_weight, min(3.0 * tokens * token, 3.0 * (tokens * into**2 + once)) + factored(rank))

    def graph() -> float:
        hidden, inner = len(adapter.W_in), len(adapter.W_1)
        return tokens * (3.0 * (2 * into * hidden + 2 * hidden * inner) + length / 2 * (2 * into + 2 * hidden))

    counts: dict[str, Callable[[], float]] = {
        "DoRAAdapter": lambda: low_rank() + len(adapter.A) * out * into,
        "SelectedAdapter": lambda: 3.0 * tokens * len(adapter.index) * (out if adapter.side == "in" else into),
        "MiSSAdapter": lambda: 3.0 * tokens * adapter.rank * out,
        "HydraAdapter": lambda: factored(len(adapter.A) + len(adapter.A_s)) + 2.0 * len(adapter.A_s) * out * into,
        "FlyLoRAAdapter": lambda: factored(adapter.B.shape[1], right=False),
        "LoKrAdapter": kronecker,
        "SoKAAdapter": kronecker,
        "LoHaAdapter": lambda: min(factored(adapter.rank**2), formed(2 * adapter.rank)),
        "LoCAAdapter": lambda: min(low_rank(), formed(1)),
        "TLoRAAdapter": ring,
        "BATAdapter": lambda: formed(adapter.rank),
        "SaRAAdapter": lambda: formed(0),
        "SNELLAdapter": lambda: formed(4 / 3 * len(adapter.Q) * adapter.Q.shape[2]),
        "RandLoRAAdapter": lambda: formed(min(out, into)),
        "FourierFTAdapter": lambda: formed(1),
        "GINAttentionAdapter": graph,
    }
    name = type(adapter).__name__
    if name in counts:
        return counts[name]()
    if isinstance(adapter, FactoredAdapter):
        return low_rank()
    raise SystemExit(f"how many multiply-adds does {name} take? say so in extra_macs")


def counted_macs(step: Callable[[], Any]) -> float:
    """Multiply-adds of a step's matrix products, as torch counts them."""

    def in_place(_: Any, left: tuple[int, int], right: tuple[int, int], **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        step()
    return counter.get_total_flops() / 2


def times(kind: str, dtype: torch.dtype, forms: list[str], repeats: int) -> list[dict[str, Any]]:
    """Steps of every form and PEFT's, in turn, with bounds and what else is cheap to know."""
    make, tokens, _ = MODELS[kind]
    base = make(dtype)
    ids = some_ids(base, tokens)
    variants = [LIMIT, *(v for name in forms for v in (name, f"peft {name}") if v == name or FORMS[name].peft)]
    steps = {variant: step_of(variant, kind, copy.deepcopy(base), ids) for variant in variants}
    measured = ratios(interleaved(steps, repeats), LIMIT)
    frozen = counted_macs(steps[LIMIT])
    rows = []
    for name in forms:
        handle = adapted(FORMS[name], copy.deepcopy(base))
        extra = sum(extra_macs(b.adapter, *b.target.shape, ids.numel(), ids.shape[1]) for b in handle.bindings)
        own, peer = measured[name], measured.get(f"peft {name}")
        row = {"form": name, "trains": sum(p.numel() for p in handle.parameters()), **own}
        row |= {"bound": 1 + extra / frozen, "counted": counted_macs(steps[name]) / frozen}
        row |= {"of_bound": own["ratio"] / row["bound"]}
        if peer is not None:
            row |= {"peft_ratio": peer["ratio"], "of_peft": own["seconds"] / peer["seconds"], "peft": peer}
        if FORMS[name].most is not None:
            row |= {"limit": FORMS[name].most, "met": own["ratio"] <= FORMS[name].most}
        rows.append(row)
    return rows


def injected(kind: str, forms: list[str], repeats: int = 3) -> list[dict[str, Any]]:
    """Seconds to attach, bytes of the saved adapter, and the drift of merging, float32; beside PEFT's."""
    make, tokens, linears = MODELS[kind]
    base = make(torch.float32)
    ids, rows = some_ids(base, tokens), []
    for name in forms:
        form, seconds = FORMS[name], {"ours": [], "peft": []}
        for _ in range(repeats):
            for who in ("ours", "peft") if form.peft else ("ours",):
                model = copy.deepcopy(base)
                begin = time.process_time()
                made = adapted(form, model) if who == "ours" else theirs(form, model, linears)
                seconds[who].append(time.process_time() - begin)
                if who == "ours":
                    handle = made
                else:
                    peer = made
        row = {"form": name, "inject_s": statistics.median(seconds["ours"])}
        if form.peft:
            row["peft_inject_s"] = statistics.median(seconds["peft"])
        optimizer = handle.optimizer(1e-3, total_steps=1000)
        for _ in range(3):
            loss_of(handle.model, input_ids=ids, **labelled(kind, ids)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with tempfile.TemporaryDirectory() as folder:
            handle.save(Path(folder) / "ours")
            row["file_bytes"] = (Path(folder) / "ours" / "adapter.safetensors").stat().st_size
            if form.peft:
                peer.save_pretrained(Path(folder) / "peft")
                row["peft_file_bytes"] = (Path(folder) / "peft" / "adapter_model.safetensors").stat().st_size
        if all(b.adapter.mergeable for b in handle.bindings):
            with torch.no_grad():
                before = handle.model(input_ids=ids)[0]
                handle.merge({"input_ids": ids})
                row["drift"] = float((handle.model(input_ids=ids)[0] - before).abs().max() / before.abs().max())
        rows.append(row)
    return rows


def child(variant: str, kind: str, dtype: str) -> None:
    """Measure one variant's peak memory in this process and print it."""
    import peft  # noqa: F401 - every process imports the same, so that imports cancel

    make, tokens, _ = MODELS[kind]
    model = make(getattr(torch, dtype))
    step = step_of(variant, kind, model, some_ids(model, tokens))
    step()
    reset_peak()
    step()
    print(json.dumps({"peak_mb": peak_mb()}))


def memory(kind: str, dtype: str, forms: list[str]) -> list[dict[str, Any]]:
    """Peak memory of every form and PEFT's over the limit's, a process each; the limit's is a median of five."""

    def peak(variant: str) -> float:
        command = [sys.executable, __file__, "--child", variant, "--models", kind, "--dtype", dtype]
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=plain_environment())
        return float(json.loads(out.stdout.strip().splitlines()[-1])["peak_mb"])

    limit, rows = statistics.median(peak(LIMIT) for _ in range(5)), []
    for name in forms:
        row = {"form": name, "over_limit_mb": peak(name) - limit}
        if FORMS[name].peft:
            row["peft_over_limit_mb"] = peak(f"peft {name}") - limit
        rows.append(row)
    return rows


def draw(result: dict[str, Any], path: str) -> None:
    """Trained parameters against the step's ratio to the limit, ours and PEFT's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    part = next(iter(result["time"].values()))["rows"]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for row in part:
        axes.plot(row["trains"], row["ratio"], "o", color="C0")
        axes.annotate(row["form"], (row["trains"], row["ratio"]), fontsize=7, xytext=(3, 3), textcoords="offset points")
        if "peft_ratio" in row:
            axes.plot([row["trains"]] * 2, [row["ratio"], row["peft_ratio"]], color="0.8", zorder=0)
            axes.plot(row["trains"], row["peft_ratio"], "x", color="C3")
    axes.set(xscale="log", xlabel="trained parameters", ylabel="step over the frozen limit (o rankloom, x PEFT)")
    figure.savefig(path, dpi=120)


COLUMNS = ["form", "trains", "seconds", "ratio", "ratio_low", "ratio_high", "bound", "of_bound", "counted"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the result here; forms and parts not measured now keep what they had")
    parser.add_argument("--figure", help="draw parameters against time here")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--parts", nargs="+", default=["time", "memory", "rest"], choices=["time", "memory", "rest"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.child:
        child(args.child, args.models[0], args.dtype[0])
        return
    steady_memory()
    result: dict[str, Any] = {"time": {}, "memory": {}, "rest": {}, **earlier(args.json)}

    def keep(part: str, name: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
        old = [row for row in result[part].get(name, {}).get("rows", []) if row["form"] not in args.forms]
        result[part][name] = {"provenance": provenance(), "rows": old + rows}
        print(f"\n{part}: {name}")
        table(rows, columns)
        write(args.json, result)

    for kind in args.models:
        forms = [name for name in args.forms if kind == "slice" or not FORMS[name].decoders]
        if left_out := sorted(set(args.forms) - set(forms)):
            print(f"{kind}: no decoder layers for {', '.join(left_out)}")
        for dtype in args.dtype if "time" in args.parts else ():
            rows = times(kind, getattr(torch, dtype), forms, args.repeats)
            keep("time", f"{kind} {dtype}", rows, [*COLUMNS, "peft_ratio", "of_peft", "limit"])
        if "memory" in args.parts:
            rows = memory(kind, "float32", forms)
            keep("memory", f"{kind} float32", rows, ["form", "over_limit_mb", "peft_over_limit_mb"])
        if "rest" in args.parts:
            rest = ["form", "inject_s", "peft_inject_s", "file_bytes", "peft_file_bytes", "drift"]
            keep("rest", f"{kind} float32", injected(kind, forms), rest)
    if args.figure:
        draw(result, args.figure)


if __name__ == "__main__":
    main()
