"""The parameterisations: how ``delta`` is made of trainable tensors."""

from rankloom.adapters.base import Adapter, AdapterPart, Binding, Trainable
from rankloom.adapters.chain import ChainAdapter
from rankloom.adapters.dense import Dense, DenseAdapter
from rankloom.adapters.dora import DoRA, DoRAAdapter
from rankloom.adapters.factored import FactoredAdapter
from rankloom.adapters.lora import LoRA, LowRankAdapter

__all__ = [
    "Adapter",
    "AdapterPart",
    "Binding",
    "ChainAdapter",
    "Dense",
    "DenseAdapter",
    "DoRA",
    "DoRAAdapter",
    "FactoredAdapter",
    "LoRA",
    "LowRankAdapter",
    "Trainable",
]
