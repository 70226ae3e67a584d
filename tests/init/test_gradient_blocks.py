"""LoRA-GA's start (2407.05000): the card's invariants in float64, and where PEFT's variant parts ways."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from rankloom import Calibration, Recipe, Targets, adapt
from rankloom.adapters import LoRA
from rankloom.calibration import exact_gradients
from rankloom.errors import RecipeError
from rankloom.init import GradientBlocks
from rankloom.init.gradient_blocks import block_indices
from rankloom.targets import find_targets
from tests import zoo

RANK, ALPHA = 3, 16.0
MODULES = ("q_proj", "o_proj", "up_proj", "down_proj")


def started(kind: str = "llama", modules: Any = MODULES, scale_loss: float = 1.0, **init: Any) -> Any:
    init = {"method": "exact", **init}
    recipe = Recipe(
        targets=Targets(modules),
        adapter=LoRA(rank=RANK, alpha=ALPHA, scaling="rslora"),
        init=GradientBlocks(**init),
    )
    data = Calibration(zoo.batches(kind), lambda m, b: (scale_loss * m(**b).loss, 1.0))
    return adapt(zoo.build(kind), recipe, data)


def gradients(kind: str, modules: Any = MODULES) -> dict[str, Tensor]:
    model = zoo.build(kind)
    return exact_gradients(
        model, find_targets(model, Targets(modules)), Calibration(zoo.batches(kind), lambda m, b: (m(**b).loss, 1.0))
    )[0]


def best(g: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("method", ["exact", "sketch"])
@pytest.mark.parametrize("blocks", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize(("kind", "modules"), [("llama", MODULES), ("gpt2", ("c_attn", "c_fc"))])
def test_the_first_step_is_the_best_rank_2r_step(kind: str, modules: Any, blocks: str, method: str) -> None:
    """Invariants 2, 3, 6: ``B0 B0^T G + G A0^T A0 = c^2 G_2r``, orthonormal up to ``c``, no cross block, step 0 exact."""
    handle = started(kind, modules, blocks=blocks, method=method, oversample=64)
    for b in handle.bindings:
        g, a, up = gradients(kind, modules)[b.name], b.adapter.A.detach(), b.adapter.B.detach()
        squared = math.sqrt(b.layer.out_features) / 16.0
        eye = torch.eye(RANK, dtype=g.dtype)
        torch.testing.assert_close(a @ a.T, squared * eye, rtol=0, atol=1e-11)
        torch.testing.assert_close(up.T @ up, squared * eye, rtol=0, atol=1e-11)
        step, want = up @ (up.T @ g) + (g @ a.T) @ a, squared * best(g, 2 * RANK)
        assert float((step - want).norm() / want.norm()) < 1e-8, b.name
        assert float((up.T @ g @ a.T).norm() / g.norm()) < 1e-8
        assert not b.adapter.delta(b.layer).any()


def test_the_real_first_step_follows() -> None:
    """SGD on the adapter moves the weight by ``-lr s^2 c^2 G_2r`` up to the next order."""
    handle = started()
    batches, lr = zoo.batches("llama"), 1e-6
    want = gradients("llama")
    for batch in batches:
        (handle.model(**batch).loss / len(batches)).backward()
    with torch.no_grad():
        for p in handle.parameters():
            p -= lr * p.grad
    for b in handle.bindings:
        squared = math.sqrt(b.layer.out_features) / 16.0
        move = -lr * b.adapter.scale**2 * squared * best(want[b.name], 2 * RANK)
        moved = b.adapter.delta(b.layer).detach()
        assert float((moved - move).norm() / move.norm()) < 1e-3, b.name


@pytest.mark.parametrize("scale", ["stable", "gd", "unit", "weight"])
def test_scales(scale: str) -> None:
    for b in started(scale=scale).bindings:
        s = torch.linalg.svdvals(b.layer.weight())[:RANK]
        c = {
            "stable": b.layer.out_features**0.25 / 4,
            "gd": 1 / b.adapter.scale,
            "unit": 1.0,
            "weight": float((s / b.adapter.scale).sqrt().mean()),
        }[scale]
        for factor in (b.adapter.A, b.adapter.B.T):
            torch.testing.assert_close(
                factor.norm(dim=1), torch.full((RANK,), c, dtype=factor.dtype), rtol=1e-9, atol=0
            )


def test_the_losss_scale_and_sign_do_not_matter() -> None:
    """Invariant 4, unlike PEFT's variant."""
    first = {n: t.clone() for n, t in started().state_dict().items()}
    for scale in (1e-3, 4096.0):
        for name, tensor in started(scale_loss=scale).state_dict().items():
            torch.testing.assert_close(tensor, first[name], rtol=1e-8, atol=1e-10)


