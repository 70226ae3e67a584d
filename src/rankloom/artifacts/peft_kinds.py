"""PEFT's forms beside LoRA, both ways: what their settings and tensors are called there and here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rankloom import adapters as ours
from rankloom.adapters import AdapterPart
from rankloom.artifacts.peft_format import CONFIG, of_pattern, pattern_keys
from rankloom.errors import ArtifactError
from rankloom.layers import Conv1DLayer, Conv2dLayer, Layer, LinearLayer
from rankloom.targets import exact_pattern

__all__ = ["KINDS", "Config", "PeftKind", "of_type"]

Config = Mapping[str, Any]


@dataclass(frozen=True)
class PeftKind:
    """A form of ours that PEFT has: ``part`` reads PEFT's settings for the adapted modules, ``settings`` writes them.

    ``names`` are PEFT's tensors by our parameters, ``banks`` those that all modules share, by the adapters' attributes; PEFT's
    have ``dims`` dimensions. ``reads`` are the settings of PEFT that count, ``unlike`` those it adds for its own use.
    ``takes_scale`` is the parameter that our scale goes into, where PEFT has none. ``limit`` says why PEFT cannot hold an
    adapter of this form.
    """

    peft_type: str
    names: Mapping[str, str]
    reads: str
    part: Callable[[Config, Collection[str]], AdapterPart]
    settings: Callable[[Any, Collection[str]], dict[str, Any]]
    layers: tuple[type[Layer], ...] = (LinearLayer, Conv1DLayer)
    banks: Mapping[str, str] = field(default_factory=dict)
    dims: int = 2
    takes_scale: str | None = None
    limit: Callable[[Any, list[Any]], str | None] = lambda part, bindings: None


def of_type(peft_type: str) -> list[PeftKind]:
    """The kinds that PEFT calls so: several where a setting of PEFT chooses the form."""
    return [kind for kind in KINDS.values() if kind.peft_type == peft_type]


# --- LyCORIS' forms: a rank and an alpha for each module -------------------------------------------------------------------


def _ranks(config: Config, names: Collection[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"rank": int(config["r"]), "alpha": float(config["alpha"])}
    for setting, kind in (("rank", int), ("alpha", float)):
        given = config.get(f"{setting}_pattern") or {}
        values = {n: kind(given[key]) for n in names if (key := of_pattern(given, n)) is not None}
        found[f"{setting}_pattern"] = {exact_pattern(n, names): v for n, v in values.items() if v != found[setting]}
    return found


def _rank_settings(part: Any, names: Collection[str]) -> dict[str, Any]:
    ranks = {n: r for n in names if (r := part.rank_of(n)) != part.rank}
    alphas = {n: a for n in names if (a := part.alpha_of(n)) != part.alpha}
    patterns = {"rank_pattern": pattern_keys(ranks, names), "alpha_pattern": pattern_keys(alphas, names)}
    return {"r": part.rank, "alpha": part.alpha, **patterns, "init_weights": True}


def _loha(config: Config, names: Collection[str]) -> AdapterPart:
    return ours.LoHa(**_ranks(config, names))


def _lokr(config: Config, names: Collection[str]) -> AdapterPart:
    return ours.LoKr(
        **_ranks(config, names),
        decompose_both=bool(config.get("decompose_both")),
        decompose_factor=int(config.get("decompose_factor") or -1),
        zero="w2" if config.get("init_weights") == "lycoris" else "w1",
    )


def _lokr_settings(part: ours.LoKr, names: Collection[str]) -> dict[str, Any]:
    own = {"decompose_both": part.decompose_both, "decompose_factor": part.decompose_factor}
    return {**_rank_settings(part, names), **own, "init_weights": "lycoris" if part.zero == "w2" else True}


# --- MiSS, of which BAT is an `init_weights` there -------------------------------------------------------------------------


def _miss(config: Config, names: Collection[str]) -> AdapterPart:
    rank, start = int(config["r"]), config.get("init_weights", True)
    if start not in (True, False, "bat", "mini"):
        raise ArtifactError(f"{CONFIG} sets init_weights to {start!r}, which rankloom does not have: merge it in peft")
    if start == "bat":
        return ours.BAT(rank=rank)
    return ours.MiSS(rank=rank, mini=int(config["mini_r"]) if start == "mini" else None)


def _miss_settings(part: ours.MiSS, names: Collection[str]) -> dict[str, Any]:
    return {"r": part.rank, "init_weights": "mini" if part.mini else True, "mini_r": part.mini or 1}


def _bat_settings(part: ours.BAT, names: Collection[str]) -> dict[str, Any]:
    return {"r": part.rank, "init_weights": "bat"}


def _bat_limit(part: ours.BAT, bindings: list[Any]) -> str | None:
    odd = [b for b in bindings if any(side % part.rank for side in b.target.shape)]
    return (
        f"PEFT has it for sides that rank {part.rank} divides, {odd[0].name} is {odd[0].target.shape}" if odd else None
    )


# --- random places and bases -----------------------------------------------------------------------------------------------


def _fourierft(config: Config, names: Collection[str]) -> AdapterPart:
    count, seed = int(config["n_frequency"]), int(config["random_loc_seed"])
    return ours.FourierFT(coefficients=count, scale=float(config["scaling"]), places="peft", seed=seed)


def _fourierft_settings(part: ours.FourierFT, names: Collection[str]) -> dict[str, Any]:
    return {"n_frequency": part.coefficients, "scaling": part.scale, "random_loc_seed": part.seed, "init_weights": True}


def _fourierft_limit(part: ours.FourierFT, bindings: list[Any]) -> str | None:
    return None if part.places == "peft" else "PEFT draws other places (adapter.places='peft' before training has them)"


def _vera(config: Config, names: Collection[str]) -> AdapterPart:
    rank, start = int(config["r"]), float(config.get("d_initial", 0.1))
    return ours.VeRA(rank=rank, d_initial=start, dropout=float(config.get("vera_dropout") or 0), basis="stored")


def _vera_settings(part: ours.VeRA, names: Collection[str]) -> dict[str, Any]:
    return {"r": part.rank, "d_initial": part.d_initial, "vera_dropout": part.dropout, "save_projection": True}


def _randlora(config: Config, names: Collection[str]) -> AdapterPart:
    rank, dropout = int(config["r"]), float(config.get("randlora_dropout") or 0)
    scale = float(config["randlora_alpha"]) / rank
    return ours.RandLoRA(rank=rank, scale=scale, order="peft", basis="stored", dropout=dropout)


def _randlora_settings(part: ours.RandLoRA, names: Collection[str]) -> dict[str, Any]:
    own = {"randlora_alpha": part.scale * part.rank, "randlora_dropout": part.dropout, "save_projection": True}
    return {"r": part.rank, **own}


def _randlora_limit(part: ours.RandLoRA, bindings: list[Any]) -> str | None:
    terms = {len(b.adapter.gam) for b in bindings}
    if part.order == "peft" or len(terms) == 1:
        return None
    return f"PEFT pairs the bases of modules of {min(terms)} and {max(terms)} terms otherwise (adapter.order='peft')"


_BANKED = "r save_projection projection_prng_key init_weights"

KINDS = {
    "lokr": PeftKind(
        "LOKR",
        {n: f"lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
        "r alpha rank_pattern alpha_pattern decompose_both decompose_factor use_effective_conv2d init_weights",
        _lokr,
        _lokr_settings,
        layers=(LinearLayer, Conv2dLayer),
    ),
    "loha": PeftKind(
        "LOHA",
        {n: f"hada_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        "r alpha rank_pattern alpha_pattern use_effective_conv2d init_weights",
        _loha,
        _rank_settings,
        layers=(LinearLayer, Conv2dLayer),
    ),
    "miss": PeftKind(
        "MISS",
        {"D": "miss_block"},
        "r mini_r init_weights",
        _miss,
        _miss_settings,
        layers=(LinearLayer,),
    ),
    "bat": PeftKind(
        "MISS",
        {"b": "miss_block"},
        "r mini_r init_weights",
        _miss,
        _bat_settings,
        layers=(LinearLayer,),
        limit=_bat_limit,
    ),
    "fourierft": PeftKind(
        "FOURIERFT",
        {"c": "fourierft_spectrum"},
        "n_frequency scaling random_loc_seed init_weights",
        _fourierft,
        _fourierft_settings,
        limit=_fourierft_limit,
    ),
    "vera": PeftKind(
        "VERA",
        {"b": "vera_lambda_b", "d": "vera_lambda_d"},
        f"{_BANKED} vera_dropout d_initial",
        _vera,
        _vera_settings,
        banks={"below": "vera_A", "above": "vera_B"},
        takes_scale="d",
    ),
    "randlora": PeftKind(
        "RANDLORA",
        {"lam": "randlora_lambda", "gam": "randlora_gamma"},
        f"{_BANKED} randlora_alpha randlora_dropout sparse very_sparse",
        _randlora,
        _randlora_settings,
        banks={"small": "randlora_A", "large": "randlora_B"},
        dims=3,
        limit=_randlora_limit,
    ),
}
