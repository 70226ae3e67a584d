"""Pure tensor functions: orthonormal bases, truncated and randomised SVD, subspace angles, polar factors, small Gram matrices.

No modules, no state.
"""

from rankloom.linalg.angles import principal_angles
from rankloom.linalg.polar import polar_factor
from rankloom.linalg.spd import damped, spd_inverse, spd_sylvester
from rankloom.linalg.svd import (
    best_rank,
    fix_signs,
    leading_svd,
    orthonormal,
    randomized_svd,
    truncated_svd,
    two_sided_svd,
)

__all__ = [
    "best_rank",
    "damped",
    "fix_signs",
    "leading_svd",
    "orthonormal",
    "polar_factor",
    "principal_angles",
    "randomized_svd",
    "spd_inverse",
    "spd_sylvester",
    "truncated_svd",
    "two_sided_svd",
]
