"""The programs of ``examples/theory`` at small sizes: each shows what its title and the theorem behind it say."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import condition_number
import gradient_flow
import one_step_recovery
import start_floors
import subspace_alignment
from linear_model import SINGULAR, errors, lora_ga_start, problem
from rankloom.linalg import truncated_svd

FOLDER = Path(__file__).parents[2] / "examples" / "theory"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("figure", "linear_model"))


@pytest.fixture(scope="module")
def aligned() -> dict[str, Any]:
    return subspace_alignment.measure(size=60, samples=(600, 6000), steps=1500, every=25)


def test_t31_columns_of_b_never_leave_the_top_subspace(aligned: dict[str, Any]) -> None:
    """T3.1: from LoRA's start, for every step and with any samples."""
    for found in [*aligned["by_std"].values(), *aligned["by_samples"].values()]:
        assert max(found["B"][1:]) < 1e-11


def test_t32_small_starts_align_the_rows_of_a(aligned: dict[str, Any]) -> None:
    """T3.2: the better the smaller the start (``Sigma = I``)."""
    best = [min(found["A"]) for found in aligned["by_std"].values()]
    assert best[0] > 0.5 and best[1] < 0.01 and best[2] < 1e-3


def test_t32_finite_samples_floor_at_the_angle_between_n_and_delta(aligned: dict[str, Any]) -> None:
    """Training converges to ``Delta``: whatever alignment with ``N`` there was, the rows of ``A`` end on ``Delta``'s."""
    for n, found in aligned["by_samples"].items():
        floor = aligned["floors"][n]
        assert found["A"][-1] == pytest.approx(floor, rel=2e-2)
        assert 0.8 * floor < min(found["A"]) <= found["A"][-1]
    few, many = aligned["floors"].values()
    assert 2 < few / many < 5  # about the square root of ten


def test_t33_one_step_recovery() -> None:
    """T3.3: ``||B0 A0 - Delta|| <= ||Sigma - I|| ||Delta||`` in operator norm at step size one; exact for ``Sigma = I``."""
    result = one_step_recovery.measure(samples=(600, 6000, 60000), steps=200)
    assert all(error <= bound for error, bound in result["found"])
    assert [bound for _, bound in result["found"]] < [0.9, 0.25, 0.08]
    assert result["isotropic"] < 1e-13 and one_step_recovery.recovery(60, 8, None)[0] < 1e-13
    assert result["lora-one"][0] < 0.2 and result["lora"][0] == 1
    assert result["lora-one"][-1] < 1e-2 * result["lora"][-1]


def test_steps_do_not_depend_on_the_condition_number_once_preconditioned() -> None:
    """Flat within 10 % over 1 ... 100, where plain descent grows about as kappa does; so too under a larger ridge."""
    kappas = (1, 3, 10, 30, 100)
    result = condition_number.measure(kappas)
    plain, scaled = result["plain"], result["preconditioned"]
    assert plain == sorted(plain) and plain[0] < 60 and plain[-1] > 20 * plain[0]
    for smaller, larger, step in zip(plain[1:], plain[2:], (10 / 3, 3, 10 / 3), strict=False):
        assert 0.4 * step < larger / smaller < 2 * step
    assert max(scaled) < 40 and max(scaled) <= 1.1 * min(scaled)
    ridged = [condition_number.steps_to(k, preconditioned=True, ridge=1e-3) for k in kappas[:3]]
    assert max(ridged) <= 1.1 * min(ridged)
    with pytest.raises(RuntimeError, match="after 5 steps"):
        condition_number.steps_to(100, preconditioned=False, most=5)


def test_fig4_one_step_reaches_the_minimum_where_lora_ga_and_lora_sb_floor() -> None:
    """Floors are facts of the parameterisation: both optimizers end on them, and they are computed without training."""
    result = start_floors.measure(steps=900)
    curves, floors = result["curves"], result["floors"]
    assert curves["LoRA-One"][-1] < 1e-10 and curves["LoRA-One, preconditioned"][-1] < 1e-10
    assert curves["LoRA"][-1] < 1e-3  # slow, not stuck
    for name in ("LoRA-GA", "LoRA-GA, preconditioned", "LoRA-SB", "LoRA-SB, raw gradient"):
        floor = floors[name.removesuffix(", preconditioned")]
        assert floor > 0.1 and curves[name][-1] == pytest.approx(floor, rel=1e-6), name


