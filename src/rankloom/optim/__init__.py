"""How gradients become updates. Optimizers sit on ``torch.optim``; they do not re-implement it."""

from rankloom.optim.adamw import AdamW
from rankloom.optim.base import OptimizerPart
from rankloom.optim.projected import Projected, ProjectedOptimizer
from rankloom.optim.projectors import Projection, SVDProjector

__all__ = ["AdamW", "OptimizerPart", "Projected", "ProjectedOptimizer", "Projection", "SVDProjector"]
