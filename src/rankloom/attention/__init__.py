"""Nearly-linear attention gradients where a head's norms allow them, with a certificate, and the probe that says where
(computational limits of LoRA, arXiv 2406.03136)."""
