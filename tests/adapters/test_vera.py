"""VeRA against its equation: shared corners of one bank, two vectors a layer, nothing of the input's width kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import VeRA
from rankloom.errors import ArtifactError, RecipeError
from rankloom.init import OwnStart
from rankloom.kernels.generated import uniform
from rankloom.layers import EmbeddingLayer, LinearLayer
from rankloom.targets import Target
from tests import zoo


def recipe(**changes: Any) -> Recipe:
    made = Recipe(targets=Targets(("q_proj", "down_proj")), adapter=VeRA(rank=5), init=OwnStart())
    return made.with_({f"adapter.{name}": value for name, value in changes.items()})


def rows(stream: str, count: int, length: int, seed: int = 0) -> Tensor:
    """U(-1, 1), row by row of the stream."""
    return torch.stack([2 * uniform(seed, stream, i * 2**40, length).double() - 1 for i in range(count)])


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (4, 4)])
def test_the_update_is_the_equation(shape: tuple[int, int]) -> None:
    out, width = shape
    layer = nn.Linear(width, out, dtype=torch.float64)
    adapter = VeRA(rank=7, seed=3).build(Target("x", LinearLayer(layer), "x"))
    with torch.no_grad():
        adapter.b.normal_()
        adapter.d.normal_()
    a, b = rows("vera.A", 7, width, 3) / width**0.5, rows("vera.B", 7, out, 3).mT / 7**0.5
    want = torch.diag(adapter.b) @ b @ torch.diag(adapter.d) @ a
    torch.testing.assert_close(
        adapter.delta(None), want, rtol=1e-6, atol=1e-7
    )  # sqrt 3 is rounded to float32 in the bank


def test_the_start_and_the_first_gradients() -> None:
    handle = rankloom.adapt(zoo.build("llama"), recipe(d_initial=0.25))
    handle.model(**zoo.batch("llama")).loss.backward()
    for binding in handle.bindings:
        adapter = binding.adapter
        assert not adapter.b.any() and bool((adapter.d == 0.25).all())
        assert adapter.b.grad.any() and not adapter.d.grad.any()
        assert sum(p.numel() for p in adapter.parameters()) == binding.layer.out_features + 5


def test_a_layer_does_not_depend_on_what_else_is_adapted() -> None:
    few = rankloom.adapt(zoo.build("llama"), recipe())
    more = rankloom.adapt(
        zoo.build("llama"), recipe().with_(targets=Targets(("q_proj", "down_proj", "gate_proj", "lm_head")))
    )
    by_name = {b.name: b for b in more.bindings}
    for one in few.bindings:
        for mine, its in zip(one.adapter.factors(), by_name[one.name].adapter.factors(), strict=True):
            assert torch.equal(mine, its)
    assert len({id(b.adapter.below) for b in more.bindings}) == 1


def test_the_file_holds_the_vectors_and_a_hash(tmp_path: Path) -> None:
    handle = rankloom.adapt(zoo.build("llama"), recipe())
    handle.save(tmp_path / "adapter")
    keys = {key.rsplit(".", 1)[1] for key in load_file(tmp_path / "adapter" / "adapter.safetensors")}
    assert keys == {"b", "d", "digest"}
    other = rankloom.adapt(zoo.build("llama"), recipe(seed=1))
    with pytest.raises(ArtifactError, match="other random tensors"):
        other.load_state_dict(handle.state_dict())


def test_nothing_of_the_inputs_width_is_kept_for_backward() -> None:
    layer = nn.Linear(64, 48).requires_grad_(False)
    adapter = VeRA(rank=5).build(Target("x", LinearLayer(layer), "x"))
    adapter.reset(LinearLayer(layer), torch.Generator())
    saved: list[tuple[int, ...]] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(tuple(t.shape))
        return t

    x = torch.randn(33, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        adapter.forward(x, LinearLayer(layer))
    assert (5, 33) in saved and all(33 not in shape or shape == (5, 33) for shape in saved)


def test_a_look_up_has_columns_of_size_one() -> None:
    table = nn.Embedding(50, 8)
    adapter = VeRA(rank=6).build(Target("x", EmbeddingLayer(table), "x"))
    linear = VeRA(rank=6).build(Target("x", LinearLayer(nn.Linear(50, 8)), "x"))
    assert adapter.scale == pytest.approx(linear.scale * 50**0.5)


def test_impossible_settings_are_refused() -> None:
    for broken in ({"rank": 0}, {"d_initial": 0.0}):
        with pytest.raises(RecipeError, match="a d_initial other than 0"):
            recipe(**broken).check()
