"""Which adapter form learns best at an equal number of trained parameters?

One real task on a real model for each modality, budgets of trained parameters that are LoRA's at rank 8, at rank 1, and a
quarter of that, where LoRA adapts fewer layers (:data:`FEWER`), and for every form the size (rank, coefficients, blocks ...)
that comes nearest to the budget; a form that cannot come within a fifth of it is left out of that budget, and the result says
so. ``alpha`` keeps its proportion to the rank.

Forms want learning rates that are decades apart, and nobody's grid is fair to all. So each rate is searched blindly: six
complete runs a form, at 1e-4, 1e-3 and 1e-2 first, then three times at the untried rate of the ladder (two a decade, 1e-6 to
0.3) nearest to the best. Then fresh seeds at the best; intervals and everything else as in ``gradient_informed.py``,
differences to LoRA paired by seed. Ties are ties.

    python bench/form_quality.py --budget r8 --json bench/results/form_quality_r8.json
    python bench/form_quality.py --budget r1 --json bench/results/form_quality_r1.json
    python bench/form_quality.py --budget quarter --json bench/results/form_quality_quarter.json
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import rankloom
from fine_tuning import TASKS, Bench, Method
from rankloom.errors import RankloomError
from rankloom.targets import Target, find_targets
from search import Climb
from study import Study

NEAR = 0.2
"""How far from the budget a form may stay, as a share of it."""
BUDGETS = {"r8": 8.0, "r1": 1.0, "quarter": 0.25}
"""LoRA's rank that sets the number of trained parameters."""
FEWER = {
    "minilm": ("query", "value"),
    "language": ("q_proj", "v_proj"),
    "label-word": ("q_proj", "v_proj"),
    "digits": ("*._blocks.1[2-5]._project_conv",),
}
"""What LoRA adapts, at rank 1, where rank 1 on everything is too much."""
LARGEST = 1 << 14
MOST = {"vera": 1024}
"""Of a size, where more only costs: VeRA's products grow with a rank far beyond any weight's."""

Changes = dict[str, Any]
"""To a row of the table."""


def sized(setting: str, **kept: str) -> Callable[[str, int], Changes]:
    """The setting at some size, and others in the row's own proportion to it."""

    def changes(row: str, size: int) -> Changes:
        adapter = rankloom.methods.get(row).adapter
        share = {other: getattr(adapter, other) / getattr(adapter, setting) for other in kept.values()}
        # Counts stay counts: an `active` of FlyLoRA is a number of experts.
        scaled = {o: type(getattr(adapter, o))(max(1, round(size * s))) for o, s in share.items()}
        return {f"adapter.{name}": value for name, value in ({setting: size} | scaled).items()}

    return changes


RANK, RANK_ALPHA = sized("rank"), sized("rank", alpha="alpha")
SIZES: dict[str, Callable[[str, int], Changes]] = {
    "lora": RANK_ALPHA,
    "dora": RANK_ALPHA,
    "lora-fa": RANK_ALPHA,
    "lora-xs": RANK_ALPHA,
    "cora": RANK_ALPHA,
    "sbora-fa": RANK_ALPHA,
    "sbora-fb": RANK_ALPHA,
    "lamda": RANK_ALPHA,
    "hydra": RANK_ALPHA,
    "salt": sized("lora_rank"),
    "svfit": RANK,
    "loldu": RANK_ALPHA,
    "vera": RANK,
    "nola": sized("bases"),
    "randlora": RANK,
    "flylora": sized("rank", alpha="alpha", active="active"),
    "fourierft": sized("coefficients"),
    "loca": sized("coefficients"),
    "miss": RANK,
    "bat": RANK,
    "sara": lambda row, size: {"adapter.fraction": size / LARGEST},
    "snell": sized("dim"),
    "snella": sized("dim"),
    "lokr": RANK_ALPHA,
    "loha": RANK_ALPHA,
    "soka": RANK,
    "tlora": RANK,
}
"""What of a form decides how much it trains."""


@cache
def targets_of(task: str) -> tuple[Target, ...]:
    """The adapted layers of a task's model: a new head is trained beside the form, and counts for none."""
    prepared, modules = Bench(task, None).prepared, TASKS[task].modules
    chosen = rankloom.Targets(exclude=prepared.loaded.new) if modules is None else rankloom.Targets(modules)
    return tuple(find_targets(prepared.model, chosen))


def count(row: str, size: int, targets: tuple[Target, ...]) -> int:
    """What a form of this size trains; -1 where it cannot be that large."""
    try:
        recipe = rankloom.methods.get(row).with_(SIZES[row](row, size))
        recipe.adapter.check()
        recipe.adapter.check_on(list(targets))
        alike = Counter(target.shape for target in targets)
        one = {target.shape: target for target in targets}
        return sum(n * sum(p.numel() for p in recipe.adapter.build(one[s]).parameters()) for s, n in alike.items())
    except RankloomError:
        return -1


def nearest(row: str, budget: int, targets: tuple[Target, ...]) -> int | None:
    """The size whose count is nearest to the budget; None where none is near. Counts grow with the size, or fall."""
    tried = {size: count(row, size, targets) for size in (1, 2, 4)}
    rising = tried[4] >= tried[1]
    low, high = 1, 4
    while tried[high] != -1 and (tried[high] < budget) is rising and high < MOST.get(row, LARGEST):
        low, high = high, 2 * high
        tried[high] = count(row, high, targets)
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = count(row, middle, targets)
        below = tried[middle] != -1 and (tried[middle] < budget) is rising
        low, high = (middle, high) if below else (low, middle)
    found = min((s for s in tried if tried[s] > 0), key=lambda s: abs(tried[s] - budget), default=None)
    return None if found is None or abs(tried[found] - budget) > NEAR * budget else found


def methods(task: str, budget: str) -> dict[str, Method]:
    """Every form at the size that the budget allows."""
    targets = targets_of(task)
    want = round(BUDGETS[budget] * sum(sum(t.shape) for t in targets))
    sizes = {row: nearest(row, want, targets) for row in SIZES}
    left_out = [row for row, size in sizes.items() if size is None]
    print(f"{task}, {want:,} parameters: {sizes}" + (f"; no size near it: {left_out}" if left_out else ""), flush=True)
    changes = {row: SIZES[row](row, size) for row, size in sizes.items() if size is not None}
    if "lora" not in changes and task in FEWER:
        changes["lora"] = RANK_ALPHA("lora", 1) | {"targets.modules": FEWER[task]}
    return {row: Method(row, tuple(made.items())) for row, made in changes.items()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], add_help=False)
    parser.add_argument("--budget", choices=list(BUDGETS), default="r8")
    parser.add_argument("--task", default="minilm", choices=list(TASKS))
    args, rest = parser.parse_known_args(argv)
    name = f"form_quality_{args.budget}"
    drawn: dict[str, Any] = {"lora": "tab:gray", "dora": "tab:blue"}
    study = Study(name, __doc__.split("\n")[0], methods(args.task, args.budget), drawn, (args.task,), Climb())
    study.main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
