"""Pure tensor functions: orthonormal bases, truncated and randomised SVD, Kronecker sums, subspace angles, small Gram matrices.

No modules, no state.
"""

from rankloom.linalg.angles import principal_angles
from rankloom.linalg.kronecker import (
    balanced_sides,
    divisors,
    elbow,
    energy_rank,
    kronecker_sum,
    kronecker_svd,
    rearranged,
)
from rankloom.linalg.spd import damped, spd_inverse, spd_sylvester
from rankloom.linalg.svd import best_rank, leading_svd, orthonormal, randomized_svd, truncated_svd, two_sided_svd

__all__ = [
    "balanced_sides",
    "best_rank",
    "damped",
    "divisors",
    "elbow",
    "energy_rank",
    "kronecker_sum",
    "kronecker_svd",
    "leading_svd",
    "orthonormal",
    "principal_angles",
    "randomized_svd",
    "rearranged",
    "spd_inverse",
    "spd_sylvester",
    "truncated_svd",
    "two_sided_svd",
]
