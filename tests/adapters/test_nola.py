"""NOLA against its equation written out: combinations of random matrices, coefficients only in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankloom
from rankloom import Recipe, Targets
from rankloom.adapters import NOLA, NOLAAdapter
from rankloom.errors import ArtifactError, RecipeError, TargetError
from rankloom.init import OwnStart
from rankloom.kernels.generated import uniform
from rankloom.layers import LinearLayer
from rankloom.targets import Target
from tests import zoo

SMALL = NOLA(rank=3, alpha=6.0, bases=7, seed=4)


def recipe(**changes: Any) -> Recipe:
    return Recipe(targets=Targets(("q_proj", "down_proj")), adapter=SMALL, init=OwnStart()).with_(
        {f"adapter.{name}": value for name, value in changes.items()}
    )


def target(out: int = 5, fan_in: int = 9, name: str = "layer") -> Target:
    return Target(name, LinearLayer(nn.Linear(fan_in, out, dtype=torch.float64)), name)


def random(stream: str, i: int, count: int) -> Tensor:
    """U(-1, 1) of the stream's row ``i``."""
    return 2 * uniform(4, stream, i * 2**40, count).double() - 1


@pytest.mark.parametrize("bank", ["cache", "regenerate"])
def test_the_update_is_the_equation(bank: Any) -> None:
    adapter: NOLAAdapter = NOLA(rank=3, alpha=6.0, bases=7, seed=4, bank=bank).build(target())
    with torch.no_grad():
        adapter.a.normal_()
        adapter.b.normal_()
    a = random("nola.A0", 0, 27).view(3, 9) / 3  # 1 / sqrt(in)
    b = torch.zeros(5, 3, dtype=torch.float64)
    for i in range(7):
        a = a + adapter.a[i] * random("nola.A", i, 27).view(3, 9) / 7**0.5
        b = b + adapter.b[i] * random("nola.B", i, 15).view(5, 3) / 7**0.5
    torch.testing.assert_close(
        adapter.delta(None), 2.0 * b @ a, rtol=1e-6, atol=1e-6
    )  # sqrt 3 in float32, on both sides
    assert adapter.delta(None).requires_grad


def test_only_the_output_side_learns_at_first() -> None:
    handle = rankloom.adapt(zoo.build("llama"), recipe())
    handle.model(**zoo.batch("llama")).loss.backward()
    for name, p in handle.named_parameters().items():
        assert p.grad is not None and bool(p.grad.any()) == name.endswith(".b")


@pytest.mark.parametrize(("rank", "bases"), [(1, 5), (3, 5), (3, 11)])
def test_the_count_depends_on_the_number_of_matrices_only(rank: int, bases: int) -> None:
    for shape in ((5, 9), (12, 4)):
        adapter = NOLA(rank=rank, bases=bases).build(target(*shape))
        assert sum(p.numel() for p in adapter.parameters()) == 2 * bases


def test_layers_share_one_bank_and_regenerating_keeps_none() -> None:
    data, outs = zoo.batches("llama", 2), []
    for bank in ("cache", "regenerate"):
        handle = rankloom.adapt(zoo.build("llama"), recipe(bank=bank))
        zoo.train(handle, handle.optimizer(1e-2), data, 3)
        adapters = [b.adapter for b in handle.bindings]
        assert len({id(adapter.below) for adapter in adapters}) == len({id(adapter.above) for adapter in adapters}) == 1
        assert bool(adapters[0].below._held) == bool(adapters[0].above._held) == (bank == "cache")
        outs.append(zoo.logits(handle.model, data[0]))
    torch.testing.assert_close(*outs, rtol=1e-11, atol=1e-11)


def test_dropout_after_the_layer_is_as_without_it() -> None:
    layer = nn.Linear(6, 6)
    masks = []
    for adapted in (False, True):
        torch.manual_seed(3)
        if adapted:
            adapter = NOLA(rank=2, bases=4, bank="regenerate").build(Target("x", LinearLayer(layer), "x"))
            adapter.forward(torch.ones(2, 6), LinearLayer(layer)).sum().backward()
        masks.append(nn.functional.dropout(torch.ones(50)))
    assert torch.equal(*masks)


def test_the_file_holds_coefficients_and_a_hash(tmp_path: Path) -> None:
    handle = rankloom.adapt(zoo.build("llama"), recipe())
    zoo.perturb(handle)
    handle.save(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert {key.rsplit(".", 1)[1]: tuple(t.shape) for key, t in tensors.items()} == {
        "a": (7,),
        "b": (7,),
        "digest": (16,),
    }
    again = rankloom.load(zoo.build("llama"), tmp_path / "adapter")
    for one, other in zip(handle.bindings, again.bindings, strict=True):
        assert torch.equal(one.adapter.delta(one.layer), other.adapter.delta(other.layer))


def test_other_random_numbers_are_refused() -> None:
    handle = rankloom.adapt(zoo.build("llama"), recipe())
    other = rankloom.adapt(zoo.build("llama"), recipe(seed=5))
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ArtifactError, match="trained on other random tensors than its seed gives here") as caught:
        other.load_state_dict(handle.state_dict())
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


def test_impossible_settings_are_refused() -> None:
    for broken, message in (({"bases": 0}, "adapter.bases >= 1"), ({"dropout": 1.0}, "dropout must be in")):
        with pytest.raises(RecipeError, match=message):
            recipe(**broken).check()
    with pytest.raises(TargetError, match=r"rank 17 is above min\(out, in\) = 16 of model.layers.0"):
        recipe(rank=17).check(zoo.build("llama"))
