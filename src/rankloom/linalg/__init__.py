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
    recompressed,
)
from rankloom.linalg.order import kth_smallest
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
from rankloom.linalg.tensor_ring import (
    chain,
    mode_sizes,
    ring_change,
    ring_identity_penalty,
    ring_orthogonality_penalty,
    ring_terms,
)

__all__ = [
    "balanced_sides",
    "best_rank",
    "chain",
    "damped",
    "divisors",
    "elbow",
    "energy_rank",
    "fix_signs",
    "kronecker_sum",
    "kronecker_svd",
    "kth_smallest",
    "leading_svd",
    "mode_sizes",
    "orthonormal",
    "polar_factor",
    "principal_angles",
    "randomized_svd",
    "rearranged",
    "recompressed",
    "ring_change",
    "ring_identity_penalty",
    "ring_orthogonality_penalty",
    "ring_terms",
    "spd_inverse",
    "spd_sylvester",
    "truncated_svd",
    "two_sided_svd",
]
