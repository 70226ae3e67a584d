"""How rank is allocated over time."""

from rankloom.rank.adalora import AdaLoRA, AdaLoRASchedule
from rankloom.rank.base import RankPart
from rankloom.rank.fixed import Fixed

__all__ = ["AdaLoRA", "AdaLoRASchedule", "Fixed", "RankPart"]
