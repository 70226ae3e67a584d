"""SVFit and SVF: a diagonal core between the weight's singular vectors moves its singular values, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.errors import CompositionError, RecipeError
from rankloom.init import ActivationSVD, WeightSubspace
from tests import zoo

SHAPES = [(5, 7), (7, 5), (6, 6)]


def adapted(method: str, shape: tuple[int, int], **changes: Any) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(shape[1], shape[0], dtype=torch.float64)})
    recipe = rankloom.methods.get(method).with_({"targets.modules": ("layer",), **changes})
    return rankloom.adapt(model, recipe).bindings[0]


def moved(binding: Any, seed: int = 1) -> Tensor:
    """Set the core anywhere; the new value."""
    e = binding.adapter.E.data
    return e.copy_(torch.randn(e.shape, generator=torch.Generator().manual_seed(seed), dtype=e.dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", [False, True])
def test_the_leading_singular_values_move_and_nothing_else(shape: tuple[int, int], values: bool) -> None:
    binding = adapted("svfit", shape, **{"adapter.rank": 3, "init.values": values})
    w = binding.layer.weight()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    assert not binding.adapter.delta(binding.layer).any()
    assert [p.numel() for p in binding.adapter.parameters()] == [3]
    e = moved(binding)
    after = s.clone()
    after[:3] = s[:3] * (1 + e) if values else s[:3] + e
    delta = binding.adapter.delta(binding.layer).detach()
    torch.testing.assert_close(w + delta, (u * after) @ vh, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.svdvals(w + delta), after.abs().sort(descending=True).values)
    core = u[:, :3].T @ delta @ vh[:3].T
    torch.testing.assert_close(core, torch.diag(torch.diagonal(core)), rtol=0, atol=1e-12)
    torch.testing.assert_close(delta - u[:, :3] @ (u[:, :3].T @ delta), 0 * delta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_a_value_is_the_full_one_between_its_vectors(shape: tuple[int, int]) -> None:
    """``dL/ds_i = u_i^T (dL/dW) v_i``, for SVF times ``s_i``."""
    for method, relative in (("svfit", False), ("svf", True)):
        binding = adapted(method, shape, **({"adapter.rank": 3} if method == "svfit" else {}))
        moved(binding)
        x = torch.randn(11, shape[1], dtype=torch.float64)
        dense = (binding.layer.weight() + binding.adapter.delta(binding.layer).detach()).requires_grad_()
        (x @ dense.T + binding.layer.bias()).pow(3).sum().backward()
        binding.adapter.forward(x, binding.layer).pow(3).sum().backward()
        u, s, vh = torch.linalg.svd(binding.layer.weight(), full_matrices=False)
        want = torch.einsum("oi,on,in->i", u, dense.grad, vh)[: binding.adapter.rank]
        torch.testing.assert_close(binding.adapter.E.grad, want * s if relative else want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_svf_is_svfit_at_full_rank(shape: tuple[int, int]) -> None:
    """``s = sigma z``: the same weight from either parametrisation."""
    svf, svfit = adapted("svf", shape), adapted("svfit", shape, **{"adapter.rank": "full"})
    assert svf.adapter.rank == svfit.adapter.rank == min(shape) == sum(p.numel() for p in svf.adapter.parameters())
    z = 1 + moved(svf)
    s = torch.linalg.svdvals(svf.layer.weight())
    svfit.adapter.E.data.copy_(s * z - s)
    torch.testing.assert_close(svf.adapter.delta(svf.layer), svfit.adapter.delta(svfit.layer), rtol=0, atol=1e-12)


def test_the_scale_stays_out_of_the_values() -> None:
    for rank in (2, 4):
        assert adapted("svfit", (6, 7), **{"adapter.rank": rank}).adapter.scale == 1.0


def test_full_rank_goes_by_target_and_is_overridden_by_patterns() -> None:
    recipe = rankloom.methods.get("svf").with_(
        {"targets.modules": ("q_proj", "k_proj"), "adapter.rank_pattern": {"k_proj": 2}}
    )
    ranks = {b.name.rpartition(".")[2]: b.adapter.rank for b in rankloom.adapt(zoo.build("llama"), recipe).bindings}
    assert ranks == {"q_proj": 16, "k_proj": 2}
    assert Recipe.from_text(recipe.to_yaml()) == recipe


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match=r"rank"):
        Recipe().with_({"adapter.rank": "all"})
    eva = Recipe(targets=Targets(("q_proj",)), init=ActivationSVD(rho=2.0)).with_({"adapter.rank": "full"})
    with pytest.raises(CompositionError, match=r"rank='full' leaves no ranks to redistribute.*give a number"):
        zoo.adapted(eva, zoo.build("llama"), "llama")
    assert not WeightSubspace(std=0.0).moves_output


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "rank"), [("svf", None), ("svfit", 3)])
def test_sigmoids_share_the_sum_of_the_values_out_anew(method: str, rank: int | None, shape: tuple[int, int]) -> None:
    """``W = U diag(sigma m) V^T sum(sigma) / sum(sigma m)`` on the leading values, the others as they were: the nuclear norm
    stays wherever the logits are."""
    changes: dict[str, Any] = {"adapter.core": "sigmoid", "init.values": True}
    binding = adapted(method, shape, **(changes if rank is None else {**changes, "adapter.rank": rank}))
    adapter, w, r = binding.adapter, binding.layer.weight(), rank or min(shape)
    assert [p.numel() for p in adapter.parameters()] == [r] and not adapter.delta(binding.layer).any()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    m = torch.sigmoid(3 * moved(binding))
    adapter.E.data.mul_(3)
    after = s.clone()
    after[:r] = s[:r] * m * s[:r].sum() / (s[:r] * m).sum()
    merged = w + adapter.delta(binding.layer).detach()
    torch.testing.assert_close(merged, (u * after) @ vh, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.matrix_norm(merged, "nuc"), s.sum(), rtol=1e-12, atol=0)
    x = torch.randn(11, shape[1], dtype=torch.float64)
    torch.testing.assert_close(adapter.forward(x, binding.layer), x @ merged.T + binding.layer.bias())


def test_only_differences_between_logits_count() -> None:
    """Any constant mask is the identity; one that is not gives another weight when a constant is added to it."""
    binding = adapted("svf", (5, 7), **{"adapter.core": "sigmoid"})
    for level in (-40.0, -1.0, 0.1, 30.0):
        binding.adapter.E.data.fill_(level)
        assert binding.adapter.delta(binding.layer).abs().max() < 1e-13
    moved(binding)
    before = binding.adapter.delta(binding.layer)
    binding.adapter.E.data += 1
    assert not torch.allclose(binding.adapter.delta(binding.layer), before, atol=1e-3)


def test_the_gradient_of_a_logit() -> None:
    """``dL/dp_i = m_i (1 - m_i) sigma_i (g_i - sum_j sigma_j m_j g_j / sum_j sigma_j m_j) S / sum_j sigma_j m_j``, with ``g_i``
    the full gradient between the singular vectors and ``S`` the sum of the values."""
    binding = adapted("svf", (5, 7), **{"adapter.core": "sigmoid"})
    e = moved(binding)
    x = torch.randn(11, 7, dtype=torch.float64)
    dense = (binding.layer.weight() + binding.adapter.delta(binding.layer).detach()).requires_grad_()
    (x @ dense.T + binding.layer.bias()).pow(3).sum().backward()
    binding.adapter.forward(x, binding.layer).pow(3).sum().backward()
    u, s, vh = torch.linalg.svd(binding.layer.weight(), full_matrices=False)
    g, m = torch.einsum("oi,on,in->i", u, dense.grad, vh), torch.sigmoid(e)
    total = (s * m).sum()
    want = m * (1 - m) * s * (g - (s * m * g).sum() / total) * s.sum() / total
    torch.testing.assert_close(binding.adapter.E.grad, want, rtol=1e-9, atol=1e-9)


def test_a_weight_of_zeros_has_nothing_to_share_out() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 3, dtype=torch.float64)})
    nn.init.zeros_(model["layer"].weight)
    recipe = rankloom.methods.get("svf").with_({"targets.modules": ("layer",), "adapter.core": "sigmoid"})
    binding = rankloom.adapt(model, recipe).bindings[0]
    moved(binding)
    loss = binding.adapter.forward(torch.randn(2, 4, dtype=torch.float64), binding.layer).sum()
    loss.backward()
    assert loss.isfinite() and not binding.adapter.E.grad.any() and not binding.adapter.delta(binding.layer).any()


@pytest.mark.parametrize("form", ["auto", "lora"])
def test_sigmoids_export_as_the_gains_they_are(form: Any, tmp_path: Path) -> None:
    """PEFT's AdaLoRA holds a diagonal as it is; loaded again, it is the same update."""
    changes = {"adapter.core": "sigmoid", "targets.modules": ("q_proj", "up_proj")}
    handle = rankloom.adapt(zoo.build("llama"), rankloom.methods.get("svf").with_(changes))
    zoo.perturb(handle, 1.0)
    inputs = zoo.batch("llama")
    report = handle.export(tmp_path / "peft", form=form)
    assert report["form"] == ("adalora" if form == "auto" else "lora") and report["exact"]
    back = rankloom.load(zoo.build("llama"), tmp_path / "peft")
    want = zoo.logits(handle.model, inputs)
    torch.testing.assert_close(zoo.logits(back.model, inputs), want, rtol=1e-9, atol=1e-9)
    handle.save(tmp_path / "own")
    assert torch.equal(zoo.logits(rankloom.load(zoo.build("llama"), tmp_path / "own").model, inputs), want)


def test_what_sigmoids_need() -> None:
    svfit = rankloom.methods.get("svfit").with_({"adapter.core": "sigmoid"})
    with pytest.raises(
        CompositionError, match=r"'lora' needs singular values.*'weight-subspace\(values=False\)' does not"
    ):
        svfit.check()
    with pytest.raises(RecipeError, match=r"core='sigmoid'.*set adapter.train to 'core'"):
        svfit.with_({"adapter.train": "all"})
    with pytest.raises(CompositionError, match=r"needs singular values.*init 'kaiming' does not.*'weight-subspace'"):
        svfit.with_(init="kaiming").check()
    with pytest.raises(CompositionError, match="needs ranked components"):
        svfit.with_({"init.values": True}, rank="adalora").check()
