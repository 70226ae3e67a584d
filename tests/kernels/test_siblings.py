"""Modules that read one input run as one kernel; whatever a model does with them, each output is its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankloom
from rankloom.attach import _Sibling
from rankloom.kernels import Linear, dora_linears, lowrank_linears


class Projections(nn.Module):
    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.use = use
        g = torch.Generator().manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, n, bias=b) for n, b in ((8, True), (4, False), (4, True)))
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=g)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


class Net(nn.Module):
    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attention = Projections(use)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


def together(m: Projections, x: Tensor) -> Tensor:
    return torch.cat([m.q_proj(x), m.k_proj(x) * 2, m.v_proj(x).sin()], -1)


def other_inputs(m: Projections, x: Tensor) -> Tensor:
    y = x.cos()
    return torch.cat([m.q_proj(x), m.k_proj(y), m.v_proj(y)], -1)


def changed_between(m: Projections, x: Tensor) -> Tensor:
    x = x.detach().clone()
    q = m.q_proj(x)
    x.add_(1)
    return torch.cat([q.detach(), m.k_proj(x), m.v_proj(x)], -1)


def one_unused(m: Projections, x: Tensor) -> Tensor:
    return torch.cat([m.q_proj(x), m.v_proj(x)], -1)


def called_twice(m: Projections, x: Tensor) -> Tensor:
    return torch.cat([m.q_proj(x), m.k_proj(x), m.k_proj(x), m.q_proj(x)], -1)


def out_of_order(m: Projections, x: Tensor) -> Tensor:
    return torch.cat([m.v_proj(x), m.k_proj(x), m.q_proj(x)], -1)


USES = [together, other_inputs, changed_between, one_unused, called_twice, out_of_order]


@pytest.mark.parametrize("method", ["lora", "adalora", "dora"])
@pytest.mark.parametrize("use", USES)
def test_outputs_and_gradients_are_those_of_dense_updates(use: Callable[..., Tensor], method: str) -> None:
    model = Net(use).double()
    handle = rankloom.adapt(
        model, rankloom.methods.get(method).with_({"adapter.rank": 3, "targets.modules": "all-linear"})
    )
    for i, parameter in enumerate(handle.parameters()):
        nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(i))
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
    inputs = [x, *handle.parameters()]
    got = torch.autograd.grad(model(x).square().sum(), inputs, allow_unused=True)
    output = model(x).detach()

    weights = {b.name: b.layer.weight() + b.adapter.delta(b.layer) for b in handle.bindings}
    model.attention.use = lambda m, x: use(
        type(
            "Dense",
            (),
            {
                leaf: staticmethod(
                    lambda x, leaf=leaf: nn.functional.linear(x, weights[f"attention.{leaf}"], getattr(m, leaf).bias)
                )
                for leaf in ("q_proj", "k_proj", "v_proj")
            },
        ),
        x,
    )
    torch.testing.assert_close(model(x).detach(), output, rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad(model(x).square().sum(), inputs, allow_unused=True)
    for one, other in zip(got, want, strict=True):
        zero = torch.zeros(()) if one is None else torch.zeros_like(one)
        torch.testing.assert_close(zero if one is None else one, zero if other is None else other, rtol=1e-9, atol=1e-9)


def test_siblings_are_found_by_name_and_not_across_attention() -> None:
    def members(model: nn.Module) -> int:
        return sum(
            bool(m.__dict__["_rankloom_forward"].others) for m in model.modules() if "_rankloom_forward" in m.__dict__
        )

    model = Net(together)
    rankloom.adapt(model, rankloom.methods.get("lora").with_({"adapter.rank": 2}))
    assert isinstance(model.attention.q_proj.__dict__["_rankloom_forward"], _Sibling)
    assert members(model) == 1
    crossed = nn.ModuleDict({"encoder_attn": Projections(together)})
    rankloom.adapt(crossed, rankloom.methods.get("lora").with_({"adapter.rank": 2}))
    assert members(crossed) == 0


def test_what_a_sibling_was_left_is_released() -> None:
    model = Net(together)
    rankloom.adapt(model, rankloom.methods.get("lora").with_({"adapter.rank": 2}))
    model(torch.ones(1, 8))
    assert all(m.__dict__["_rankloom_forward"].left is None for m in model.attention.children())


def test_gradcheck_of_several_at_once() -> None:
    g = torch.Generator().manual_seed(0)
    x, w1, a1, b1, w2, a2, b2 = (
        torch.randn(shape, dtype=torch.float64, generator=g)
        for shape in ((3, 4), (5, 4), (2, 4), (5, 2), (3, 4), (1, 4), (3, 1))
    )

    def run(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
        return lowrank_linears(x, [Linear(w1, None, a1, b1, 0.5), Linear(w2, None, a2, b2, 2.0)])

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (x, a1, b1, a2, b2)])


def test_gradcheck_of_several_with_gains() -> None:
    g = torch.Generator().manual_seed(0)
    x, w1, bias, a1, b1, g1, w2, a2, b2, g2 = (
        torch.randn(shape, dtype=torch.float64, generator=g)
        for shape in ((3, 4), (5, 4), (5,), (2, 4), (5, 2), (5,), (3, 4), (1, 4), (3, 1), (3,))
    )

    def run(x: Tensor, a1: Tensor, b1: Tensor, g1: Tensor, a2: Tensor, b2: Tensor, g2: Tensor) -> tuple[Tensor, ...]:
        return dora_linears(x, [Linear(w1, bias, a1, b1, 0.5), Linear(w2, None, a2, b2, 2.0)], [g1, g2])

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (x, a1, b1, g1, a2, b2, g2)])
