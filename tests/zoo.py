"""Tiny seeded models of every kind the library meets, all called alike: ``model(**batch)`` has ``.logits`` and ``.loss``."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import rankloom
from rankloom import Calibration, Recipe
from rankloom.adapters import LayerAdapterPart
from rankloom.errors import TargetError
from rankloom.layers import layer_of
from rankloom.quantized import dense, is_quantized
from rankloom.targets import Target

VOCAB = 40


class ConvNet(nn.Module):
    """Two convolutions with in-place activations, a grouped one, and a classifier."""

    def __init__(self, channels: int = 3, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        self.mix = nn.Linear(width, width + 4)
        self.head = nn.Linear(width + 4, classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        h = self.act(self.stem(pixel_values))
        h = self.act(self.body(h)).mean((2, 3))
        logits = self.head(F.gelu(self.mix(h)))
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def gpt2(**changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {
        "vocab_size": VOCAB,
        "n_positions": 32,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return GPT2LMHeadModel(GPT2Config(**{**settings, **changes}))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
            num_labels=3,
        )
    )


def vit(**changes: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 8,
        "patch_size": 4,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
        "num_labels": 3,
    }
    return ViTForImageClassification(ViTConfig(**{**settings, **changes}))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def mixtral(**changes: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**{**_MIXTURE, "num_local_experts": 4, **changes}))


def qwen_moe(**changes: Any) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**_MIXTURE, "num_experts": 4, "head_dim": 8, **changes}))


def gpt_oss(**changes: Any) -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**{**_MIXTURE, "num_local_experts": 4, "head_dim": 8, **changes}))


_MIXTURE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def _tokens(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (rows, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _sentences(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    batch = _tokens(generator, rows)
    return {**batch, "labels": torch.randint(3, (rows,), generator=generator)}


def _pairs(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    return {**_tokens(generator, rows), "labels": torch.randint(3, VOCAB, (rows, 5), generator=generator)}


def _images(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    pixels = torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(3, (rows,), generator=generator)}


_KINDS: dict[str, tuple[Callable[..., nn.Module], Callable[[torch.Generator, int], dict[str, Tensor]]]] = {
    "llama": (llama, _tokens),
    "gpt2": (gpt2, _tokens),
    "bert": (bert, _sentences),
    "vit": (vit, _images),
    "t5": (t5, _pairs),
    "convnet": (ConvNet, _images),
}
MODELS = tuple(_KINDS)
_KINDS |= {"mixtral": (mixtral, _tokens), "qwen-moe": (qwen_moe, _tokens), "gpt-oss": (gpt_oss, _tokens)}
MIXTURES = tuple(kind for kind in _KINDS if kind not in MODELS)  # their experts are targets by name only


def build(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """A model in evaluation mode, the same one for the same seed; biases and norms are not at their trivial start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _KINDS[kind][0](**changes)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return without_float32(model).to(dtype).eval()


def _rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _next_token_loss(logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def without_float32(model: nn.Module) -> nn.Module:
    """Compute in the weights' own dtype: the originals pass through float32 inside norms and the loss, which would bound
    every comparison in float64 at 1e-7."""
    for module in model.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "T5LayerNorm") or type(module).__name__.endswith("MoeRMSNorm"):
            module.__class__ = type("RMSNorm", (type(module),), {"forward": _rms_norm})
    if any(type(module).__name__.endswith("Experts") for module in model.modules()):
        model.set_experts_implementation("eager")  # torch's grouped product, the default, has no float64
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        model.loss_function = _next_token_loss
    return model


def batch(kind: str, seed: int = 0, rows: int = 4) -> dict[str, Tensor]:
    """A labelled batch for a model kind."""
    return _KINDS[kind][1](torch.Generator().manual_seed(seed), rows)


def batches(kind: str, count: int = 2, rows: int = 4) -> list[dict[str, Tensor]]:
    """Some labelled batches."""
    return [batch(kind, 100 + index, rows) for index in range(count)]


_SMALL = {
    "rank": 3,
    "target_rank": 2,
    "every": 3,
    "interval": 2,
    "d_initial": 1.0,
    "active": 2,
    "coefficients": 12,
    "hidden": 6,
}


def tiny(recipe: Recipe) -> Recipe:
    """A table recipe with its sizes cut to tiny models: by the settings' common names, so new methods need no entry here."""
    slots = {}
    for slot, part in recipe.parts().items():
        names = {f.name for f in dataclasses.fields(part)}
        sizes = {k: v for k, v in _SMALL.items() if k in names and getattr(part, k) != "full"}
        slots[slot] = dataclasses.replace(part, **sizes)
    return Recipe(**slots)


def recipe_of(method: str) -> Recipe:
    """The tiny recipe of a method."""
    return tiny(rankloom.methods.get(method))


