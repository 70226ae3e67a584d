"""Pure tensor functions: orthonormal bases, truncated and randomised SVD. No modules, no state."""

from rankloom.linalg.svd import best_rank, leading_svd, orthonormal, randomized_svd, truncated_svd, two_sided_svd

__all__ = ["best_rank", "leading_svd", "orthonormal", "randomized_svd", "truncated_svd", "two_sided_svd"]
