"""The low-rank linear and its relatives as autograd functions."""

from rankloom.kernels.dora import dora_linear, dora_linears
from rankloom.kernels.lowrank import Linear, lowrank_linear, lowrank_linears

__all__ = ["Linear", "dora_linear", "dora_linears", "lowrank_linear", "lowrank_linears"]
