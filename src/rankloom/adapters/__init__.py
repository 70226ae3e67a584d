"""The parameterisations: how ``delta`` is made of trainable tensors."""

from rankloom.adapters.base import Adapter, AdapterPart, Binding, Trainable
from rankloom.adapters.dense import Dense, DenseAdapter
from rankloom.adapters.dora import DoRA, DoRAAdapter
from rankloom.adapters.factored import FactoredAdapter
from rankloom.adapters.kronecker import KroneckerAdapter
from rankloom.adapters.loha import LoHa, LoHaAdapter
from rankloom.adapters.lokr import LoKr, LoKrAdapter
from rankloom.adapters.lora import LoRA, LowRankAdapter
from rankloom.adapters.materialized import MaterializedAdapter
from rankloom.adapters.soka import SoKA, SoKAAdapter
from rankloom.adapters.tlora import TLoRA, TLoRAAdapter

__all__ = [
    "Adapter",
    "AdapterPart",
    "Binding",
    "Dense",
    "DenseAdapter",
    "DoRA",
    "DoRAAdapter",
    "FactoredAdapter",
    "KroneckerAdapter",
    "LoHa",
    "LoHaAdapter",
    "LoKr",
    "LoKrAdapter",
    "LoRA",
    "LowRankAdapter",
    "MaterializedAdapter",
    "SoKA",
    "SoKAAdapter",
    "TLoRA",
    "TLoRAAdapter",
    "Trainable",
]
