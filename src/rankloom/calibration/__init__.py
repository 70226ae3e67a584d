"""Streaming statistics of a model on data: gradient sketches and activation components. Nothing forms more than it must."""

from rankloom.calibration.activations import ActivationComponents, activation_components, activation_covariances
from rankloom.calibration.data import Calibration
from rankloom.calibration.gradients import GradientReport, exact_gradients, full_gradients, gradient_svd
from rankloom.calibration.sketch import GradientSVD

__all__ = [
    "ActivationComponents",
    "Calibration",
    "GradientReport",
    "GradientSVD",
    "activation_components",
    "activation_covariances",
    "exact_gradients",
    "full_gradients",
    "gradient_svd",
]
