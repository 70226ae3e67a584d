"""How the frozen weights are stored."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from rankloom.errors import CompositionError, RecipeError, TargetError
from rankloom.parts import Part, part
from rankloom.quantized import is_quantized
from rankloom.targets import Targets, find_targets

__all__ = ["AsLoaded", "BasePart", "TorchaoInt4", "TorchaoInt8"]


class BasePart(Part):
    """A storage of the base's weights.

    Changing it gives up the weights as they were, so nothing does that behind the user's back: :meth:`prepare` is called on
    the model, once, before :func:`rankloom.adapt` (``rankloom train`` does), and attaching only checks.
    """

    def prepare(self, model: nn.Module, targets: Targets | None = None) -> list[str]:
        """Bring the model into this storage in place.

        Args:
            model: any module.
            targets: the recipe's; modules trained whole keep their floating weights.

        Returns:
            The names of the modules whose weights are stored anew.
        """
        return []

    def check_on(self, model: nn.Module, targets: Targets) -> None:
        """Raise :class:`CompositionError` where the model is not stored so."""


@part("base", "as-loaded")
@dataclass(frozen=True)
class AsLoaded(BasePart):
    """The base stays in whatever dtype or quantised form the model was loaded with."""


class _Torchao(BasePart):
    """Weight-only storage by torchao of every linear but the output head, tied weights and modules trained whole."""

    exclude: tuple[str, ...]
    stores: ClassVar[str]
    takes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)

    def prepare(self, model: nn.Module, targets: Targets | None = None) -> list[str]:
        """As in :class:`BasePart`; modules that are stored quantised already stay as they are.

        Raises:
            RecipeError: torchao is not installed.
            TargetError: a weight this storage cannot hold, or an ``exclude`` pattern that matches nothing.
            CompositionError: the model has no linear to store.
        """
        modules = {n: m for n, m in self._linears(model, targets or Targets()).items() if not is_quantized(m.weight)}
        for name, module in modules.items():
            self._check_weight(name, module.weight)
        chosen = {id(module) for module in modules.values()}
        with _quiet_torchao():
            from torchao.quantization import quantize_

            quantize_(model, self._config(), filter_fn=lambda module, _name: id(module) in chosen)
        return list(modules)

    def check_on(self, model: nn.Module, targets: Targets) -> None:
        for name, module in self._linears(model, targets).items():
            if type(module.weight).__name__ != self.stores:
                stored = module.weight.dtype if not is_quantized(module.weight) else type(module.weight).__name__
                raise CompositionError(
                    f"base {self.kind!r} expects {name} stored in it, not as {stored}: call recipe.base.prepare(model, "
                    f"recipe.targets) before adapt(), or load the model so and use base='as-loaded'"
                )

    def _linears(self, model: nn.Module, targets: Targets) -> dict[str, nn.Linear]:
        wanted = Targets(exclude=self.exclude, train=targets.train if "*" not in targets.train else (), ties="untie")
        found = [t for t in find_targets(model, wanted) if isinstance(t.layer.module, nn.Linear) and not t.tied_to]
        if not found:
            raise CompositionError(
                f"base {self.kind!r} stores nn.Linear weights, and this model has none it may change"
            )
        return {t.name: t.layer.module for t in found if isinstance(t.layer.module, nn.Linear)}

    def _check_weight(self, name: str, weight: torch.Tensor) -> None:
        if weight.dtype not in self.takes:
            known = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.takes)
            raise TargetError(
                f"{name} is {weight.dtype}: base {self.kind!r} stores {known} weights; load the model so (dtype='bfloat16')"
            )

    def _config(self) -> Any:
        raise NotImplementedError


@part("base", "torchao-int8")
@dataclass(frozen=True)
class TorchaoInt8(_Torchao):
    """Weights as 8-bit integers with one scale per output row, or per ``group_size`` inputs (torchao, weight only).

    8 bits a weight and a scale a row (16 more bits a group); activations stay floating. ``exclude``: patterns of modules
    that keep their floating weights.
    """

    group_size: int | None = None
    exclude: tuple[str, ...] = ()
    stores: ClassVar[str] = "Int8Tensor"

    def check(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise RecipeError(f"base group_size must be positive, got {self.group_size}")

    def _check_weight(self, name: str, weight: torch.Tensor) -> None:
        super()._check_weight(name, weight)
        if self.group_size and weight.shape[1] % self.group_size:
            raise _unfit(
                self, name, weight, f"{weight.shape[1]} inputs are no multiple of group_size {self.group_size}"
            )

    def _config(self) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig
        from torchao.quantization.granularity import PerGroup, PerRow

        granularity = PerGroup(self.group_size) if self.group_size else PerRow()
        return Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)


@part("base", "torchao-int4")
@dataclass(frozen=True)
class TorchaoInt4(_Torchao):
    """Weights as packed 4-bit integers with a scale and a zero point per ``group_size`` inputs, on a CPU (torchao).

    4 bits a weight and 32 more a group; activations stay bfloat16, the one dtype torch has a fast CPU kernel for.
    ``exclude``: patterns of modules that keep their floating weights. The packing asks that ``group_size`` 32, 64 or 128
    divides the inputs of every module and 16 its outputs. On other devices quantise the model with torchao and use
    ``as-loaded``.
    """

    group_size: int = 32
    exclude: tuple[str, ...] = ()
    stores: ClassVar[str] = "Int4OpaqueTensor"
    # The kernel runs in float32 too, as a reference loop: 65 to 75 times the floating product it should beat.
    takes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16,)

    def check(self) -> None:
        if self.group_size not in (32, 64, 128):
            raise RecipeError(f"base group_size must be 32, 64 or 128 for packed int4, got {self.group_size}")

    def _check_weight(self, name: str, weight: torch.Tensor) -> None:
        super()._check_weight(name, weight)
        if weight.device.type != "cpu":
            raise TargetError(
                f"{name} is on {weight.device}: base 'torchao-int4' packs for the CPU's kernel; quantise the model with torchao "
                f"for that device and use base='as-loaded'"
            )
        if weight.shape[1] % self.group_size:
            raise _unfit(
                self, name, weight, f"{weight.shape[1]} inputs are no multiple of group_size {self.group_size}"
            )
        if weight.shape[0] % 16:
            raise _unfit(self, name, weight, f"{weight.shape[0]} outputs are no multiple of 16")

    def _config(self) -> Any:
        try:  # in torchao's stable namespace the packings of 0.18 all need a GPU or a library that has no CPU build
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        except ImportError:
            raise RecipeError(
                "base 'torchao-int4' needs torchao's packed int4 for CPUs: pip install 'torchao>=0.18'"
            ) from None
        return PrototypeInt4WeightOnlyConfig(group_size=self.group_size, set_inductor_config=False)


def _unfit(base: Part, name: str, weight: torch.Tensor, why: str) -> TargetError:
    return TargetError(
        f"{name} {tuple(weight.shape)} cannot be stored as {base.kind}: its {why}; choose another base.group_size, or list the "
        f"module in base.exclude"
    )


@contextmanager
def _quiet_torchao() -> Iterator[None]:
    """torchao reports each GPU library that a CPU build lacks, and torch each class it registers: nothing to act on."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"this base needs torchao ({error.name} is missing): pip install 'rankloom[torchao]'"
        ) from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
