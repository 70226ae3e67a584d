"""The low-rank linear and its relatives as autograd functions."""

from rankloom.kernels.dora import dora_linear, dora_linears
from rankloom.kernels.lowrank import Linear, lowrank_linear, lowrank_linears
from rankloom.kernels.materialized import Update, materialize, materialized_linear, row_blocks
from rankloom.kernels.shards import shard_linear, shard_sum

__all__ = [
    "Linear",
    "Update",
    "dora_linear",
    "dora_linears",
    "lowrank_linear",
    "lowrank_linears",
    "materialize",
    "materialized_linear",
    "row_blocks",
    "shard_linear",
    "shard_sum",
]
