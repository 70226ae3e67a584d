"""The low-rank linear and its relatives as autograd functions."""

from rankloom.kernels.dora import dora_linear
from rankloom.kernels.lowrank import lowrank_linear

__all__ = ["dora_linear", "lowrank_linear"]
