"""THE TABLE: every published method as a recipe. Somebody who reads this file knows the field.

``rankloom.methods.get("lora-one")`` gives the recipe; ``rankloom methods lora-one`` prints it expanded.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankloom.adapters import (
    BAT,
    NOLA,
    SALT,
    SNELL,
    Dense,
    DoRA,
    FlyLoRA,
    FourierFT,
    GINAttention,
    Hydra,
    LoCA,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    RandLoRA,
    SaRA,
    Selected,
    SoKA,
    TLoRA,
    VeRA,
)
from rankloom.errors import RecipeError, near_names
from rankloom.init import (
    ActivationSVD,
    CommonSubspace,
    CovarianceSVD,
    Gaussian,
    GradientBlocks,
    KroneckerSVD,
    OneStepGradient,
    OwnStart,
    QuantizationResidual,
    UpdateSVD,
    WeightLU,
    WeightQR,
    WeightSubspace,
    WeightSVD,
)
from rankloom.lifecycle import FreezeColumns, MergeAndRestart
from rankloom.optim import ALLoRA, LoRAPlus, LoRAPro, Projected, Riemannian
from rankloom.rank import AdaLoRA, SparsityBudget, WeightSpectrum
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

BEST_RANK = "best rank-k approximation with its measured error; merged weights exactly"

BLOCKS = "PEFT MiSS (bat) exactly on linear layers whose sides r divides, else " + BEST_RANK

OFFSET = "the stored weight is never edited: the adapter carries its start and subtracts it, so step 0 is bit-exact."

CHAINED = "exact while links times rank stays below the weight's, else the best approximation; merged weights exactly"
SUMMED = "the stored weight is never edited: the sum of links is kept in float32 beside it and saved with the adapter."

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
    "lokr": Method(
        Recipe(adapter=LoKr(rank=8, alpha=8), init=OwnStart()),
        "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation (LoKr); KronA without low rank",
        "arXiv 2309.14859; 2212.10650",
        "A Kronecker product of two small factors, the second one of low rank, applied without forming it.",
        parameters="m n + r (p + q) per target with out = m p, in = n q, balanced; m n + p q where r >= max(p, q) / 2",
        export="PEFT LoKr exactly on linear layers and convolutions, else " + BEST_RANK,
        deviations="w1 starts at zero as in PEFT (adapter.zero='w2' for LyCORIS's start); alpha / r also where both factors are "
        "whole, as in PEFT, where LyCORIS has 1.",
    ),
    "loha": Method(
        Recipe(adapter=LoHa(rank=8, alpha=8), init=OwnStart()),
        "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning (LoHa)",
        "arXiv 2108.06098",
        "The elementwise product of two low-rank matrices, of rank up to r^2; run as a product of rank r^2 where that is thin.",
        parameters="2 r (in + out) per target",
        export="exact (PEFT LoHa on linear layers and convolutions; plain LoRA of rank r^2, at most min(in, out))",
        deviations="starts with He-uniform factors and w2_b = 0, as PEFT; LyCORIS draws normals and has w2_a = 0.",
    ),
    "soka": Method(
        Recipe(adapter=SoKA(rank=8), init=KroneckerSVD()),
        "SoKA: SVD on Kronecker Adaptation",
        "arXiv 2506.15251",
        "Trains the weight's leading Kronecker terms, as many as its spectrum asks for; what they start as is subtracted.",
        parameters="r (m n + p q) per target with out = m p, in = n q, balanced; r the terms the spectrum asks for, at most rank",
        export=BEST_RANK,
        deviations=OFFSET + " Reconstructed, as no code was released: W itself is decomposed, the factors train "
        "(adapter.train='sigma' for the weights alone), terms are counted by the smaller of 90 % energy and the elbow, "
        "once, or, with adapter.truncate_every, anew in training: the update becomes its own leading terms, moments are dropped.",
    ),
    "tlora": Method(
        Recipe(adapter=TLoRA(rank=6, transform_rank=2), init=OwnStart()),
        "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models",
        "arXiv 2501.08727",
        "A full-rank tensor-ring transform of the weight's input, and a tensor-ring residual.",
        parameters="R^2 sum I_d^2 + R'^2 (sum O_d + sum I_d) per target with in = prod I_d, out = prod O_d",
        export=BEST_RANK,
        deviations="the transform is held as its deviation from the identity, so decay draws it there. Its bonds start random: "
        "with the published 1 / R throughout (adapter.bonds='uniform') all slices move alike: T stays a Kronecker product. The "
        "residual's std, whose constant is not published, is our own; a dimension without balanced factors is padded.",
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
    "svfit": Method(
        Recipe(
            adapter=LoRA(rank=8, alpha=1, scaling="constant", core="diagonal", train="core"),
            init=WeightSubspace(std=0.0, values=False),
        ),
        "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
        "arXiv 2409.05926",
        "Trains the leading singular values of the weight between its frozen singular vectors.",
        parameters="r per target",
        deviations="no code was released. What trains is each value's shift, from zero, so step 0 is bit-exact and weight decay "
        "cannot shrink the pretrained spectrum; init.values=True trains relative shifts instead, and adapter.core='sigmoid' with "
        "it shares the values' sum out anew, as svf.",
    ),
    "svf": Method(
        Recipe(
            adapter=LoRA(rank="full", alpha=1, scaling="constant", core="diagonal", train="core"),
            init=WeightSubspace(std=0.0),
        ),
        "Transformer-Squared: Self-adaptive LLMs (singular value fine-tuning)",
        "arXiv 2501.06252",
        "Scales every singular value of the weight: W = U diag(S (1 + e)) V^T.",
        parameters="min(in, out) per target",
        deviations="trained by any loss, where the paper has REINFORCE with a KL term. The scaling starts at exactly one. "
        "The released code's is a sigmoid, renormalised so that the nuclear norm stays: adapter.core='sigmoid', from 0 where the "
        "code starts around 0.1 (init.std=0.01 for its noise). Set targets.modules to the mlp layers for its choice of them.",
    ),
    "loldu": Method(
        Recipe(adapter=LoRA(rank=8, alpha=8, core="diagonal", train="core"), init=WeightLU()),
        "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
        "arXiv 2410.13618",
        "Trains a diagonal between the frozen triangular factors of the weight's pivoted LU decomposition.",
        parameters="r per target",
        deviations="what trains is z - z0, so the paper's many choices of z0 are one and the same and step 0 is bit-exact for "
        "all; the released code subtracts the pivots whatever z0 is, and holds a dense permutation. Rows whose pivot is tiny "
        "are not divided by it.",
    ),
    "cora": Method(
        Recipe(adapter=LoRA(rank=8, alpha=8, train="A"), init=CommonSubspace()),
        "CoRA: Optimizing Low-Rank Adaptation with Common Subspace of Large Language Models",
        "arXiv 2409.02119",
        "LoRA with B frozen at a basis of the output subspace that related models share; A starts at zero.",
        parameters="r in per target",
        deviations="partly reconstructed, as no code was released: the basis is the leading left singular vectors of the "
        "models' weights side by side (init.references), or of the weight itself where none are given.",
    ),
    "cora-init": Method(
        Recipe(adapter=LoRA(rank=8, alpha=8), init=CommonSubspace()),
        "CoRA: Optimizing Low-Rank Adaptation with Common Subspace of Large Language Models (B trained)",
        "arXiv 2409.02119",
        "LoRA whose B starts at the common basis and trains; A starts at zero.",
        deviations="as cora.",
    ),
    "sbora-fa": Method(
        Recipe(adapter=Selected(rank=8, alpha=16, side="in"), init=OwnStart()),
        "SBoRA: Low-Rank Adaptation with Regional Weight Updates",
        "arXiv 2407.05413",
        "LoRA with A frozen to r standard basis vectors: r columns of the weight learn.",
        parameters="r out per target",
        deviations="the features come from each target's own generator; adapter.select='norm' takes those of the largest columns "
        "instead.",
    ),
    "sbora-fb": Method(
        Recipe(adapter=Selected(rank=8, alpha=16, side="out"), init=OwnStart()),
        "SBoRA: Low-Rank Adaptation with Regional Weight Updates (B frozen)",
        "arXiv 2407.05413",
        "LoRA with B frozen to r standard basis vectors: r rows of the weight learn.",
        parameters="r in per target",
        deviations="as sbora-fa.",
    ),
    "lamda": Method(
        Recipe(adapter=LoRA(rank=8, alpha=16, core="square", train="B+core"), lifecycle=FreezeColumns(eta=0.3)),
        "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation",
        "arXiv 2406.12832",
        "A frozen, an r x r core trained throughout, and a B whose columns are frozen one by one early in the run.",
        parameters="r out + r^2 per target, falling to r^2",
        deviations="the core starts at the identity and B at zero, where the released code has a random core; "
        "init='weight-svd' is the paper's spectral start, subtracted. Columns are frozen to the bit and all of them by eta of "
        "the run; the released code, a factor r short, freezes at most 3, and momentum still moves those.",
    ),
    "lamda++": Method(
        Recipe(
            adapter=LoRA(rank=8, alpha=16, core="square", train="B+core"),
            rank=WeightSpectrum(spread=2.0),
            lifecycle=FreezeColumns(eta=0.3),
        ),
        "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation (LaMDA++)",
        "arXiv 2406.12832",
        "LaMDA with higher ranks where the weight's spectrum is flat, under the same total.",
        parameters="sum of r_l out + r_l^2, sum of r_l as in the recipe",
        deviations="as lamda; the allocation was not released: every layer takes the components it needs for the same share of "
        "its weight's energy, between half and twice the rank, and the total is met exactly.",
    ),
    "salt": Method(
        Recipe(adapter=SALT(rank=8, lora_rank=4), init=OwnStart()),
        "SALT: Singular Value Adaptation with Low-Rank Transformation",
        "arXiv 2503.16055",
        "Scales and shifts the leading singular values; a low-rank matrix acts among the other singular vectors.",
        parameters="2 r + 2 (k - r) q per target, k = min(in, out), q = adapter.lora_rank",
        deviations="Y starts at zero, so step 0 is bit-exact (adapter.start='paper' for the random one, which moves the "
        "function). Nothing is clamped: adapter.clamp='official' clamps every entry of the core, as released, 'diag' the leading "
        "singular values. The regulariser's weight is adapter.penalty, 0 by default.",
    ),
    "hydra": Method(
        Recipe(adapter=Hydra(rank=4, alpha=4), init=OwnStart()),
        "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning",
        "arXiv 2309.06922",
        "A low-rank head on the layer's input and one on its output, both merged into the weight.",
        parameters="r (in + out) + 2 r_s out per target, r_s = r by default; r + r_s + 2 out more with adapter.biases",
        export="exact (rank r + r_s)",
        deviations="heads have no biases, as in the language code, and the one on the output reads it without the frozen bias, "
        "so that the update is a matrix. With adapter.biases both are as in the vision code, and merged into the layers' own "
        "biases. The scale is not trained.",
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
        export="exact (PEFT VeRA with its projections on linear layers; plain LoRA of rank r)",
        deviations="each layer's corner of A is scaled for its own width (the released code scales for the widest, which "
        "makes a layer depend on what else is adapted). The banks come from the seed and are not stored, but for an adapter read "
        "from PEFT (adapter.basis='stored').",
    ),
    "randlora": Method(
        Recipe(adapter=RandLoRA(rank=32, scale=20), init=OwnStart()),
        "RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models",
        "arXiv 2502.00987",
        "An update of full rank: a sum of products of shared random matrices under learned diagonal scales.",
        parameters="ceil(d / r) (d + r) per target, d = min(in, out)",
        export="PEFT RandLoRA exactly on linear layers of equally many terms, or with adapter.order='peft'; else plain LoRA at "
        "full rank exactly, at rank k with its measured error",
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
        export="PEFT FourierFT exactly on linear layers with adapter.places='peft', else " + BEST_RANK,
        deviations="coefficients start at zero (PEFT draws them from N(0, 1) by default, which moves the output). Places come "
        "from a hash of the seed; PEFT's are adapter.places='peft'.",
    ),
    "loca": Method(
        Recipe(adapter=LoCA(coefficients=1000, scale=1), init=OwnStart()),
        "LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning",
        "arXiv 2502.06820",
        "The update is the inverse cosine transform of 1000 learned coefficients whose places are learned as well.",
        parameters="n per target, and 2 n places while those learn",
        export="best rank-k approximation with its measured error; exact (rank n) where n is at most the weight's sides",
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
    "miss": Method(
        Recipe(adapter=MiSS(rank=64), init=OwnStart()),
        "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing",
        "arXiv 2409.15371",
        "One matrix from zero, multiplied with the sum of the input's slices; adapter.mini repeats it along the output too.",
        parameters="r out per target",
        export="exact (PEFT MiSS on linear layers; plain LoRA of rank r)",
        deviations="the paper's unoptimised variant, which shares rows along the output instead of slices of the input, is left "
        "out.",
    ),
    "bat": Method(
        Recipe(adapter=BAT(rank=64), init=OwnStart()),
        "DiSHA: Dimension-Sharding Adaptation of Large Language Models with Fast Convergence and Fast Computation (BAT)",
        "arXiv 2409.15371",
        "Every r x r block of the weight is transformed, W b + b, with one b from zero for all blocks of a block row.",
        parameters="r^2 ceil(out / r) per target",
        export=BLOCKS,
        deviations="sides that r does not divide are padded with zeros, where the released code refuses them. Unmerging takes "
        "the kept base weight, no inverse of I + b.",
    ),
    "bone": Method(
        Recipe(adapter=BAT(rank=64), init=OwnStart()),
        "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models",
        "arXiv 2409.15371",
        "The first version's block-affine form, W b + b, which later versions call BAT; what they call Bone is MiSS.",
        parameters="r^2 ceil(out / r) per target",
        export=BLOCKS,
        deviations="as bat.",
    ),
    "sara": Method(
        Recipe(adapter=SaRA(), init=OwnStart()),
        "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
        "arXiv 2409.06633",
        "Trains the smallest weights only, under a nuclear norm; what has grown by half time is frozen, the rest goes on.",
        parameters="0.15 in out per target",
        export="best rank-k approximation with its measured error; merged weights exactly",
        deviations="the paper, not the released code, which starts from absolute values and whose penalty reaches no trained "
        "tensor. Weight decay pulls towards the pretrained values, not towards zero. The limit is a share of each matrix by "
        "default (adapter.threshold for one for all); vectors and embeddings stay frozen. The penalty is sampled from one "
        "target a step and scaled to stand for all. The first phase's share of the run is not known: one half.",
    ),
    "snell": Method(
        Recipe(adapter=SNELL(dim=16, sparsity=0.9), init=OwnStart()),
        "Expanding Sparse Tuning for Low Memory Usage",
        "arXiv 2411.01800",
        "A matrix of distances between trained points, of which the tenth that is largest survives, chosen anew in every step.",
        parameters="dim (in + out) per target",
        export="best rank-k approximation with its measured error; merged weights exactly",
        deviations="step 0 is exact: both heads start alike and cancel. There, the released sparsifier, which multiplies what "
        "survives with its own magnitude, has no gradient; adapter.sparsify='code' gives it, from heads of their own whose "
        "update is subtracted. Drop-path is left out.",
    ),
    "snella": Method(
        Recipe(
            adapter=SNELL(dim=32, kernel="mixed", sparsity=0.0),
            init=OwnStart(),
            rank=SparsityBudget(target_sparsity=0.3),
        ),
        "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models",
        "arXiv 2510.24037",
        "SNELL with a mixture of kernels, under a global number of nonzero entries that layers compete for by importance.",
        parameters="dim (in + out) + 3 per target",
        export="best rank-k approximation with its measured error; merged weights exactly",
        deviations="as snell; the softmax counts from its mean, 1 / out, which beta could absorb; gamma is trained as its "
        "logarithm. Shares of the budget add up exactly, where the released loop may not end.",
    ),
    "gin-attention": Method(
        Recipe(adapter=GINAttention(hidden=155), init=OwnStart()),
        "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers (sparse GIN fine-tuning)",
        "arXiv 2501.02393",
        "A small graph network on every decoder layer, whose edges are the layer's own attention where it is strong.",
        parameters="2 d d' + 2 c d'^2 + 2 d + (c + 2) d' + 3 per decoder layer of width d, d' = adapter.hidden, c = "
        "adapter.multiplier; and one a head with adapter.aggregate='learned'",
        export="none: it depends on the input and sits on no weight; saved, and served attached",
        deviations="tokens receive from earlier ones; in the released code a filter leaves each its edge to itself "
        "(adapter.edges='self'). All gains start at zero, so step 0 is bit-exact; adapter.start='paper' has them grow with "
        "depth, to 0.5. Gradients stop at the graph; with adapter.detach_adjacency=False they pass, as in the released code. The "
        "learned aggregate weighs heads; the released one is a small network on every entry, which starts near 1/2 on all.",
    ),
    "galore": Method(
        Recipe(targets=EVERYTHING_ELSE, adapter=Dense(), init=OwnStart(), optimizer=Projected(rank=128, every=200)),
        "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        "arXiv 2403.03507",
        "Full-parameter training with AdamW's moments in the top singular subspace of each gradient.",
        parameters="in * out per target, and all other parameters",
        export=BEST_RANK,
        deviations="torch's AdamW (bias-corrected eps, decay before the update) instead of the released code's older one.",
    ),
    "relora": Method(
        Recipe(
            targets=EVERYTHING_ELSE,
            adapter=LoRA(rank=128, alpha=32),
            lifecycle=MergeAndRestart(every=1000, moments="magnitude", prune=0.9),
        ),
        "ReLoRA: High-Rank Training Through Low-Rank Updates",
        "arXiv 2307.05695",
        "LoRA merged and started again every 1000 steps, Adam's moments pruned, so that the sum of updates has high rank.",
        parameters="r (in + out) per target, and all other parameters",
        export=CHAINED,
        deviations=SUMMED
        + " The paper's first, full-rank phase is a run of its own (method full). A is random from the "
        "start, where the released code begins with both factors at zero; restarts rewarm over a tenth of a link. Both "
        "moments are pruned under one mask: with the released code's two, a first moment may lose its second, and the loss of "
        "tiny models jumps to several times what it was.",
    ),
    "cola": Method(
        Recipe(adapter=LoRA(rank=8, alpha=16), init=Gaussian(), lifecycle=MergeAndRestart(every=500)),
        "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning",
        "arXiv 2401.04151",
        "A chain of LoRAs: each is merged, and the next one learns the residual with a fresh optimizer state.",
        export=CHAINED,
        deviations=SUMMED + " Links are of equal length in optimizer steps (lifecycle.every).",
    ),
    "rac-lora": Method(
        Recipe(adapter=LoRA(rank=8, alpha=16, train="B"), lifecycle=MergeAndRestart(every=500)),
        "Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for Low-Rank Adaptation",
        "arXiv 2410.08305",
        "A chain of links with one random, frozen factor each, which converges to what full fine-tuning finds.",
        parameters="r out per target",
        export=CHAINED,
        deviations=SUMMED
        + " A is the frozen side; with_(adapter={'train': 'A'}) freezes B, and adapter.train='all' with "
        "lifecycle.sketch='random' draws the side for each link. The theory's projected step is the trained factor's gradient "
        "over the frozen one's Gram matrix; AdamW, as in the paper's experiments, is none.",
    ),
    "full": Method(
        Recipe(targets=EVERYTHING_ELSE, adapter=Dense(), init=OwnStart()),
        "Full fine-tuning",
        "the baseline",
        "Every parameter trained.",
        parameters="all",
        export=BEST_RANK,
    ),
}


def get(name: str) -> Recipe:
    """The recipe of a method. Raises :class:`RecipeError` with near names for one that is not in the table."""
    if name not in TABLE:
        raise RecipeError(f"unknown method {name!r}{near_names(name, TABLE)} (known: {', '.join(TABLE)})")
    return TABLE[name].recipe
