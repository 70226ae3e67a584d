"""How gradients become updates. Optimizers sit on ``torch.optim``; they do not re-implement it."""

from rankloom.optim.adamw import AdamW
from rankloom.optim.allora import ALLoRA
from rankloom.optim.base import OptimizerPart
from rankloom.optim.full_moments import FullMomentOptimizer
from rankloom.optim.groups import parameter_groups
from rankloom.optim.lora_plus import LoRAPlus
from rankloom.optim.lora_pro import LoRAPro
from rankloom.optim.pairs import Pair, PairStack, find_pairs, stacked
from rankloom.optim.preconditioned import Preconditioned, PreconditionedOptimizer
from rankloom.optim.projected import Projected, ProjectedOptimizer
from rankloom.optim.projectors import Projection, SVDProjector
from rankloom.optim.riemannian import Riemannian

__all__ = [
    "ALLoRA",
    "AdamW",
    "FullMomentOptimizer",
    "LoRAPlus",
    "LoRAPro",
    "OptimizerPart",
    "Pair",
    "PairStack",
    "Preconditioned",
    "PreconditionedOptimizer",
    "Projected",
    "ProjectedOptimizer",
    "Projection",
    "Riemannian",
    "SVDProjector",
    "find_pairs",
    "parameter_groups",
    "stacked",
]
