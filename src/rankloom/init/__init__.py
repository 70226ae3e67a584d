"""How adapters start, and from which evidence."""

from rankloom.init.base import InitContext, InitPart
from rankloom.init.one_step import OneStepGradient
from rankloom.init.random import AsStored, Gaussian, Kaiming
from rankloom.init.weight_qr import WeightQR
from rankloom.init.weight_svd import WeightSubspace, WeightSVD

__all__ = [
    "AsStored",
    "Gaussian",
    "InitContext",
    "InitPart",
    "Kaiming",
    "OneStepGradient",
    "WeightQR",
    "WeightSVD",
    "WeightSubspace",
]
