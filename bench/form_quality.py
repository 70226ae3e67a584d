"""Which adapter form learns best at an equal number of trained parameters?

One real task on a real model for each modality, budgets of trained parameters that are LoRA's at rank 8 and at rank 1 on all
linear layers, and for every form the size (rank, coefficients, blocks ...) that comes nearest to the budget; a form that
cannot come within a fifth of it is left out of that budget, and the result says so. Search, seeds, intervals and everything
else as in ``gradient_informed.py``: four learning rates for each form, fresh seeds at the best, differences to LoRA paired by
seed. Ties are ties.

    python bench/form_quality.py --budget r8 --json bench/results/form_quality_r8.json
    python bench/form_quality.py --budget r1 --json bench/results/form_quality_r1.json
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from typing import Any

import rankloom
from fine_tuning import TASKS, Bench, Method
from rankloom.errors import RankloomError
from rankloom.targets import Target, find_targets
from study import Study

NEAR = 0.2
"""How far from the budget a form may stay, as a share of it."""
BUDGETS = {"r8": 8, "r1": 1}
"""LoRA's rank that sets the number of trained parameters."""
SIZES: dict[str, tuple[str, int]] = {
    "lora": ("adapter.rank", 0),
    "dora": ("adapter.rank", 0),
    "lora-fa": ("adapter.rank", 0),
    "lora-xs": ("adapter.rank", 1),
}
"""The setting that decides how much a form trains, and its rates' place on the ladder against LoRA's (``Method.shift``)."""


@cache
def targets_of(task: str) -> tuple[Target, ...]:
    """The adapted layers of a task's model: a new head is trained beside the form, and counts for none."""
    prepared, modules = Bench(task, None).prepared, TASKS[task].modules
    chosen = rankloom.Targets(exclude=prepared.loaded.new) if modules is None else rankloom.Targets(modules)
    return tuple(find_targets(prepared.model, chosen))


def count(row: str, setting: str, size: int, targets: tuple[Target, ...]) -> int:
    """What a form of this size trains; -1 where it cannot be that large."""
    recipe = rankloom.methods.get(row).with_({setting: size})
    try:
        recipe.adapter.check()
        recipe.adapter.check_on(list(targets))
        return sum(p.numel() for t in targets for p in recipe.adapter.build(t).parameters())
    except RankloomError:
        return -1


def nearest(row: str, setting: str, budget: int, targets: tuple[Target, ...]) -> int | None:
    """The size whose count is nearest to the budget; None where none is near. Counts grow with the size, or fall."""
    tried = {size: count(row, setting, size, targets) for size in (1, 2)}
    rising = tried[2] >= tried[1]
    low, high = 1, 2
    while tried[high] != -1 and (tried[high] < budget) is rising and high < 1 << 20:
        low, high = high, 2 * high
        tried[high] = count(row, setting, high, targets)
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = count(row, setting, middle, targets)
        below = tried[middle] != -1 and (tried[middle] < budget) is rising
        low, high = (middle, high) if below else (low, middle)
    found = min((s for s in tried if tried[s] > 0), key=lambda s: abs(tried[s] - budget), default=None)
    return None if found is None or abs(tried[found] - budget) > NEAR * budget else found


def methods(task: str, budget: str) -> dict[str, Method]:
    """Every form at the size that the budget allows."""
    targets = targets_of(task)
    want = BUDGETS[budget] * sum(sum(t.shape) for t in targets)
    sized = {row: nearest(row, setting, want, targets) for row, (setting, _) in SIZES.items()}
    left_out = [row for row, size in sized.items() if size is None]
    print(f"{task}, {want:,} parameters: {sized}" + (f"; no size near it: {left_out}" if left_out else ""), flush=True)
    return {
        row: Method(row, ((SIZES[row][0], size),), shift=SIZES[row][1])
        for row, size in sized.items()
        if size is not None
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], add_help=False)
    parser.add_argument("--budget", choices=list(BUDGETS), default="r8")
    parser.add_argument("--task", default="minilm", choices=list(TASKS))
    args, rest = parser.parse_known_args(argv)
    name = f"form_quality_{args.budget}"
    drawn: dict[str, Any] = {"lora": "tab:gray", "dora": "tab:blue"}
    study = Study(name, __doc__.split("\n")[0], methods(args.task, args.budget), drawn, (args.task,))
    study.main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
