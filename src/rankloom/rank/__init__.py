"""How rank is allocated over time."""

from rankloom.rank.adalora import AdaLoRA, AdaLoRASchedule
from rankloom.rank.base import RankPart
from rankloom.rank.fixed import Fixed
from rankloom.rank.sparsity import SparsityBudget, SparsitySchedule
from rankloom.rank.weight_spectrum import WeightSpectrum

__all__ = [
    "AdaLoRA",
    "AdaLoRASchedule",
    "Fixed",
    "RankPart",
    "SparsityBudget",
    "SparsitySchedule",
    "WeightSpectrum",
]
