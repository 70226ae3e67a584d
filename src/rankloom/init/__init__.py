"""How adapters start, and from which evidence."""

from rankloom.init.base import InitContext, InitPart
from rankloom.init.one_step import OneStepGradient
from rankloom.init.random import AsStored, Gaussian, Kaiming

__all__ = ["AsStored", "Gaussian", "InitContext", "InitPart", "Kaiming", "OneStepGradient"]
