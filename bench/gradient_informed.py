"""Starts and updates informed by gradients, weights and activations, beside LoRA, full fine-tuning and PEFT's own starts.

Question: at equal steps, data and search, which method has the lower loss after 10, 25, 50 and 100 % of the steps, and is the
difference to LoRA larger than the spread over seeds?

Protocol, the same for every method. Rank 8 on the same weights (what trains otherwise is stated beside each). A search of
four learning rates, a factor of about 3 apart, one complete run each with seed 0; the lowest validation loss after the last
step wins. Then runs with fresh seeds (order of the data, calibration examples, random parts) at that rate, whose curves are
taken on test rows that nothing was chosen on. Where a method's rates are known to lie elsewhere, its four are moved along
the same ladder (``Method.shift``). AdamW without decay, clipping at 1, 5 % warm-up, linear decay. Whatever trains is
float32; SmolLM2's frozen weights are bfloat16, and its full fine-tuning trains all linear weights. Intervals are 95 %
Student intervals over seeds; the difference to LoRA is paired, seed by seed, as data and order are the same.

A new classification head starts from ridge-regularised logistic regression on frozen features of training rows, once for
all methods: behind a random head the first gradient is noise.

Every finished run is a line of a JSONL file beside the result, and is not run again.

    python bench/gradient_informed.py --json bench/results/gradient_informed.json
"""

from __future__ import annotations

from fine_tuning import Method
from study import Study

# Steps on the ladder against LoRA's rates: starts that are as large as the weights, and updates that mimic full ones, are
# known to want smaller rates (about a third of LoRA's and less), bare cores larger ones.
METHODS = {
    "lora": Method("lora"),
    "full": Method("full", shift=-2),
    "lora-one": Method("lora-one"),
    "lora-ga": Method("lora-ga", shift=-1),
    "lora-sb": Method("lora-sb", shift=1),
    "lora r=32": Method("lora", (("adapter.rank", 32), ("adapter.alpha", 64.0))),  # LoRA-SB's rank: what its cores save
    "pissa": Method("pissa", shift=-1),
    "rslora": Method("rslora"),
    "lora-plus": Method("lora-plus", shift=-1),
    "lora-fa": Method("lora-fa"),
    "lora-pro": Method("lora-pro", shift=-1),
    "riemannian": Method("riemannian"),
    "lora-one + riemannian": Method("lora-one", (("optimizer.kind", "riemannian"),)),
    "dora-one": Method("dora-one"),
    "eva": Method("eva"),
    "allora": Method("allora"),
    "olora": Method("olora", shift=-1),
    "milora": Method("milora", shift=-1),
    "corda": Method("corda", shift=-1),
    "lora-xs": Method("lora-xs", shift=1),
    "peft lora-ga": Method(peft="lora_ga", shift=-1),
    "peft pissa": Method(peft="pissa", shift=-1),
    "peft eva": Method(peft="eva"),
}
DRAWN = {
    "lora": "tab:gray",
    "lora-one": "tab:blue",
    "lora-ga": "tab:orange",
    "lora-sb": "tab:green",
    "pissa": "tab:purple",
    "full": "black",
}
STUDY = Study("gradient_informed", __doc__.split("\n")[0], METHODS, DRAWN)

if __name__ == "__main__":
    STUDY.main()