def test_blocks_by_hand() -> None:
    def of(*settings: Any) -> tuple[list[int], list[int]]:
        a, b = block_indices(*settings)
        return a.tolist(), b.tolist()

    assert of("ArB2r", 2, 9) == ([0, 1], [2, 3])
    assert of("A2rBr", 2, 9) == ([2, 3], [0, 1])
    assert of("ArBr", 2, 9) == ([1, 3], [0, 2])
    assert of("ArB2r", 3, 4) == ([0, 1, 2], [1, 2, 3]) and of("ArBr", 3, 4) == ([0, 1, 2], [1, 2, 3])
    a, b = of("random", 3, 9, torch.Generator().manual_seed(0))
    assert a == b and len(set(a)) == 3 and max(a) < 6


def test_peft_scales_one_factor_by_the_gradient() -> None:
    """PEFT 0.21 has A unscaled and B times the singular values: not the authors', and not free of the loss's scale."""
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.loraga import preprocess_loraga

    modules, batches = ["q_proj", "up_proj"], zoo.batches("llama")

    def theirs(loss_scale: float, direction: str) -> dict[str, tuple[Tensor, Tensor]]:
        model = zoo.build("llama", dtype=torch.float32)
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            use_rslora=True,
            target_modules=modules,
            init_lora_weights="lora_ga",
            lora_ga_config=peft.LoraGAConfig(direction=direction, scale="stable", stable_gamma=16),
        )

        def step() -> None:
            for batch in batches:
                (loss_scale * model(**batch).loss).backward()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            preprocess_loraga(model, config, step)
            made = peft.get_peft_model(model, config)
        layers = {n.removeprefix("base_model.model."): m for n, m in made.named_modules() if hasattr(m, "lora_A")}
        return {
            n: (m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach()) for n, m in layers.items()
        }

    truth = gradients("llama", tuple(modules))
    for direction in ("ArB2r", "A2rBr", "ArBr"):
        ours = started(modules=tuple(modules), blocks=direction)
        once, twice = theirs(1.0, direction), theirs(2.0, direction)
        for b in ours.bindings:
            (a, up), c = once[b.name], b.layer.out_features**0.25 / 4
            s = torch.linalg.svdvals(truth[b.name])[: 2 * RANK]
            own = {"ArB2r": s[RANK:], "A2rBr": s[:RANK], "ArBr": s[0::2]}[direction].float()
            # The same directions, up to sign ...
            cosine = torch.nn.functional.cosine_similarity(a, b.adapter.A.float()).abs()
            assert cosine.min() > 1 - 1e-4, (direction, b.name, cosine)
            cosine = torch.nn.functional.cosine_similarity(up.T, b.adapter.B.T.float()).abs()
            assert cosine.min() > 1 - 1e-4, (direction, b.name, cosine)
            # ... and the documented difference in length.
            torch.testing.assert_close(a.norm(dim=1), torch.ones(RANK), rtol=1e-4, atol=0)
            torch.testing.assert_close(up.norm(dim=0), c * own, rtol=1e-3, atol=0)
            torch.testing.assert_close(twice[b.name][1].norm(dim=0), 2 * up.norm(dim=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("settings", "message"), [({"gamma": 0.0}, "gamma"), ({"passes": 1}, "passes")])
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GradientBlocks(**settings).check()
