"""The parameterisations: how ``delta`` is made of trainable tensors."""

from rankloom.adapters.base import Adapter, AdapterPart, Binding, Trainable
from rankloom.adapters.bat import BAT, BATAdapter
from rankloom.adapters.dense import Dense, DenseAdapter
from rankloom.adapters.dora import DoRA, DoRAAdapter
from rankloom.adapters.factored import FactoredAdapter
from rankloom.adapters.lora import LoRA, LowRankAdapter
from rankloom.adapters.materialized import MaterializedAdapter
from rankloom.adapters.miss import MiSS, MiSSAdapter
from rankloom.adapters.sara import SaRA, SaRAAdapter
from rankloom.adapters.snell import SNELL, SNELLAdapter

__all__ = [
    "BAT",
    "SNELL",
    "Adapter",
    "AdapterPart",
    "BATAdapter",
    "Binding",
    "Dense",
    "DenseAdapter",
    "DoRA",
    "DoRAAdapter",
    "FactoredAdapter",
    "LoRA",
    "LowRankAdapter",
    "MaterializedAdapter",
    "MiSS",
    "MiSSAdapter",
    "SNELLAdapter",
    "SaRA",
    "SaRAAdapter",
    "Trainable",
]
