"""PEFT's VeRA with its own random bank handed over: the same update, output and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankloom.adapters import FourierFT, RandLoRA, VeRA
from rankloom.layers import LinearLayer
from rankloom.targets import Target

peft = pytest.importorskip("peft")


class Given:
    """A peer's bank in place of ours."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def corner(self, rows: int, columns: int, like: Tensor) -> Tensor:
        return self.matrix[:rows, :columns].to(like)


class Two(nn.Module):
    """Layers of unlike shapes, so that corners are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(12, 7), nn.Linear(7, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.tall(torch.tanh(self.wide(x)))


def injected(config: Any) -> nn.Module:
    model = peft.get_peft_model(Two(), config).double()
    for name, p in model.named_parameters():
        if p.requires_grad:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=p.dtype))
    return model


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_vera(name: str) -> None:
    model = injected(peft.VeraConfig(r=5, target_modules=["wide", "tall"]))
    layer = getattr(model.base_model.model, name)
    base = LinearLayer(layer.get_base_layer())
    ours = VeRA(rank=5).build(Target(name, base, name))
    ours.below, ours.above = Given(layer.vera_A["default"]), Given(layer.vera_B["default"].mT)
    ours.scale = 1.0
    theirs = {"b": layer.vera_lambda_b["default"], "d": layer.vera_lambda_d["default"]}
    with torch.no_grad():
        for key, value in theirs.items():
            getattr(ours, key).copy_(value)
    torch.testing.assert_close(ours.delta(base), layer.get_delta_weight("default"), rtol=1e-12, atol=1e-13)
    x = torch.randn(4, base.in_features, dtype=torch.float64)
    out, want = ours.forward(x, base), layer(x)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(out)
    grads = torch.autograd.grad(out, [ours.b, ours.d], pull), torch.autograd.grad(want, list(theirs.values()), pull)
    for mine, its in zip(*grads, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sparse", [{}, {"sparse": True}])
@pytest.mark.parametrize("name", ["wide", "tall"])
def test_randlora(name: str, sparse: dict[str, bool]) -> None:
    config = peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=["wide", "tall"], **sparse)
    model = injected(config)
    layer = getattr(model.base_model.model, name)
    base = LinearLayer(layer.get_base_layer())
    ours = RandLoRA(rank=3, scale=2.0, order="peft").build(Target(name, base, name))
    bank = layer.randlora_B["default"].double()  # (D, n, r): columns by term, then by component
    terms = ours.gam.shape[0]
    ours.small = Given(layer.randlora_A["default"].double().squeeze(1))
    ours.large = Given(bank[:, :terms].flatten(1).mT)
    theirs = {"lam": layer.randlora_lambda["default"], "gam": layer.randlora_gamma["default"]}
    with torch.no_grad():
        for key, value in theirs.items():
            getattr(ours, key).copy_(value)
    torch.testing.assert_close(ours.delta(base), layer.get_delta_weight("default"), rtol=1e-11, atol=1e-11)
    x = torch.randn(9, base.in_features, dtype=torch.float64)
    out, want = ours.forward(x, base), layer(x)
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-11)
    pull = torch.randn_like(out)
    grads = [torch.autograd.grad(y, p, pull) for y, p in ((out, [ours.lam, ours.gam]), (want, list(theirs.values())))]
    for mine, its in zip(*grads, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)
    ours.order = "matched"  # the equation: another pairing, so another matrix
    assert not torch.allclose(ours.delta(base), layer.get_delta_weight("default"))


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_fourierft(name: str) -> None:
    model = injected(peft.FourierFTConfig(n_frequency=20, scaling=30.0, target_modules=["wide", "tall"]))
    layer = getattr(model.base_model.model, name)
    base = LinearLayer(layer.get_base_layer())
    ours = FourierFT(coefficients=20, scale=30.0, places="peft").build(Target(name, base, name))
    with torch.no_grad():
        ours.c.copy_(layer.fourierft_spectrum["default"])
    assert torch.equal(ours.places, layer.indices["default"])
    # PEFT forms it in float32.
    torch.testing.assert_close(ours.delta(base), layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    x = torch.randn(9, base.in_features, dtype=torch.float64)
    torch.testing.assert_close(ours.forward(x, base), layer(x).double(), rtol=1e-5, atol=1e-5)
