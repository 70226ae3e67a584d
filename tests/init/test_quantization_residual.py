"""LoftQ's start (2310.08659): the best rank-r part of what quantising has lost; PEFT's decomposition as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankloom import Recipe, Targets, adapt
from rankloom.adapters import DoRA, LoRA
from rankloom.errors import ArtifactError, CompositionError
from rankloom.init import QuantizationResidual
from tests import zoo

RANK = 3
MODULES = ("q_proj", "up_proj", "down_proj")


def rounded(weight: Tensor, levels: int = 8) -> Tensor:
    """Quantise and dequantise each row uniformly."""
    step = weight.abs().amax(1, keepdim=True) / levels
    return (weight / step).round() * step


def on_disk(folder: Path, kind: str = "llama") -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with rounded weights, and the originals in a file."""
    model = zoo.build(kind)
    originals = {n: t.clone() for n, t in model.state_dict().items()}
    save_file(originals, folder / "model.safetensors")
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.weight.data = rounded(module.weight.data)
    return model, originals


def started(model: nn.Module, reference: Path, modules: Any = MODULES, form: Any = None, rank: int = RANK) -> Any:
    form = LoRA(rank=rank, alpha=7.0) if form is None else form
    return adapt(
        model, Recipe(targets=Targets(modules), adapter=form, init=QuantizationResidual(reference=str(reference)))
    )


@pytest.mark.parametrize(
    "form",
    [
        LoRA(rank=RANK, alpha=7.0),
        LoRA(rank=RANK, alpha=7.0, scaling="rslora", core="diagonal"),
        LoRA(rank=RANK, alpha=7.0, core="square", train="core"),
        DoRA(rank=RANK, alpha=7.0),
    ],
)
def test_the_start_is_the_best_correction(tmp_path: Path, form: Any) -> None:
    peft = pytest.importorskip("peft")
    model, originals = on_disk(tmp_path)
    handle = started(model, tmp_path, form=form)
    for b in handle.bindings:
        w, q = originals[f"{b.name}.weight"], b.layer.weight()
        found = peft.utils.loftq_utils._low_rank_decomposition(w - q, RANK)
        delta = b.adapter.delta(b.layer).detach()
        torch.testing.assert_close(delta, found["L"] @ found["R"], rtol=1e-8, atol=1e-11)
        left = torch.linalg.matrix_norm(w - q - delta)
        assert left < torch.linalg.matrix_norm(w - q)  # closer than the quantised base alone
        torch.testing.assert_close(left, torch.linalg.svdvals(w - q)[RANK:].norm(), rtol=1e-8, atol=0)
        share = float(left / torch.linalg.matrix_norm(w - q))
        assert handle.report["residual"][b.name] == pytest.approx(share, rel=1e-6)


def test_more_rank_recovers_more_up_to_everything(tmp_path: Path) -> None:
    gaps = []
    original = zoo.logits(zoo.build("llama"), zoo.batch("llama"))
    for rank in (1, 4, 8):
        model, _ = on_disk(tmp_path)
        gaps.append(zoo.logits(model, zoo.batch("llama")) - original)
        started(model, tmp_path, "all-linear", rank=rank)
        gaps.append(zoo.logits(model, zoo.batch("llama")) - original)
    sizes = [float(g.norm()) for g in gaps]
    assert sizes[5] < sizes[3] < sizes[0]
    model, _ = on_disk(tmp_path)
    started(model, tmp_path, ("q_proj", "o_proj"), rank=16)
    for name in ("q_proj", "o_proj"):  # full rank: the original function of these layers, to rounding
        layer = model.get_submodule(f"model.layers.0.self_attn.{name}")
        x = torch.randn(3, 16, dtype=torch.float64)
        want = zoo.build("llama").get_submodule(f"model.layers.0.self_attn.{name}")(x)
        torch.testing.assert_close(layer(x), want, rtol=1e-8, atol=1e-10)


def test_nothing_lost_starts_as_loras(tmp_path: Path) -> None:
    save_file(zoo.build("llama").state_dict(), tmp_path / "same.safetensors")
    model, inputs = zoo.build("llama"), zoo.batch("llama")
    before = zoo.logits(model, inputs)
    handle = started(model, tmp_path / "same.safetensors")
    assert torch.equal(before, zoo.logits(model, inputs))
    assert all(b.adapter.A.any(1).all() and not b.adapter.B.any() for b in handle.bindings)


def test_other_layouts_and_names(tmp_path: Path) -> None:
    model, originals = on_disk(tmp_path, "gpt2")
    handle = started(model, tmp_path, ("c_attn[q]", "c_fc"))
    body = {n.removeprefix("transformer."): t for n, t in originals.items()}
    save_file(body, tmp_path / "body.safetensors")  # as a bare body is saved
    (tmp_path / "model.safetensors").unlink()
    first = {n: t.clone() for n, t in handle.state_dict().items()}
    handle.detach()
    again = started(model, tmp_path, ("c_attn[q]", "c_fc"))
    assert all(torch.equal(t, first[n]) for n, t in again.state_dict().items())
    for b in again.bindings:
        w = originals[f"{b.target.module_name}.weight"].T[slice(*(b.layer.rows or (None, None)))]
        want = torch.linalg.svdvals(w - b.layer.weight())[:RANK]
        torch.testing.assert_close(torch.linalg.svdvals(b.adapter.delta(b.layer))[:RANK], want, rtol=1e-8, atol=1e-12)


def test_a_reference_that_does_not_fit(tmp_path: Path) -> None:
    model = zoo.build("llama")
    with pytest.raises(CompositionError, match=r"before quantisation: set init.reference"):
        adapt(model, Recipe(init=QuantizationResidual()))
    with pytest.raises(ArtifactError, match="has no safetensors"):
        started(model, tmp_path)
    with pytest.raises(ArtifactError, match="cannot read"):
        started(model, tmp_path / "missing.safetensors")
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"shape \(3, 3\), the model \(16, 16\)"):
        started(model, tmp_path)
    save_file({"other.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"has no model.layers.0.self_attn.q_proj.weight"):
        started(model, tmp_path)
    assert not any("rankloom" in m._modules for m in model.modules())
