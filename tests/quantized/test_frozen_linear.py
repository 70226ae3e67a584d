"""Reading quantised weights and differentiating through them, against arithmetic written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rankloom.base import TorchaoInt8
from rankloom.errors import TargetError
from rankloom.quantized import dense, differentiable, frozen_linear, is_quantized
from tests.quantized.bases import close, packed_int4

BASES = {"int8": TorchaoInt8().prepare, "int4": packed_int4}
every_base = pytest.mark.parametrize("base", BASES)


def layer(base: str, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    """A quantised linear and the weight it was made of."""
    model = nn.Sequential(nn.Linear(96, 48, bias=bias, dtype=dtype))
    original = model[0].weight.detach().clone()
    BASES[base](model)
    return model[0], original


def assert_nearest_levels(base: str, read: Tensor, original: Tensor) -> None:
    """int8: multiples of each row's scale; int4: 16 levels between each group's extremes; the nearest one either way."""
    if base == "int8":
        low, step = 0.0, original.abs().amax(1, keepdim=True) / 127.5
        lowest, highest = -128, 127
    else:
        read, original = read.unflatten(1, (-1, 32)), original.unflatten(1, (-1, 32))
        low, high = original.amin(-1, keepdim=True), original.amax(-1, keepdim=True)
        step = (high - low) / 15
        lowest, highest = 0, 15
    codes = (read - low) / step
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert float(codes.min()) > lowest - 0.01 and float(codes.max()) < highest + 0.01
    assert float(((read - original) / step).abs().max()) < 0.501


@every_base
def test_a_weight_reads_as_what_it_stands_for(base: str) -> None:
    module, original = layer(base)
    read = dense(module.weight)
    assert type(read) is Tensor and read.dtype == torch.float32 and read.is_contiguous()
    assert_nearest_levels(base, read, original)


def test_packed_weights_wider_than_a_block_of_the_identity() -> None:
    model = nn.Sequential(nn.Linear(2080, 16))  # 2 blocks and a rest
    original = model[0].weight.detach().clone()
    packed_int4(model)
    assert_nearest_levels("int4", dense(model[0].weight), original)


def test_a_plain_weight_is_itself() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    assert not is_quantized(weight) and dense(weight).data_ptr() == weight.data_ptr()


def test_what_cannot_be_read_is_an_error() -> None:
    for unknown in (torch.ones(4, 4, dtype=torch.int8), torch.ones(8, 1, dtype=torch.uint8)):
        with pytest.raises(TargetError, match=r"cannot read a weight stored as Tensor \(torch\.u?int8\)"):
            dense(unknown)


@every_base
@pytest.mark.parametrize("bias", [True, False])
def test_forward_to_the_bit_and_gradients(base: str, bias: bool) -> None:
    module, _ = layer(base, bias=bias)
    x = torch.randn(2, 5, 96, requires_grad=True)
    b = module.bias.detach().clone().requires_grad_() if bias else None
    out = frozen_linear(x, module.weight, b)
    with torch.no_grad():
        assert torch.equal(out, F.linear(x, module.weight, b))
    pull = torch.randn_like(out)
    reference = F.linear(x, dense(module.weight), b)
    leaves = [x] if b is None else [x, b]
    for got, want in zip(
        torch.autograd.grad(out, leaves, pull), torch.autograd.grad(reference, leaves, pull), strict=True
    ):
        close(got, want, 1e-6)
    out.relu_()  # later code may write into it


@every_base
def test_nothing_of_the_weights_size_is_kept_for_backward(base: str) -> None:
    """torchao's int8 keeps a dense copy of every layer when autograd runs it; its packed int4 cannot be differentiated."""
    module, _ = layer(base)
    x = torch.randn(4, 96, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        frozen_linear(x, module.weight, module.bias)
        assert sum(kept) == 0
        own = module(x)
    if base == "int8":
        assert max(kept) == module.weight.numel()
    else:
        with pytest.raises(RuntimeError, match="derivative"):
            own.sum().backward()


@every_base
def test_autocast(base: str) -> None:
    module, _ = layer(base)
    x = torch.randn(4, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), differentiable(module):
        out = module(x)
    out.float().sum().backward()
    close(x.grad, dense(module.weight).sum(0).expand(4, -1), 2e-2)


def test_only_quantised_linears_with_their_own_forward_are_routed() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(32, 32), Doubled(32, 32), nn.Linear(32, 32))
    TorchaoInt8(exclude=("2",)).prepare(model)
    x = torch.randn(2, 32)
    out = model(x)
    with differentiable(model):
        assert [type(m).__name__ for m in model] == ["RoutedLinear", "Doubled", "Linear"]
        assert torch.equal(model(x), out)
    assert [type(m) for m in model] == [nn.Linear, Doubled, nn.Linear]
