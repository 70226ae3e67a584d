"""Pure tensor functions: orthonormal bases, truncated and randomised SVD, subspace angles. No modules, no state."""

from rankloom.linalg.angles import principal_angles
from rankloom.linalg.svd import best_rank, orthonormal, randomized_svd, truncated_svd, two_sided_svd

__all__ = ["best_rank", "orthonormal", "principal_angles", "randomized_svd", "truncated_svd", "two_sided_svd"]
