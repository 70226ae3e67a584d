"""The projected optimizer (GaLore, 2403.03507): the card's invariants, a hand-written reference, the released package."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankloom import Recipe, adapt
from rankloom.adapters import Dense, LoRA, Trainable
from rankloom.errors import CompositionError, RecipeError
from rankloom.init import OwnStart
from rankloom.optim import AdamW, Projected, ProjectedOptimizer, SVDProjector
from tests import zoo

SHAPES = [(8, 3), (3, 8), (5, 5), (12, 8)]


def randoms(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(count)]


def make(shapes: list[tuple[int, ...]], dense: bool = True) -> list[nn.Parameter]:
    return [nn.Parameter(randoms(s, 1, seed=50 + i)[0]) for i, s in enumerate(shapes)]


def build(parameters: list[nn.Parameter], lr: float = 1e-2, **settings: Any) -> ProjectedOptimizer:
    part = Projected(**{"rank": 2, "every": 4, **settings})
    return part.build(
        [Trainable(f"p{i}", p, "dense" if p.ndim == 2 else "whole", f"p{i}") for i, p in enumerate(parameters)], lr
    )


def drive(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int, seed: int = 0) -> None:
    """Steps on the gradients of a fixed random sequence."""
    sequence = [randoms(tuple(p.shape), steps, seed=seed + i) for i, p in enumerate(parameters)]
    for step in range(steps):
        for p, grads in zip(parameters, sequence, strict=True):
            p.grad = grads[step].to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


def signed_svd(g: Tensor) -> tuple[Tensor, Tensor]:
    """``U`` and ``V`` with the largest entry of each left vector positive. Signs are free, but moments that are kept over a
    refresh are coordinates in the old basis, so a trajectory depends on them: references have to follow the convention."""
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    signs = torch.stack([column[column.abs().argmax()].sign() for column in u.T])
    return u * signs, vh.T * signs


def galore_adamw(
    w: Tensor,
    grads: list[Tensor],
    *,
    rank: int,
    every: int,
    lr: float,
    scale: float,
    decay: float,
    betas=(0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    """GaLore over torch's AdamW, written out for one matrix."""
    w, m, v, basis = w.clone(), 0.0, 0.0, None
    right = w.shape[0] >= w.shape[1]
    for t, g in enumerate(grads):
        if t % every == 0:
            u, v_right = signed_svd(g)
            basis = (v_right if right else u)[:, :rank]
        r = g @ basis if right else basis.T @ g
        m = betas[0] * m + (1 - betas[0]) * r
        v = betas[1] * v + (1 - betas[1]) * r * r
        n = (m / (1 - betas[0] ** (t + 1))) / ((v / (1 - betas[1] ** (t + 1))).sqrt() + eps)
        w = (1 - lr * decay) * w - lr * scale * (n @ basis.T if right else basis @ n)
    return w


