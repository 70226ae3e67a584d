"""The parameterisations: how ``delta`` is made of trainable tensors."""

from rankloom.adapters.base import Adapter, AdapterPart, Binding, Trainable
from rankloom.adapters.dense import Dense, DenseAdapter
from rankloom.adapters.dora import DoRA, DoRAAdapter
from rankloom.adapters.factored import FactoredAdapter
from rankloom.adapters.flylora import FlyLoRA, FlyLoRAAdapter
from rankloom.adapters.fourierft import FourierFT, FourierFTAdapter
from rankloom.adapters.loca import LoCA, LoCAAdapter
from rankloom.adapters.lora import LoRA, LowRankAdapter
from rankloom.adapters.materialized import MaterializedAdapter
from rankloom.adapters.nola import NOLA, NOLAAdapter
from rankloom.adapters.randlora import RandLoRA, RandLoRAAdapter
from rankloom.adapters.vera import VeRA, VeRAAdapter

__all__ = [
    "NOLA",
    "Adapter",
    "AdapterPart",
    "Binding",
    "Dense",
    "DenseAdapter",
    "DoRA",
    "DoRAAdapter",
    "FactoredAdapter",
    "FlyLoRA",
    "FlyLoRAAdapter",
    "FourierFT",
    "FourierFTAdapter",
    "LoCA",
    "LoCAAdapter",
    "LoRA",
    "LowRankAdapter",
    "MaterializedAdapter",
    "NOLAAdapter",
    "RandLoRA",
    "RandLoRAAdapter",
    "Trainable",
    "VeRA",
    "VeRAAdapter",
]
