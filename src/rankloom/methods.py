"""THE TABLE: every published method as a recipe. Somebody who reads this file knows the field.

``rankloom.methods.get("lora-one")`` gives the recipe; ``rankloom methods lora-one`` prints it expanded.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankloom.adapters import NOLA, Dense, DoRA, FlyLoRA, FourierFT, LoCA, LoRA, RandLoRA, VeRA
from rankloom.errors import RecipeError, near_names
from rankloom.init import (
    ActivationSVD,
    CovarianceSVD,
    Gaussian,
    GradientBlocks,
    OneStepGradient,
    OwnStart,
    QuantizationResidual,
    UpdateSVD,
    WeightQR,
    WeightSubspace,
    WeightSVD,
)
from rankloom.optim import ALLoRA, LoRAPlus, LoRAPro, Projected, Riemannian
from rankloom.rank import AdaLoRA
from rankloom.recipe import Recipe
from rankloom.targets import Targets

__all__ = ["TABLE", "Method", "get"]


@dataclass(frozen=True)
class Method:
    """One published method: its recipe, its paper, and where we, the paper and the released code part ways."""

    recipe: Recipe
    title: str
    paper: str
    summary: str
    parameters: str = "r (in + out) per target"
    export: str = "exact"
    deviations: str = ""


EVERYTHING_ELSE = Targets(train=("*",))  # adapt all linears, train the rest whole

OFFSET = "the stored weight is never edited: the adapter carries its start and subtracts it, so step 0 is bit-exact."

TABLE: dict[str, Method] = {
    "lora": Method(
        Recipe(adapter=LoRA(rank=8, alpha=16)),
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "arXiv 2106.09685",
        "W + (alpha / r) B A, A random, B zero.",
    ),
    "rslora": Method(
        Recipe(adapter=LoRA(rank=8, alpha=16, scaling="rslora")),
        "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        "arXiv 2312.03732",
        "LoRA scaled by alpha / sqrt(r), so that updates do not shrink with rank.",
    ),
    "dora": Method(
        Recipe(adapter=DoRA(rank=8, alpha=16)),
        "DoRA: Weight-Decomposed Low-Rank Adaptation",
        "arXiv 2402.09353",
        "A trainable magnitude per output row times the direction of W + s B A.",
        parameters="r (in + out) + out per target",
        export="exact (PEFT DoRA); plain LoRA only approximately",
    ),
    "lora-one": Method(
        Recipe(adapter=LoRA(rank=8, alpha=16, scaling="rslora"), init=OneStepGradient(gamma=128)),
        "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models",
        "arXiv 2502.01235",
        "LoRA that starts as the best rank-r step along one full negative gradient.",
        deviations="the released code averages micro-batch means with dropout on and takes the first examples; here the mean "
        "is over tokens, without dropout. Triplets come from a three-pass streamed sketch (init.method='exact' for the full "
        "gradient). Directions without gradient start as LoRA's. The theory's preconditioner (eq. 9), which Algorithm 1 leaves "
        "out, is with_(optimizer='riemannian').",
    ),
    "lora-plus": Method(
        Recipe(adapter=LoRA(rank=8, alpha=16), optimizer=LoRAPlus(lr_ratio=16)),
        "LoRA+: Efficient Low Rank Adaptation of Large Models",
        "arXiv 2402.12354",
        "LoRA whose B learns 16 times faster than A.",
        deviations="weight decay never acts on vectors (the released code lets DoRA's magnitudes decay).",
    ),
    "riemannian": Method(
        Recipe(adapter=LoRA(rank=8, alpha=16), optimizer=Riemannian(eps=1e-6)),
        "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models",
        "arXiv 2402.02347",
        "Each factor's gradient over the other's r x r Gram matrix, fed to AdamW (inner='sgd': scaled gradient descent).",
        deviations="both factors step from the old ones, as in the paper; the released AdamW moves A first "
        "(optimizer.order='gauss-seidel'). Adam's moments are bias-corrected; decay comes before the step.",
    ),
    "lora-pro": Method(
        Recipe(adapter=LoRA(rank=8, alpha=16, scaling="rslora"), optimizer=LoRAPro()),
        "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?",
        "arXiv 2407.18242",
        "The pair's gradients that come closest to the full gradient, in closed form, fed to AdamW.",
        deviations="AdamW's moments are of the adjusted gradients; the paper's main form has them in full size "
        "(optimizer.moments='full'). Every layer's own scale is used (the released code has 2 whatever the setting), embeddings "
        "are adjusted too, damping is relative to the Gram's trace.",
    ),
    "allora": Method(
        Recipe(adapter=LoRA(rank=8, alpha=8), optimizer=ALLoRA(eta=2)),
        "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
        "arXiv 2410.09692",
        "No dropout, no scaling factor; the gradient of a row of B grows as the row is smaller.",
        deviations="partly reconstructed, as no code was released: the coefficient acts on B's rows only, before AdamW "
        "(optimizer.acts_on='direction' for after it), and eta = 2 is others' default.",
    ),
    "dora-one": Method(
        Recipe(adapter=DoRA(rank=8, alpha=16, scaling="rslora"), init=OneStepGradient(gamma=128)),
        "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models (DoRA variant)",
        "arXiv 2502.01235",
        "LoRA-One's start under DoRA: the magnitude begins at the norm of the moved weight.",
        parameters="r (in + out) + out per target",
        export="exact (PEFT DoRA); plain LoRA only approximately",
        deviations="as lora-one; held in float32, where the released code has it in float16.",
    ),
    "pissa": Method(
        Recipe(adapter=LoRA(rank=8, alpha=8), init=WeightSVD("principal")),
        "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        "arXiv 2404.02948",
        "Trains the principal singular components of the weight; what they start as is subtracted.",
        export="exact (rank 2r)",
        deviations=OFFSET,
    ),
    "milora": Method(
        Recipe(adapter=LoRA(rank=8, alpha=8), init=WeightSVD("minor")),
        "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning",
        "arXiv 2406.09044",
        "Trains the minor singular components of the weight; what they start as is subtracted.",
        export="exact (rank 2r)",
        deviations=OFFSET,
    ),
    "olora": Method(
        Recipe(adapter=LoRA(rank=8, alpha=8), init=WeightQR()),
        "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
        "arXiv 2406.01775",
        "Starts at the leading part of the weight's QR decomposition, which is subtracted.",
        export="exact (rank 2r)",
        deviations=OFFSET,
    ),
    "corda": Method(
        Recipe(adapter=LoRA(rank=8, alpha=8), init=CovarianceSVD("instruction")),
        "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient "
        "Fine-tuning",
        "arXiv 2406.05223",
        "Trains the weight's components that matter most (or least, mode='knowledge') to the calibration data's covariance.",
        export="exact (rank 2r)",
        deviations=OFFSET
        + " The covariance is the mean over tokens that count; the released code first divides each batch "
        "by its largest activation and counts padding, which weighs batches unequally and changes how B and A share the "
        "product.",
    ),
    "loftq": Method(
        Recipe(adapter=LoRA(rank=8, alpha=8), init=QuantizationResidual()),
        "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
        "arXiv 2310.08659",
        "Starts with the best rank-r part of what quantising the base has lost; init.reference names the original weights.",
        deviations="one alternation (the released default): further ones would move the stored base, which is never edited.",
    ),
    "lora-ga": Method(
        Recipe(adapter=LoRA(rank=8, alpha=16, scaling="rslora"), init=GradientBlocks()),
        "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
        "arXiv 2407.05000",
        "Factors start on two blocks of the full gradient's singular vectors, so the first step approximates it at rank 2r.",
        export="exact (rank 2r)",
        deviations=OFFSET
        + " Triplets come from a three-pass streamed sketch (init.method='exact' for the full gradient), "
        "the gradient's mean is over tokens, without dropout. norm_clip is left out. PEFT scales B by the singular values "
        "and A not at all; the authors' code, followed here, scales both by out^(1/4) / sqrt(gamma).",
    ),
    "lora-sb": Method(
        Recipe(adapter=LoRA(rank=32, alpha=32, core="square", train="core"), init=UpdateSVD()),
        "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
        "arXiv 2411.19557",
        "Trains an r x r core between frozen singular vectors of the first full update, starting as its best rank-r part.",
        parameters="r^2 per target",
        deviations="the sign's triplets are exact (or converged, above 2048 wide), where the released code's randomised SVD "
        "has no oversampling. The gradient is taken without dropout.",
    ),
    "eva": Method(
        Recipe(adapter=LoRA(rank=8, alpha=16), init=ActivationSVD(rho=2.0)),
        "Parameter Efficient Fine-tuning via Explained Variance Adaptation",
        "arXiv 2410.07170",
        "A starts on the principal directions of the inputs, and ranks go where they explain most variance.",
        parameters="sum of r_l (in + out), sum of r_l as in the recipe",
        deviations="one pass over the calibration data as given, where the released code cycles through it until components "
        "stop turning (cosine 0.99). Batches with fewer tokens than components count as well.",
    ),
    "lora-xs": Method(
        Recipe(adapter=LoRA(rank=8, alpha=8, core="square", train="core"), init=WeightSubspace()),
        "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
        "arXiv 2405.17604",
        "Trains an r x r core between frozen singular vectors of the weight.",
        parameters="r^2 per target",
        deviations="exact or converged singular vectors, where the released code has a truncated randomised SVD.",
    ),
    "lora-fa": Method(
        Recipe(adapter=LoRA(rank=8, alpha=16, train="B")),
        "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
        "arXiv 2308.03303",
        "LoRA with A frozen at its random start: no activation of the input's width is needed for its gradient.",
        parameters="r out per target",
    ),
    "nola": Method(
        Recipe(adapter=NOLA(rank=8, alpha=8, bases=512), init=OwnStart()),
        "NOLA: Compressing LoRA using Linear Combination of Random Basis",
        "arXiv 2310.02556",
        "Both factors are learned combinations of 512 random matrices that a seed gives back: the file holds coefficients.",
        parameters="2 k per target, k random matrices a factor",
        deviations="the released code reseeds the global generator in every pass; here values are a function of seed and index, "
        "shared by all layers, A_0 among them. Matrices are U(-1, 1) / sqrt k as for GPT-2 and LLaMA (its vision code differs).",
    ),
    "vera": Method(
        Recipe(adapter=VeRA(rank=256, d_initial=0.1), init=OwnStart()),
        "VeRA: Vector-based Random Matrix Adaptation",
        "arXiv 2310.11454",
        "One frozen random pair for the whole model; every layer learns two vectors that scale its rows and components.",
        parameters="out + r per target",
        deviations="each layer's corner of A is scaled for its own width (the released code scales for the widest, which "
        "makes a layer depend on what else is adapted). The banks come from the seed and are never stored.",
    ),
    "randlora": Method(
        Recipe(adapter=RandLoRA(rank=32, scale=20), init=OwnStart()),
        "RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models",
        "arXiv 2502.00987",
        "An update of full rank: a sum of products of shared random matrices under learned diagonal scales.",
        parameters="ceil(d / r) (d + r) per target, d = min(in, out)",
        export="exact at full rank; at rank k with its measured error",
        deviations="factors are paired as in the equation; PEFT pairs the rows of A by component, the columns of B by term "
        "(adapter.order='peft'). Banks come from the seed in float32, of variance 1 by construction; PEFT draws them in half "
        "precision and divides by their standard deviation.",
    ),
    "flylora": Method(
        Recipe(adapter=FlyLoRA(rank=32, active=8, alpha=64), init=OwnStart()),
        "FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise Mixture-of-Experts",
        "arXiv 2510.08396",
        "A frozen sparse projection picks, by its own activations, which 8 of its 32 rank-one experts act on a token.",
        parameters="r out per target, k out active per token",
        export="none: the update depends on the input (unless adapter.active is the rank)",
        deviations="the released code cuts the gradient to earlier layers (adapter.detach_input=True) and moves the selection "
        "bias in every forward pass, evaluation and micro-batches too; here once per optimizer step, by counts of the tokens "
        "that were learned from.",
    ),
    "fourierft": Method(
        Recipe(adapter=FourierFT(coefficients=1000, scale=150), init=OwnStart()),
        "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform",
        "arXiv 2405.03003",
        "The update is the inverse Fourier transform of 1000 learned coefficients at random places.",
        parameters="n per target",
        export="best rank-k approximation with its measured error; merged weights exactly",
        deviations="coefficients start at zero (PEFT draws them from N(0, 1) by default, which moves the output). Places come "
        "from a hash of the seed; PEFT's are adapter.places='peft'.",
    ),
    "loca": Method(
        Recipe(adapter=LoCA(coefficients=1000, scale=1), init=OwnStart()),
        "LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning",
        "arXiv 2502.06820",
        "The update is the inverse cosine transform of 1000 learned coefficients whose places are learned as well.",
        parameters="n per target, and 2 n places while those learn",
        export="exact (rank n) up to full rank, else the best rank-k approximation with its measured error",
        deviations="phases are counted in optimizer steps (the released code counts training forwards), places learn for a tenth "
        "of the run, and one that was pushed out of its range can come back.",
    ),
    "adalora": Method(
        Recipe(
            adapter=LoRA(rank=12, alpha=12, scaling="triplet", core="diagonal"),
            init=Gaussian(std=0.02),
            rank=AdaLoRA(target_rank=8),
        ),
        "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        "arXiv 2303.10512",
        "SVD-shaped triplets under a global budget that falls to its target by importance.",
        parameters="r (in + out + 1) per target while training, live ranks after export",
        deviations="ties keep the earlier component, so exactly the budget survives (the released code may prune more). "
        "Warm-up and final phase default to 10 % and 30 % of the run, allocation to every 10 steps.",
    ),
    "galore": Method(
        Recipe(targets=EVERYTHING_ELSE, adapter=Dense(), init=OwnStart(), optimizer=Projected(rank=128, every=200)),
        "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        "arXiv 2403.03507",
        "Full-parameter training with AdamW's moments in the top singular subspace of each gradient.",
        parameters="in * out per target, and all other parameters",
        export="best rank-k approximation with its measured error; merged weights exactly",
        deviations="torch's AdamW (bias-corrected eps, decay before the update) instead of the released code's older one.",
    ),
    "full": Method(
        Recipe(targets=EVERYTHING_ELSE, adapter=Dense(), init=OwnStart()),
        "Full fine-tuning",
        "the baseline",
        "Every parameter trained.",
        parameters="all",
        export="best rank-k approximation with its measured error; merged weights exactly",
    ),
}


def get(name: str) -> Recipe:
    """The recipe of a method. Raises :class:`RecipeError` with near names for one that is not in the table."""
    if name not in TABLE:
        raise RecipeError(f"unknown method {name!r}{near_names(name, TABLE)} (known: {', '.join(TABLE)})")
    return TABLE[name].recipe