@pytest.mark.parametrize("shape", SHAPES)
def test_against_galore_written_out(shape: tuple[int, int]) -> None:
    """Invariant 5: twenty steps with refreshes and decay, to 1e-12."""
    (p,) = make([shape])
    start, grads = p.detach().clone(), randoms(shape, 20)
    optimizer = build([p], lr=0.05, every=6, scale=0.25, weight_decay=0.1)
    drive(optimizer, [p], 20)
    want = galore_adamw(start, grads, rank=2, every=6, lr=0.05, scale=0.25, decay=0.1)
    torch.testing.assert_close(p.detach(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_bases_are_orthonormal_and_best(shape: tuple[int, int]) -> None:
    """Invariant 1: Eckart-Young at the refresh."""
    (g,) = randoms(shape, 1)
    projection = SVDProjector(2).fit(g)
    basis = projection.basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    u, s, vh = torch.linalg.svd(g)
    torch.testing.assert_close(projection.up(projection.down(g)), (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-10, atol=1e-12)
    assert projection.down(g).shape == SVDProjector(2).shape(g)


def test_randomised_bases_find_a_decaying_spectrum_and_repeat() -> None:
    u, v = (torch.linalg.qr(m).Q for m in randoms((40, 40), 2))
    g = (u * 2.0 ** -torch.arange(40, dtype=torch.float64)) @ v.T
    exact = SVDProjector(4).fit(g).basis
    one, two = (SVDProjector(4, "randomized").fit(g, torch.Generator().manual_seed(1)).basis for _ in range(2))
    assert torch.equal(one, two)
    assert torch.linalg.matrix_norm(exact - one @ (one.T @ exact), 2) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_decomposed_in_float32(dtype: torch.dtype) -> None:
    (g,) = randoms((8, 5), 1)
    projection = SVDProjector(2).fit(g.to(dtype))
    assert projection.basis.dtype == torch.float32
    assert projection.down(g.to(dtype)).dtype == dtype


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_with_sgd_is_plain_sgd(shape: tuple[int, int]) -> None:
    """Invariant 2."""
    p, q = make([shape])[0], make([shape])[0]
    projected = ProjectedOptimizer(
        [p],
        [],
        lr=0.1,
        weight_decay=0.0,
        projector=SVDProjector(min(shape)),
        every=3,
        scale=0.5,
        carry="keep",
        inner=lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    )
    drive(projected, [p], 8)
    drive(torch.optim.SGD([q], lr=0.05), [q], 8)
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_updates_stay_in_the_subspace_between_refreshes() -> None:
    """Invariant 3."""
    for shape in SHAPES:
        (p,) = make([shape])
        optimizer = build([p], every=4, scale=1.0)
        grads = randoms(shape, 8)
        for step, g in enumerate(grads):
            before = p.detach().clone()
            p.grad = g
            optimizer.step()
            u, _, vh = torch.linalg.svd(grads[step - step % 4], full_matrices=False)
            moved = p.detach() - before
            right = shape[0] >= shape[1]
            outside = moved - (moved @ vh[:2].T @ vh[:2] if right else u[:, :2] @ u[:, :2].T @ moved)
            assert moved.norm() > 1e-3 and outside.norm() < 1e-13


@pytest.mark.parametrize("shape", SHAPES)
def test_state_bytes_are_the_formula_and_do_not_grow(shape: tuple[int, int]) -> None:
    """Invariant 4 and the memory table's 1, 3, 5: ``2 l r`` moments and ``s r`` basis, constant over three refreshes."""
    (p,) = make([shape])
    optimizer = build([p], every=3)
    long, short, rank = max(shape), min(shape), 2
    assert optimizer.state_bytes() == 0
    sizes = []
    for _ in range(4):
        drive(optimizer, [p], 3)
        sizes.append(optimizer.state_bytes())
        tensors = [v for s in optimizer.inner.state.values() for v in s.values() if v.ndim]
        assert sum(t.numel() for t in tensors) == 2 * long * rank
    assert set(sizes) == {8 * (2 * long * rank + short * rank)}
    lora_state = 2 * rank * sum(shape) + rank * sum(shape)
    assert 2 * long * rank + short * rank < lora_state


def test_state_bytes_count_every_parameter() -> None:
    parameters = make([(8, 3), (7,)])
    optimizer = build(parameters)
    drive(optimizer, parameters, 1)
    assert optimizer.state_bytes() == 8 * (2 * 8 * 2 + 3 * 2 + 2 * 7)


def test_other_parameters_follow_torchs_adamw_exactly() -> None:
    """Invariant 6: biases and norms, and matrices that are trained whole (embeddings) with decay."""
    shapes = [(8, 3), (7,), (6, 4)]
    ours, theirs = make(shapes), make(shapes)
    roles = ["dense", "whole", "whole"]
    optimizer = Projected(rank=2, every=4, weight_decay=0.1).build(
        [Trainable(f"p{i}", p, role, None) for i, (p, role) in enumerate(zip(ours, roles, strict=True))], 1e-2
    )
    reference = torch.optim.AdamW(
        [{"params": [theirs[1]], "weight_decay": 0.0}, {"params": [theirs[2]], "weight_decay": 0.1}], lr=1e-2
    )
    drive(optimizer, ours, 9)
    drive(reference, theirs, 9)
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
    assert not torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("carry", ["keep", "reset", "reproject"])
@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
def test_what_happens_to_the_moments_at_a_refresh(carry: str, shape: tuple[int, int]) -> None:
    """Against the moments in full space: re-projecting keeps what the new subspace can hold."""
    (p,) = make([shape])
    optimizer = build([p], every=4, carry=carry)
    drive(optimizer, [p], 4)
    slot = optimizer.slots[p]
    old = slot.projection.basis.clone()
    state = optimizer.inner.state[slot.proxy]
    m, v, steps = state["exp_avg"].clone(), state["exp_avg_sq"].clone(), float(state["step"])
    g = randoms(shape, 1, seed=99)[0]
    p.grad = g
    optimizer.step()
    new, right = slot.projection.basis, slot.projection.right
    r = g @ new if right else new.T @ g
    turn = old.T @ new
    if carry == "keep":
        m0, v0, t0 = m, v, steps
    elif carry == "reset":
        m0, v0, t0 = torch.zeros_like(m), torch.zeros_like(v), 0
    elif right:
        m0, v0, t0 = m @ turn, v @ turn**2, steps
    else:
        m0, v0, t0 = turn.T @ m, (turn**2).T @ v, steps
    torch.testing.assert_close(state["exp_avg"], 0.9 * m0 + 0.1 * r, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(state["exp_avg_sq"], 0.999 * v0 + 0.001 * r * r, rtol=1e-10, atol=1e-13)
    assert float(state["step"]) == t0 + 1
    assert (state["exp_avg_sq"] >= 0).all()
    if carry == "reproject":  # in full space: the old moment, projected on what both subspaces share
        full_old = m @ old.T if right else old @ m
        full_new = m0 @ new.T if right else new @ m0
        onto = full_old @ new @ new.T if right else new @ new.T @ full_old
        torch.testing.assert_close(full_new, onto, rtol=1e-10, atol=1e-13)


def test_reprojected_moments_point_along_the_new_gradient() -> None:
    """The card's pitfall, as a statement: with a rotating basis, kept moments are stale and re-projected ones are not."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(20, 12, generator=g, dtype=torch.float64)
    cosines = {}
    for carry in ("keep", "reproject"):
        p = nn.Parameter(torch.zeros(20, 12, dtype=torch.float64))
        optimizer = build([p], every=10, rank=6, carry=carry, scale=1.0)
        found = []
        for step in range(60):
            noise = 0.5 * torch.randn(20, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            before, p.grad = p.detach().clone(), truth + noise
            low = None
            optimizer.step()
            if step % 10 == 0 and step:
                projection = optimizer.slots[p].projection
                low = projection.up(projection.down(truth + noise))
                moved = before - p.detach()
                found.append(float((moved * low).sum() / moved.norm() / low.norm()))
        cosines[carry] = sum(found) / len(found)
    assert cosines["reproject"] > cosines["keep"] + 0.1


@pytest.mark.parametrize("micro", [1, 3])
def test_low_rank_gradients_equal_full_ones(micro: int) -> None:
    """The memory table's 7, with refreshes: accumulation in the subspace is accumulation, then projection."""
    results = []
    for low in (False, True):
        handle = adapt(zoo.build("llama"), full(low_rank_gradients=low, every=3))
        optimizer = handle.optimizer(1e-2)
        peak = []
        for _ in range(7):
            for part in zoo.batches("llama", micro):
                (handle.model(**part).loss / micro).backward()
            dense = [t.parameter for t in handle.trainables() if t.role == "dense"]
            peak.append(sum(p.grad is not None for p in dense))
            handle.step()
            assert not optimizer.compressed()
        if low:
            assert peak == [14, 0, 0, 14, 0, 0, 14]  # full gradients only where a refresh needs them
        results.append([p.detach().clone() for p in handle.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def full(**settings: Any) -> Recipe:
    return zoo.recipe_of("galore").with_(optimizer=Projected(**{"rank": 3, "every": 3, **settings}))


def test_low_rank_gradients_are_used_once() -> None:
    """Loops that clear gradients on the model, not the optimizer (transformers' does), must not see them again."""
    results = []
    for clear in ("optimizer", "model"):
        handle = adapt(zoo.build("llama"), full(low_rank_gradients=True))
        optimizer = handle.optimizer(1e-2)
        for step in range(5):
            handle.model(**zoo.batches("llama")[step % 2]).loss.backward()
            optimizer.step()
            (optimizer if clear == "optimizer" else handle.model).zero_grad()
        results.append([p.detach().clone() for p in handle.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_low_rank_gradients_that_are_not_finite_stop_the_step() -> None:
    recipe = full(low_rank_gradients=True, every=50).with_(targets={"modules": "all-linear", "train": ()})
    handle = adapt(zoo.build("llama"), recipe)
    handle.optimizer(1e-2)
    zoo.train(handle, handle._optimizer, zoo.batches("llama"), 2)
    before = [p.detach().clone() for p in handle.parameters()]
    (handle.model(**zoo.batch("llama")).loss * float("nan")).backward()
    with pytest.raises(Exception, match=r"gradient of model.layers.0.* is not finite at step 3"):
        handle.step()
    assert all(torch.equal(a, b) for a, b in zip(before, handle.parameters(), strict=True))


def test_a_second_optimizer_takes_over_from_the_first() -> None:
    handle = adapt(zoo.build("llama"), full(low_rank_gradients=True))
    first = handle.optimizer(1e-2)
    zoo.train(handle, first, zoo.batches("llama"), 2)
    second = handle.optimizer(1e-3)
    zoo.train(handle, second, zoo.batches("llama"), 2)
    assert not first.compressed()
    assert {slot.step for slot in second.slots.values()} == {2}


def test_low_rank_gradients_cannot_be_clipped() -> None:
    handle = adapt(zoo.build("llama"), full(low_rank_gradients=True))
    with pytest.raises(CompositionError, match=r"norm cannot be clipped: drop max_grad_norm"):
        handle.optimizer(1e-2, max_grad_norm=1.0)


def test_ranks_and_settings_that_do_not_fit() -> None:
    with pytest.raises(CompositionError, match=r"rank 9 is above min\(out, in\) = 8 of .*k_proj.*lower optimizer.rank"):
        full(rank=9).check(zoo.build("llama"))  # before anything is allocated
    with pytest.raises(RecipeError, match="every"):
        Projected(every=0).check()
    with pytest.raises(CompositionError, match=r"optimizer 'projected' needs dense weights, which adapter 'lora'"):
        Recipe(adapter=LoRA(), optimizer=Projected()).check()


@pytest.mark.parametrize("carry", ["keep", "reset", "reproject"])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_resume_in_the_middle_of_a_refresh_period(stop: int, carry: str) -> None:
    """Invariant 8: plain tensors only, bit for bit."""
    shapes = [(8, 3), (3, 8), (7,)]
    straight, broken, resumed = make(shapes), make(shapes), make(shapes)
    drive(build(straight, carry=carry, method="randomized"), straight, 10)

    optimizer = build(broken, carry=carry, method="randomized")
    sequence = [randoms(tuple(p.shape), 10, seed=i) for i, p in enumerate(broken)]

    def go(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            for p, grads in zip(parameters, sequence, strict=True):
                p.grad = grads[step]
            optimizer.step()

    go(optimizer, broken, range(stop))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    with torch.no_grad():
        for p, q in zip(resumed, broken, strict=True):
            p.copy_(q)
    optimizer = build(resumed, lr=1.0, carry=carry, method="randomized")  # the rate too comes from the state
    optimizer.load_state_dict(state)
    go(optimizer, resumed, range(stop, 10))
    for one, other in zip(straight, resumed, strict=True):
        assert torch.equal(one, other)


def test_a_learning_rate_scheduler_reaches_the_projected_step() -> None:
    p, q = make([(8, 3)])[0], make([(8, 3)])[0]
    optimizer = build([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    drive(optimizer, [p], 1)
    scheduler.step()
    after = p.detach().clone()
    drive(optimizer, [p], 2, seed=9)
    assert torch.equal(after, p.detach()) and not torch.equal(after, q.detach())


def released_basis(self: Any, weights: Tensor, rank: int, type: str) -> Tensor:
    """In place of the package's own decomposition: the same vectors with our signs."""
    u, v = signed_svd(weights.detach())
    return v[:, :rank].T if type == "right" else u[:, :rank]


@pytest.mark.parametrize("signs", ["ours", "theirs"])
def test_against_the_released_package(signs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """galore-torch in float32. Its AdamW is the older one: eps is not bias-corrected and decay comes after the update, so
    both are zero here; float32 sets the tolerance. With its own signs up to the second basis, with ours beyond."""
    steps = 12 if signs == "ours" else 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        galore = pytest.importorskip("galore_torch", reason="galore-torch is not installed")
        if signs == "ours":
            monkeypatch.setattr(galore.galore_projector.GaLoreProjector, "get_orthogonal_matrix", released_basis)
        shapes = [(12, 8), (8, 12), (9, 9)]
        ours = [nn.Parameter(p.detach().float()) for p in make(shapes)]
        theirs = [nn.Parameter(p.detach().clone()) for p in ours]
        group = {"params": theirs, "rank": 3, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
        reference = galore.GaLoreAdamW([group], lr=0.02, eps=0.0, weight_decay=0.0)
        drive(reference, theirs, steps)
    drive(build(ours, lr=0.02, rank=3, every=5, eps=0.0), ours, steps)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_what_differs_from_the_released_package() -> None:
    """The documented deviation: torch's AdamW decays before the update (and with the rate of the step)."""
    (p,) = make([(6, 4)])
    start, grads = p.detach().clone(), randoms((6, 4), 1)
    drive(build([p], lr=0.1, weight_decay=0.5, every=5), [p], 1)
    before = galore_adamw(start, grads, rank=2, every=5, lr=0.1, scale=0.25, decay=0.5)
    update = galore_adamw(start, grads, rank=2, every=5, lr=0.1, scale=0.25, decay=0.0) - start
    after = (1 - 0.1 * 0.5) * (start + update)
    torch.testing.assert_close(p.detach(), before, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before, after, atol=1e-4)


def test_adamw_is_torchs_with_decay_on_matrices_only() -> None:
    shapes = [(5, 4), (4,)]
    ours, theirs = make(shapes), make(shapes)
    trainables = [Trainable(f"p{i}", p, "A", None) for i, p in enumerate(ours)]
    drive(AdamW(weight_decay=0.3).build(trainables, 1e-2), ours, 5)
    groups = [{"params": theirs[:1], "weight_decay": 0.3}, {"params": theirs[1:], "weight_decay": 0.0}]
    drive(torch.optim.AdamW(groups, lr=1e-2), theirs, 5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    override = AdamW(weight_decay=0.3).build(trainables, 1e-2, weight_decay=0.0)
    assert {g["weight_decay"] for g in override.param_groups} == {0.0}


def test_full_and_galore_share_the_form() -> None:
    """Full fine-tuning is GaLore's recipe with another optimizer: no case of its own anywhere."""
    one, two = zoo.recipe_of("full"), zoo.recipe_of("galore")
    assert {s for s, part in one.parts().items() if part != two.parts()[s]} == {"optimizer"}
    assert one.adapter == Dense() and one.init == OwnStart()
