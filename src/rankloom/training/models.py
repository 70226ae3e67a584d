"""Load a model and its tokenizer by asset name, local path or hub id, for one of the tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rankloom.errors import DataError, RankloomError, near_names
from rankloom.training.assets import ASSETS, cache_dir, fetch, publish

__all__ = ["MODEL_ASSETS", "Loaded", "Task", "load_model", "resolve_dtype", "resolve_model"]

Task = Literal["causal-lm", "sequence-classification", "image-classification"]

MODEL_ASSETS = ("smollm2-135m", "minilm")

_AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer (``None`` for images), the folder or hub id both came from, and its ``new`` modules.

    ``new`` names the modules that the source had no weights for (a classification head): they must be trained whole.
    """

    model: nn.Module
    tokenizer: Any
    source: str
    new: tuple[str, ...] = ()


def resolve_model(name: str, say: Callable[[str], None] | None = None) -> str:
    """A folder or hub id ``from_pretrained`` understands: assets are fetched (and converted) first."""
    if name == "smollm2-135m":
        return str(_converted_smollm2(say))
    if name in MODEL_ASSETS:
        return str(fetch(name, say))
    if name in ASSETS:
        raise DataError(f"'{name}' is a dataset, not a model; models: {', '.join(MODEL_ASSETS)}, a folder or a hub id")
    return name


def load_model(
    name: str,
    task: Task = "causal-lm",
    *,
    dtype: str | torch.dtype = "float32",
    labels: list[str] | None = None,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> Loaded:
    """Load ``name`` for ``task``; a new classification head is drawn from ``seed`` so that runs are reproducible."""
    import transformers

    source = resolve_model(name, say)
    options: dict[str, Any] = {"dtype": resolve_dtype(dtype)}
    if labels is not None:
        options["num_labels"] = len(labels)
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
        # A source that was trained on other classes keeps its body and gets a new head.
        options["ignore_mismatched_sizes"] = True
    with _quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        loader = getattr(transformers, _AUTO[task])
        model, info = _pretrained(
            name, source, lambda: loader.from_pretrained(source, output_loading_info=True, **options)
        )
        tokenizer = None
        if task != "image-classification":
            tokenizer = _pretrained(name, source, lambda: transformers.AutoTokenizer.from_pretrained(source))
            _complete_tokenizer(model, tokenizer)
    missing = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    return Loaded(model, tokenizer, source, tuple(sorted({key.rpartition(".")[0] for key in missing})))


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"bfloat16"`` and the like as torch's own; ``auto`` means bf16 on a GPU, fp32 on a CPU."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if dtype not in _DTYPES:
        raise RankloomError(f"dtype '{dtype}' is unknown; choose one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _pretrained(name: str, source: str, load: Callable[[], Any]) -> Any:
    """Run a ``from_pretrained`` and turn its many ways to fail into one line that names the fix."""
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        if Path(source).exists():
            reason = str(error).strip().splitlines()[0]
            raise RankloomError(f"cannot load a model from {source}: {reason}") from error
        raise RankloomError(
            f"model '{name}' is neither a named model ({', '.join(MODEL_ASSETS)}), nor a folder here, nor reachable on "
            f"the Hugging Face hub{near_names(name, MODEL_ASSETS)}"
        ) from error


def _complete_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Padding needs a token; the end-of-text token serves, because padded positions are masked out everywhere."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        # Sequence classifiers of decoder models read the last token that is not padding, so they must know it.
        config.pad_token_id = tokenizer.pad_token_id


def _converted_smollm2(say: Callable[[str], None] | None) -> Path:
    """SmolLM2 as safetensors in fp32, converted from the packaged GGUF the first time (about half a minute)."""
    folder = cache_dir() / f"smollm2-135m-{ASSETS['smollm2-135m'].version}-safetensors"
    if folder.is_dir():
        return folder
    source = fetch("smollm2-135m", say)
    (say or (lambda _line: None))("smollm2-135m: converting the GGUF file to safetensors (once, about half a minute)")
    return publish(folder, lambda target: _convert_gguf(source, target))


def _convert_gguf(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(source.glob("*.gguf")).name
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        # transformers marks a dequantised GGUF model as quantised and then refuses to save it: a fresh model of the
        # same configuration without the mark takes the (ordinary, dense) weights over.
        config = model.config
        del config.quantization_config
        plain = type(model)(config)
        plain.load_state_dict(model.state_dict())
        plain.tie_weights()
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence load reports and progress bars: they describe what we know (a new head is new)."""
    from transformers.utils import logging as library

    # torchao, imported by transformers where it is installed, reports each GPU library that a CPU build lacks.
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
