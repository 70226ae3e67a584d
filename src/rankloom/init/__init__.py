"""How adapters start, and from which evidence."""

from rankloom.init.activation_svd import ActivationSVD
from rankloom.init.base import InitContext, InitPart
from rankloom.init.common_subspace import CommonSubspace
from rankloom.init.covariance_svd import CovarianceSVD
from rankloom.init.gradient_blocks import GradientBlocks
from rankloom.init.kronecker_svd import KroneckerSVD
from rankloom.init.one_step import OneStepGradient
from rankloom.init.own import OwnStart
from rankloom.init.quantization_residual import QuantizationResidual
from rankloom.init.random import Gaussian, Kaiming
from rankloom.init.update_svd import UpdateSVD
from rankloom.init.weight_lu import WeightLU
from rankloom.init.weight_qr import WeightQR
from rankloom.init.weight_svd import WeightSubspace, WeightSVD

__all__ = [
    "ActivationSVD",
    "CommonSubspace",
    "CovarianceSVD",
    "Gaussian",
    "GradientBlocks",
    "InitContext",
    "InitPart",
    "Kaiming",
    "KroneckerSVD",
    "OneStepGradient",
    "OwnStart",
    "QuantizationResidual",
    "UpdateSVD",
    "WeightLU",
    "WeightQR",
    "WeightSVD",
    "WeightSubspace",
]
