"""The parameterisations: how ``delta`` is made of trainable tensors."""

from rankloom.adapters.base import Adapter, AdapterPart, Binding, Form, Trainable
from rankloom.adapters.bat import BAT, BATAdapter
from rankloom.adapters.chain import ChainAdapter
from rankloom.adapters.dense import Dense, DenseAdapter
from rankloom.adapters.dora import DoRA, DoRAAdapter
from rankloom.adapters.factored import FactoredAdapter
from rankloom.adapters.flylora import FlyLoRA, FlyLoRAAdapter
from rankloom.adapters.fourierft import FourierFT, FourierFTAdapter
from rankloom.adapters.gin_attention import GINAttention, GINAttentionAdapter
from rankloom.adapters.hydra import Hydra, HydraAdapter
from rankloom.adapters.kronecker import KroneckerAdapter
from rankloom.adapters.layer import LayerAdapter, LayerAdapterPart
from rankloom.adapters.loca import LoCA, LoCAAdapter
from rankloom.adapters.loha import LoHa, LoHaAdapter
from rankloom.adapters.lokr import LoKr, LoKrAdapter
from rankloom.adapters.lora import LoRA, LowRankAdapter
from rankloom.adapters.materialized import MaterializedAdapter
from rankloom.adapters.miss import MiSS, MiSSAdapter
from rankloom.adapters.nola import NOLA, NOLAAdapter
from rankloom.adapters.randlora import RandLoRA, RandLoRAAdapter
from rankloom.adapters.salt import SALT, SALTAdapter
from rankloom.adapters.sara import SaRA, SaRAAdapter
from rankloom.adapters.selected import Selected, SelectedAdapter
from rankloom.adapters.snell import SNELL, SNELLAdapter
from rankloom.adapters.soka import SoKA, SoKAAdapter
from rankloom.adapters.tlora import TLoRA, TLoRAAdapter
from rankloom.adapters.vera import VeRA, VeRAAdapter

__all__ = [
    "BAT",
    "NOLA",
    "SALT",
    "SNELL",
    "Adapter",
    "AdapterPart",
    "BATAdapter",
    "Binding",
    "ChainAdapter",
    "Dense",
    "DenseAdapter",
    "DoRA",
    "DoRAAdapter",
    "FactoredAdapter",
    "FlyLoRA",
    "FlyLoRAAdapter",
    "Form",
    "FourierFT",
    "FourierFTAdapter",
    "GINAttention",
    "GINAttentionAdapter",
    "Hydra",
    "HydraAdapter",
    "KroneckerAdapter",
    "LayerAdapter",
    "LayerAdapterPart",
    "LoCA",
    "LoCAAdapter",
    "LoHa",
    "LoHaAdapter",
    "LoKr",
    "LoKrAdapter",
    "LoRA",
    "LowRankAdapter",
    "MaterializedAdapter",
    "MiSS",
    "MiSSAdapter",
    "NOLAAdapter",
    "RandLoRA",
    "RandLoRAAdapter",
    "SALTAdapter",
    "SNELLAdapter",
    "SaRA",
    "SaRAAdapter",
    "Selected",
    "SelectedAdapter",
    "SoKA",
    "SoKAAdapter",
    "TLoRA",
    "TLoRAAdapter",
    "Trainable",
    "VeRA",
    "VeRAAdapter",
]
