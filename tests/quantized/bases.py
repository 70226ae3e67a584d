"""A tiny Llama in every quantised storage, and the same function in plain float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankloom.base import BasePart, TorchaoInt8
from rankloom.quantized import dense
from tests import zoo

pytest.importorskip("torchao", reason="torchao is not installed")

SIZES = {"hidden_size": 32, "intermediate_size": 64}


def _prepared(part: BasePart) -> Callable[[nn.Module], Any]:
    return part.prepare


def _unpacked_int4(model: nn.Module) -> None:
    """As a user might have it: four bits in int8 storage, by torchao's own call."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
        filter_fn=lambda m, n: isinstance(m, nn.Linear) and "lm_head" not in n,
    )


def packed_int4(model: nn.Module) -> None:
    """As `TorchaoInt4` stores it, but also in float32, where the kernel is slow and a comparison sharp."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    config = PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda m, n: isinstance(m, nn.Linear) and "lm_head" not in n)


STORAGES: dict[str, Callable[[nn.Module], Any]] = {
    "int8": _prepared(TorchaoInt8()),
    "int8-groups": _prepared(TorchaoInt8(group_size=16)),
    "int4-packed": packed_int4,
    "int4-unpacked": _unpacked_int4,
}
every_storage = pytest.mark.parametrize("storage", STORAGES)


def plain(dtype: torch.dtype = torch.float32) -> nn.Module:
    return zoo.build("llama", dtype=dtype, **SIZES)


def quantized(storage: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = plain(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's reports on GPU libraries
        STORAGES[storage](model)
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """The same function in plain float32: what the quantised weights stand for."""
    made = plain()
    own = dict(made.named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                own[name].weight.copy_(dense(module.weight))
    return made


def data() -> list[dict[str, Any]]:
    return zoo.batches("llama")


def close(got: Tensor, want: Tensor, share: float = 1e-3, **options: Any) -> None:
    """Equal up to a share of the largest entry: what float32 leaves of a product in another order."""
    torch.testing.assert_close(got, want, rtol=share, atol=share * float(want.abs().max()), **options)
