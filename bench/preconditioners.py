"""What preconditioned optimizers add to a LoRA step, on the shape of SmolLM2-135M.

Claim: a Riemannian step costs <= 1.03x plain LoRA's, LoRA-Pro's <= 1.06x (r=16 on all linears, 4 x 256 tokens, 30 layers).

All variants move the same adapters of one model, so forward and backward are alike and the difference is the optimizer's.
Two figures each: whole steps (forward, backward, update) of all variants in turn, as ratios to plain LoRA's with AdamW; and
the update alone, whose difference to AdamW's over plain LoRA's whole step says the same with less noise (`share`). CPU
seconds of one thread, medians, freed memory kept by the C library for all alike. The peer is PEFT's Riemannian optimizer, its
update alone, over its own model of the same shape.

    python bench/preconditioners.py --json bench/results/preconditioners.json
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch

from common import interleaved, provenance, ratios, steady_memory, table, write
from step_overhead import LINEARS, build

PLAIN = "lora (adamw)"
PEER = "peft riemannian"
SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {"kind": "adamw"},
    "lora-plus": {"kind": "lora-plus"},
    "riemannian": {"kind": "riemannian"},
    "riemannian sgd": {"kind": "riemannian", "inner": "sgd"},
    "riemannian gauss-seidel": {"kind": "riemannian", "order": "gauss-seidel"},
    "riemannian direction": {"kind": "riemannian", "acts_on": "direction", "damping": 1e-2},
    "lora-pro": {"kind": "lora-pro"},
    "lora-pro symmetric": {"kind": "lora-pro", "split": "symmetric"},
    "lora-pro full moments": {"kind": "lora-pro", "moments": "full"},
    "allora": {"kind": "allora"},
}
LR = 1e-6  # low: the weights stay where they are, whichever variant's turn it is


def steps_of(
    model: torch.nn.Module, rank: int, ids: torch.Tensor
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Per variant a whole step and its update alone, over one adaptation."""
    import rankloom

    recipe = rankloom.Recipe(adapter=rankloom.adapters.LoRA(rank=rank, alpha=2.0 * rank))
    handle = rankloom.adapt(model, recipe)
    with torch.no_grad():
        for trainable in handle.trainables():  # away from B = 0, where part of the work would be on zeros
            trainable.parameter.add_(0.01 * torch.randn_like(trainable.parameter))

    def backward() -> None:
        for parameter in handle.parameters():
            parameter.grad = None
        model(input_ids=ids, labels=ids).loss.backward()

    def pair_of(settings: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        optimizer = recipe.with_(optimizer=settings).optimizer.build(handle.trainables(), LR)

        def step() -> None:
            backward()
            optimizer.step()

        return step, optimizer.step

    backward()
    return {name: pair_of(settings) for name, settings in SETTINGS.items()}


def peer(model: torch.nn.Module, rank: int, ids: torch.Tensor) -> Callable[[], Any]:
    """PEFT's update alone."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_riemannian_optimizer

    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS))
    optimizer = create_riemannian_optimizer(wrapped, torch.optim.AdamW, lr=LR, reg=1e-6, fused=True)
    wrapped(input_ids=ids, labels=ids).loss.backward()

    def step() -> (
        None
    ):  # its preconditioner works in place: from one round to the next the gradients differ, the work does not
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--layers", type=int, nargs="+", default=[30])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    steady_memory()
    result: dict[str, Any] = {"provenance": provenance(), "rank": args.rank, "step": {}, "update": {}}
    for layers in args.layers:
        for dtype in args.dtype:
            base = build(layers, getattr(torch, dtype))
            ids = torch.randint(0, base.config.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))
            updates = {} if args.no_peer else {PEER: peer(copy.deepcopy(base), args.rank, ids)}
            both = steps_of(base, args.rank, ids)
            updates |= {name: update for name, (_, update) in both.items()}
            alone = ratios(interleaved(updates, 3 * args.repeats), PLAIN)
            whole = ratios(interleaved({name: step for name, (step, _) in both.items()}, args.repeats), PLAIN)
            share = {
                n: 1 + (a["seconds"] - alone[PLAIN]["seconds"]) / whole[PLAIN]["seconds"] for n, a in alone.items()
            }
            key = f"{layers} layers {dtype}"
            result["step"][key] = whole
            result["update"][key] = {n: {"seconds": a["seconds"], "share": share[n]} for n, a in alone.items()}
            print(f"\n{layers} layers, {dtype}, r={args.rank}: whole step and update alone, CPU seconds and ratios")
            rows = [
                {"variant": n, **whole.get(n, {}), "update": a["seconds"], "share": share[n]} for n, a in alone.items()
            ]
            table(rows, ["variant", "seconds", "ratio", "ratio_fastest", "ratio_low", "ratio_high", "update", "share"])
            write(args.json, result)


if __name__ == "__main__":
    main()
