"""CoRA's start: the basis related models share, frozen or trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import rankloom
from rankloom.errors import ArtifactError, CompositionError
from tests import zoo

MODULES = ("q_proj", "down_proj")


def adapted(method: str = "cora", references: tuple[str, ...] = (), **changes: Any) -> rankloom.Adaptation:
    settings = {"targets.modules": MODULES, "adapter.rank": 3, "init.references": references, **changes}
    return rankloom.adapt(zoo.build("llama"), rankloom.methods.get(method).with_(settings))


def files(folder: Path, *seeds: int) -> tuple[str, ...]:
    for seed in seeds:
        tensors = {name: t.contiguous() for name, t in zoo.build("llama", seed=seed).state_dict().items()}
        save_file(tensors, folder / f"{seed}.safetensors")
    return tuple(str(folder / f"{seed}.safetensors") for seed in seeds)


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.T


def test_the_basis_is_the_leading_eigenspace_of_the_models(tmp_path: Path) -> None:
    found, models = files(tmp_path, 1, 2, 3), [zoo.build("llama", seed=seed) for seed in (1, 2, 3)]
    one, other = adapted(references=found), adapted(references=found[::-1])
    for b, again in zip(one.bindings, other.bindings, strict=True):
        weights = [dict(m.named_modules())[b.name].weight.detach() for m in models]
        space = torch.linalg.eigh(sum(w @ w.T for w in weights)).eigenvectors[:, -3:]
        torch.testing.assert_close(projector(b.adapter.B), projector(space), rtol=0, atol=1e-9)
        torch.testing.assert_close(projector(again.adapter.B), projector(space), rtol=0, atol=1e-9)
        torch.testing.assert_close(b.adapter.B.T @ b.adapter.B, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-10)


def test_without_references_it_is_the_weights_own_space() -> None:
    for b in adapted().bindings:
        u = torch.linalg.svd(b.layer.weight()).U[:, :3]
        torch.testing.assert_close(projector(b.adapter.B), projector(u), rtol=0, atol=1e-9)


def test_a_step_of_sgd_is_the_full_one_projected_on_the_basis() -> None:
    """``W`` moves by ``-lr s^2 B B^T G``; the frozen form has ``r in`` parameters and leaves ``B`` alone."""
    handle = adapted(**{"adapter.alpha": 6.0})
    assert sum(p.numel() for p in handle.parameters()) == sum(3 * t.shape[1] for t in handle.targets)
    dense = zoo.build("llama")
    loss = dense(**zoo.batch("llama")).loss
    loss.backward()
    handle.model(**zoo.batch("llama")).loss.backward()
    for b in handle.bindings:
        before = b.adapter.B.clone()
        b.adapter.A.data.sub_(b.adapter.A.grad, alpha=0.1)
        want = -0.1 * b.adapter.scale**2 * projector(before) @ dense.get_submodule(b.name).weight.grad
        torch.testing.assert_close(b.adapter.delta(b.layer), want, rtol=1e-8, atol=1e-12)


def test_the_trained_variant_moves_both_factors() -> None:
    handle = adapted("cora-init")
    start = {n: t.clone() for n, t in handle.state_dict().items()}
    assert all(b.adapter.B.requires_grad and not b.adapter.A.any() for b in handle.bindings)
    zoo.train(handle, handle.optimizer(1e-2), zoo.batches("llama", 1), 3)
    assert all(not torch.equal(t, start[n]) for n, t in handle.state_dict().items())


@pytest.mark.parametrize("form", [{"core": "diagonal"}, {"core": "square"}])
def test_it_starts_forms_with_a_trained_core(form: dict[str, str]) -> None:
    handle = adapted("cora-init", **{f"adapter.{key}": value for key, value in form.items()})
    assert not any(b.adapter.delta(b.layer).any() for b in handle.bindings)
    losses = zoo.train(handle, handle.optimizer(1e-2), zoo.batches("llama", 1), 5)
    assert losses[-1] < losses[0]


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match=r"needs trained A, which adapter 'lora\(train=B\)'"):
        adapted(**{"adapter.train": "B"})
    with pytest.raises(ArtifactError, match=r"no safetensors.*init\.references"):
        adapted(references=(str(tmp_path),))
