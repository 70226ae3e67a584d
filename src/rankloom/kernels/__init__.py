"""The low-rank linear and its relatives as autograd functions."""

from rankloom.kernels.dora import dora_linear, dora_linears
from rankloom.kernels.formed import digits_worth, formed_linear, forming_pays
from rankloom.kernels.kronecker import Step, Terms, contraction, contraction_macs, kronecker_linear, kronecker_product
from rankloom.kernels.kronecker_blocks import kronecker_rows, kronecker_rows_macs
from rankloom.kernels.lowrank import Linear, lowrank_linear, lowrank_linears
from rankloom.kernels.materialized import Update, materialize, materialized_linear, row_blocks
from rankloom.kernels.shards import shard_linear, shard_sum

__all__ = [
    "Linear",
    "Step",
    "Terms",
    "Update",
    "contraction",
    "contraction_macs",
    "digits_worth",
    "dora_linear",
    "dora_linears",
    "formed_linear",
    "forming_pays",
    "kronecker_linear",
    "kronecker_product",
    "kronecker_rows",
    "kronecker_rows_macs",
    "lowrank_linear",
    "lowrank_linears",
    "materialize",
    "materialized_linear",
    "row_blocks",
    "shard_linear",
    "shard_sum",
]
