"""LoRA-SB's start (2411.19557): the card's invariants in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rankloom import Calibration, Recipe, Targets, adapt
from rankloom.adapters import LoRA
from rankloom.errors import RecipeError
from rankloom.init import UpdateSVD
from tests import zoo

RANK, ETA = 3, 1e-3
MODULES = ("q_proj", "up_proj", "down_proj")


def started(alpha: float = 7.0, form: dict[str, Any] | None = None, **init: Any) -> Any:
    form = {"core": "square", "train": "core"} if form is None else form
    recipe = Recipe(
        targets=Targets(MODULES), adapter=LoRA(rank=RANK, alpha=alpha, **form), init=UpdateSVD(step_size=ETA, **init)
    )
    return adapt(zoo.build("llama"), recipe, Calibration(zoo.batches("llama")))


def gradients() -> dict[str, Tensor]:
    """By autograd, on all calibration data in one batch."""
    model, parts = zoo.build("llama"), zoo.batches("llama")
    model(**{k: torch.cat([p[k] for p in parts]) for k in parts[0]}).loss.backward()
    return {n: m.weight.grad for n, m in model.named_modules() if n.endswith(MODULES)}


def best(matrix: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ vh[:RANK]


@pytest.mark.parametrize(
    "form", [{"core": "square", "train": "core"}, {}, {"core": "diagonal"}, {"core": "square"}, {"train": "B"}]
)
@pytest.mark.parametrize("update", ["sign", "gradient"])
def test_the_start_is_the_best_part_of_the_update(update: str, form: dict[str, Any]) -> None:
    handle = started(form=form, update=update, oversample=64)
    for b in handle.bindings:
        g = gradients()[b.name]
        want = best(-ETA * (g.sign() if update == "sign" else g))
        got = b.adapter.delta(b.layer).detach()
        assert float((got - want).norm() / want.norm()) < 1e-8, b.name
        assert float((g * got).sum()) < 0  # downhill
        if "train" in form and form["train"] == "core":
            eye = torch.eye(RANK, dtype=g.dtype)
            torch.testing.assert_close(b.adapter.B.T @ b.adapter.B, eye, rtol=0, atol=1e-11)
            torch.testing.assert_close(b.adapter.A @ b.adapter.A.T, eye, rtol=0, atol=1e-11)


def test_only_the_core_trains() -> None:
    handle = started()
    assert {t.role for t in handle.trainables()} == {"core"}
    assert sum(p.numel() for p in handle.parameters()) == len(handle.bindings) * RANK**2
    assert handle.state_dict().keys() == {f"{b.name}.{n}" for b in handle.bindings for n in "ABR"}


def test_the_cores_gradient_is_the_projected_full_gradient() -> None:
    """``s B (dR / s^2) A = B B^T G A^T A``, the closest of all ``s B X A`` to ``G``."""
    handle = started()
    merged = zoo.merged_copy(handle, zoo.build("llama"))
    batch = zoo.batch("llama")
    merged(**batch).loss.backward()
    handle.model(**batch).loss.backward()
    for b in handle.bindings:
        a, up, s = b.adapter.A, b.adapter.B, b.adapter.scale
        g = merged.get_submodule(b.name).weight.grad
        effective = s * up @ (b.adapter.R.grad / s**2) @ a
        want = up @ up.T @ g @ a.T @ a
        torch.testing.assert_close(effective, want, rtol=1e-9, atol=1e-13)
        basis = torch.kron(s * up.contiguous(), a.T.contiguous())  # vec, row by row
        solved = torch.linalg.lstsq(basis, g.reshape(-1, 1)).solution
        torch.testing.assert_close((basis @ solved).view_as(g), effective, rtol=1e-8, atol=1e-12)


def test_the_scale_is_no_hyper_parameter() -> None:
    """Invariant 5: plain gradient descent with ``lr / s^2`` takes the same path in weight space."""
    paths = []
    for alpha in (3.0, 30.0):
        handle = started(alpha)
        scale = handle.bindings[0].adapter.scale
        for _ in range(4):
            handle.model(**zoo.batch("llama")).loss.backward()
            with torch.no_grad():
                for p in handle.parameters():
                    p -= 0.5 / scale**2 * p.grad
                    p.grad = None
        paths.append([b.adapter.delta(b.layer).detach() for b in handle.bindings])
    for one, other in zip(*paths, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_targets_take_turns_within_the_memory() -> None:
    """One gradient at a time gives what all at once give, in as many passes."""
    together, apart = started(), started(memory=1e-9)
    assert together.report["passes"] == 1 and apart.report["passes"] == len(apart.bindings) == 6
    for name, tensor in together.state_dict().items():
        torch.testing.assert_close(apart.state_dict()[name], tensor, rtol=1e-12, atol=1e-13)
    # 2 layers x (16 x 16, 24 x 16, 16 x 24) doubles: two neighbours fit into 5 KiB, three do not.
    assert started(memory=5200 / 2**30).report["passes"] == 4


def test_q_equal_r_is_not_the_best_approximation() -> None:
    """The released call, svd_lowrank(q=r), misses the best rank-r part of a sign matrix; ours does not."""
    for b in started().bindings:
        sign = -ETA * gradients()[b.name].sign()
        want = best(sign)
        u, s, v = torch.svd_lowrank(sign, q=RANK, niter=2)
        released = float(((u * s) @ v.T - want).norm() / want.norm())
        assert released > 1e-4 > 1e-9 > float((b.adapter.delta(b.layer).detach() - want).norm() / want.norm())


@pytest.mark.parametrize("settings", [{"step_size": 0.0}, {"memory": 0.0}, {"passes": 1}])
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(settings))):
        UpdateSVD(**settings).check()
