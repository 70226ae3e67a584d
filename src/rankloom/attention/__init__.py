"""Nearly-linear attention gradients where a head's norms allow them, with a certificate, and the probe that says where
(computational limits of LoRA, arXiv 2406.03136)."""

from rankloom.attention.accelerate import AcceleratedAttention, accelerate_attention
from rankloom.attention.certificate import certify
from rankloom.attention.factored import Factored
from rankloom.attention.precondition import Preconditioner

__all__ = ["AcceleratedAttention", "Factored", "Preconditioner", "accelerate_attention", "certify"]
