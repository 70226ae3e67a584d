"""The parameterisations: how ``delta`` is made of trainable tensors."""

from rankloom.adapters.base import Adapter, AdapterPart, Binding, Trainable
from rankloom.adapters.dense import Dense, DenseAdapter
from rankloom.adapters.dora import DoRA, DoRAAdapter
from rankloom.adapters.factored import FactoredAdapter
from rankloom.adapters.hydra import Hydra, HydraAdapter
from rankloom.adapters.lora import LoRA, LowRankAdapter
from rankloom.adapters.salt import SALT, SALTAdapter
from rankloom.adapters.selected import Selected, SelectedAdapter

__all__ = [
    "SALT",
    "Adapter",
    "AdapterPart",
    "Binding",
    "Dense",
    "DenseAdapter",
    "DoRA",
    "DoRAAdapter",
    "FactoredAdapter",
    "Hydra",
    "HydraAdapter",
    "LoRA",
    "LowRankAdapter",
    "SALTAdapter",
    "Selected",
    "SelectedAdapter",
    "Trainable",
]