def is_matrix(method: str) -> bool:
    """Whether the form's update is a matrix, so that it can be compared with one and merged."""
    if isinstance(recipe_of(method).adapter, LayerAdapterPart):
        return False
    layer = layer_of(nn.Linear(32, 32))
    assert layer is not None
    adapter = recipe_of(method).adapter.build(Target("layer", layer, "layer"))
    return adapter.linear_in_x and adapter.mergeable


def require_matrix(method: str) -> None:
    """Skip a test about the matrix of an update that is none."""
    if not is_matrix(method):
        pytest.skip(f"{method}: its update depends on the input and is no matrix")


def require_weight(method: str) -> None:
    """Skip a test about adapting chosen weights for a form that sits on none."""
    if isinstance(recipe_of(method).adapter, LayerAdapterPart):
        pytest.skip(f"{method}: it sits on decoder layers, not on weights")


_FILES = tempfile.TemporaryDirectory()


def with_reference(recipe: Recipe, model: nn.Module) -> Recipe:
    """Where the init compares with the weights before quantisation: the model's own, moved a little, in a file."""
    if getattr(recipe.init, "reference", None) != "":
        return recipe
    generator = torch.Generator().manual_seed(11)
    path = Path(_FILES.name) / f"{len(list(Path(_FILES.name).iterdir()))}.safetensors"
    weights = {}
    for name, tensor in model.state_dict().items():
        plain = dense(tensor) if is_quantized(tensor) else tensor
        wide = plain.to(torch.promote_types(plain.dtype, torch.float32))
        weights[name] = wide + 0.01 * torch.randn(wide.shape, generator=generator, dtype=wide.dtype)
    save_file(weights, path)
    return recipe.with_({"init.reference": str(path)})


def adapted(
    method: str | Recipe, model: nn.Module, kind: str, *, seed: int = 0, calibrate: list[Any] | None = None
) -> rankloom.Adaptation:
    """A method (tiny) or a recipe (as given) on a model, with calibration data at hand.

    Skips where the form sits on decoder layers and refuses the model because it has none.
    """
    recipe = with_reference(recipe_of(method) if isinstance(method, str) else method, model)
    try:
        return rankloom.adapt(model, recipe, Calibration(calibrate or batches(kind)), seed=seed)
    except TargetError as refused:
        if isinstance(recipe.adapter, LayerAdapterPart) and "has no pre-norm decoder layer" in str(refused):
            pytest.skip(f"{kind}: {refused}")
        raise


@torch.no_grad()
def perturb(handle: rankloom.Adaptation, size: float = 0.05, seed: int = 7) -> None:
    """Move every trainable tensor away from its start, so that nothing is true by being zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in handle.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's output on a batch, in evaluation mode."""
    mode = model.training
    out = model.eval()(**inputs).logits
    model.train(mode)
    return out


def train(
    handle: rankloom.Adaptation,
    optimizer: torch.optim.Optimizer,
    data: list[dict[str, Tensor]],
    steps: int,
    *,
    start: int = 0,
) -> list[float]:
    """A plain loop: ``steps`` steps over ``data``, cycling; the losses."""
    handle.model.train()
    losses = []
    for step in range(start, start + steps):
        loss = handle.model(**data[step % len(data)]).loss
        loss.backward()
        losses.append(float(loss.detach()))
        handle.step()
    return losses


@torch.no_grad()
def add_to_weight(module: nn.Module, delta: Tensor, rows: tuple[int, int] | None = None) -> None:
    """Merge by hand, independent of the library's views: ``delta`` (out, in) into the module's own layout."""
    transposed = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
    matrix = module.weight.T if transposed else module.weight.flatten(1)
    matrix[slice(*rows) if rows else slice(None)] += delta


def merged_copy(handle: rankloom.Adaptation, bare: nn.Module) -> nn.Module:
    """A bare copy of the model with every update added by hand and every whole parameter copied over."""
    for binding in handle.bindings:
        if (index := getattr(binding.layer, "index", None)) is not None:  # an expert of a 3-D parameter
            delta = binding.adapter.delta(binding.layer).detach()
            transposed = bare.config.model_type == "gpt_oss"
            bare.get_parameter(binding.target.module_name).data[index] += delta.T if transposed else delta
            continue
        module = bare.get_submodule(binding.target.module_name)
        if (moved := binding.adapter.bias_delta(binding.layer)) is not None:
            module.bias.data[slice(*(binding.layer.rows or (None,)))] += moved.detach()
        add_to_weight(module, binding.adapter.delta(binding.layer).detach(), binding.layer.rows)
    own = dict(bare.named_parameters())
    for name, parameter in handle.named_parameters().items():
        if name.startswith("whole."):
            own[name.removeprefix("whole.")].data.copy_(parameter.detach())
    return bare