def test_an_offset_alone_does_no_harm() -> None:
    """Orthonormal factors of one and the same subspace reach the minimum even with the offset subtracted."""
    model = problem(100, SINGULAR, samples=1600)
    u, _, v = truncated_svd(model.negative, 8)
    b, a = u / 2, v.T / 2
    assert errors(model, b, a, lr=0.4, steps=2500, offset=b @ a, tolerance=1e-11, preconditioned=True)[-1] <= 1e-11
    assert start_floors.offset_floor(model, b, a) < 1e-11 < start_floors.offset_floor(model, *lora_ga_start(model, 8))


@pytest.fixture(scope="module")
def flow() -> dict[str, Any]:
    return gradient_flow.measure(size=12, seeds=2, alphas=(1e-1, 1e-2, 1e-3), two_layer_steps=4000)


def test_modes_follow_the_logistic_closed_form(flow: dict[str, Any]) -> None:
    """Up to the discretisation, which is linear in the step size; the vectors do not turn, balancedness holds."""
    followed = flow["modes"]
    assert followed["turned"] < 1e-8 and followed["drift"] < 1e-12
    finer = gradient_flow.modes(12, 1e-4, 0.005, horizon=40.0)
    assert followed["deviation"] < 0.02
    assert followed["deviation"] / finer["deviation"] == pytest.approx(2, rel=0.05)
    assert torch.allclose(followed["measured"][-1], SINGULAR, atol=1e-3)


def test_saturation_takes_log_one_over_alpha(flow: dict[str, Any]) -> None:
    assert flow["saturation"]["slope"] == pytest.approx(flow["saturation"]["expected"], rel=0.1)


def test_descent_drifts_from_balance_in_proportion_to_its_step(flow: dict[str, Any]) -> None:
    coarse, middle, fine = flow["drift"].values()
    assert coarse / middle == pytest.approx(2, rel=0.1) and middle / fine == pytest.approx(2, rel=0.1)


def test_alignment_at_a_fixed_loss_improves_with_smaller_starts() -> None:
    """Sigma = I: when the top mode is half learnt, the stacked factors point the closer along it the smaller the start."""
    u, s, v = torch.linalg.svd(problem(12, SINGULAR, None).delta)
    top = torch.cat([u[:, 0], v[0]]) / math.sqrt(2)
    gaps = []
    for alpha in (1e-1, 1e-2, 1e-3, 1e-4):
        for b, a in gradient_flow.random_start(12, 4, alpha, eta=0.01):
            if float(torch.linalg.matrix_norm(b @ a, 2)) >= float(s[0]) / 2:
                stacked = torch.linalg.svd(torch.cat([b, a.T])).U[:, 0]
                gaps.append(1 - float((stacked @ top).abs()))
                break
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.05 * gaps[0]


def test_misalignment_decides_what_small_starts_bring(flow: dict[str, Any]) -> None:
    losses = flow["two_layers"]
    aligned = losses["aligned"]
    assert aligned == sorted(aligned, reverse=True) and aligned[-1] < 1e-3 * aligned[0]
    assert max(losses["aligned, spectral"]) < 1e-25
    assert losses["misaligned"][-1] > losses["misaligned"][0]  # a smaller start is only later at a fixed time
    assert min(losses["misaligned, spectral"]) > 1e-2  # the naive spectral start stalls: not what the paper proposes


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_draws_what_it_measured(name: str, tmp_path: Path, aligned: Any, flow: Any) -> None:
    made = {"subspace_alignment": lambda: aligned, "gradient_flow": lambda: flow}
    program = importlib.import_module(name)
    small = {"one_step_recovery": {"steps": 20, "samples": (200, 600)}, "start_floors": {"size": 30, "steps": 20},
             "condition_number": {"kappas": (1, 2)}}  # fmt: skip
    result = made[name]() if name in made else program.measure(**small[name])
    assert all(isinstance(line, str) for line in program.lines(result))
    program.draw(result).savefig(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 5000
    assert (FOLDER.parents[1] / "docs" / "figures" / f"{name}.svg").is_file()


def test_a_program_from_the_command_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / "condition_number.py", "--out", tmp_path], capture_output=True, text=True, check=True
    )
    assert "kappa" in done.stdout and (tmp_path / "condition_number.svg").is_file()
