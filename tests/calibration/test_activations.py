"""Activation components (EVA's evidence): invariants 2, 3, 7 and 8 of its specification, and bookkeeping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankloom import Calibration, Targets
from rankloom.calibration import activation_components
from rankloom.errors import DataError, TargetError
from rankloom.targets import find_targets
from tests import zoo


class Reader(nn.Module):
    """Two layers that read the input, one that reads another tensor of equal content."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, 3, dtype=torch.float64)
        self.k = nn.Linear(width, 3, dtype=torch.float64)
        self.other = nn.Linear(width, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.other(x.clone())


def fit(batches: list[Tensor], components: int, **settings: Any) -> dict[str, Any]:
    model = Reader(batches[0].shape[-1])
    data = Calibration(batches, lambda m, b: (m(b).mean(), 1.0))
    return activation_components(model, find_targets(model, Targets()), data, components=components, **settings)


def rows(count: int, width: int, decay: float = 0.5, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    scales = decay ** torch.arange(width, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64)).Q
    return (torch.randn(count, width, generator=g, dtype=torch.float64) * scales) @ turn + 3.0


def pca(x: Tensor, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The textbook: eigenvectors of the scatter matrix."""
    mean = x.mean(0) if center else torch.zeros_like(x[0])
    scatter = (x - mean).T @ (x - mean)
    values, vectors = torch.linalg.eigh(scatter)
    return vectors.flip(1), values.flip(0).clamp(min=0).sqrt(), mean


def angle(one: Tensor, other: Tensor) -> float:
    """Sine of the largest principal angle."""
    return float(torch.linalg.matrix_norm(other - one @ (one.T @ other), 2))


@pytest.mark.parametrize("center", [True, False])
def test_one_batch_is_exact_pca(center: bool) -> None:
    x = rows(50, 12)
    found = fit([x], 4, center=center)["q"]
    v, s, mean = pca(x, center)
    torch.testing.assert_close(found.S, s[:4], rtol=1e-9, atol=0)
    assert angle(v[:, :4], found.V) < 1e-9
    torch.testing.assert_close(found.V.T @ found.V, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.ratio, s[:4].square() / s.square().sum(), rtol=1e-9, atol=0)
    assert found.tokens == 50


@pytest.mark.parametrize("center", [True, False])
def test_many_batches_are_exact_where_the_data_fits(center: bool) -> None:
    g = torch.Generator().manual_seed(0)
    low = (
        torch.randn(60, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 12, generator=g, dtype=torch.float64) + 1
    )
    batches = list(low.split([7, 20, 1, 32]))
    found = fit(batches, 5, center=center)["q"]
    v, s, mean = pca(low, center)
    live = 3 if center else 4
    torch.testing.assert_close(found.S[:live], s[:live], rtol=1e-8, atol=0)
    assert found.S[live:].abs().max() < 1e-6 * float(s[0])
    assert angle(v[:, :live], found.V[:, :live]) < 1e-6
    torch.testing.assert_close(found.mean, mean)
    assert found.tokens == 60
    assert float(found.ratio.sum()) == pytest.approx(1, abs=1e-8)


def test_many_batches_span_the_top_directions_of_all_tokens() -> None:
    x = rows(400, 16)
    found = fit(list(x.split(64)), 8)["q"]
    v, s, _ = pca(x, True)
    assert angle(v[:, :4], found.V[:, :4]) < 1e-3
    torch.testing.assert_close(found.ratio[:4], s[:4].square() / s.square().sum(), rtol=1e-3, atol=0)


def test_layers_that_read_one_tensor_share_one_decomposition() -> None:
    found = fit([rows(50, 12)], 4)
    assert found["q"] is found["k"]
    assert found["other"] is not found["q"]
    torch.testing.assert_close(found["other"].V, found["q"].V)


def test_more_components_begin_with_the_same_directions() -> None:
    x = [rows(50, 12)]
    few, many = fit(x, 2)["q"], fit(x, 6)["q"]
    torch.testing.assert_close(many.V[:, :2], few.V, rtol=1e-7, atol=1e-9)


def components(batch: dict[str, Tensor], **settings: Any) -> dict[str, Any]:
    model = zoo.build("llama")
    targets = find_targets(model, Targets())
    return activation_components(model, targets, Calibration([batch], **settings), components=3)


def test_padding_and_unlabelled_tokens_do_not_count() -> None:
    batch = zoo.batch("llama")
    batch["attention_mask"][:2, 5:] = 0
    batch["labels"][:, 0] = -100
    batch["labels"][:2, 5:] = -100
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:2, 5:] = 1  # other padding
    first, second = components(batch), components(changed)
    assert len(first) == 14
    for name, one in first.items():
        assert one.tokens == 4 * 7 - 4 - 4
        torch.testing.assert_close(one.V, second[name].V, rtol=1e-9, atol=1e-10)
    # And they do when the mask says so.
    everything = components(batch, mask_fn=lambda b: None)
    assert all(one.tokens == 28 for one in everything.values())


def test_llama_groups_share_and_others_do_not() -> None:
    found = components(zoo.batch("llama"))
    at = "model.layers.0."
    assert found[f"{at}self_attn.q_proj"] is found[f"{at}self_attn.v_proj"]
    assert found[f"{at}mlp.gate_proj"] is found[f"{at}mlp.up_proj"]
    assert found[f"{at}mlp.up_proj"] is not found[f"{at}self_attn.q_proj"]
    assert found[f"{at}mlp.up_proj"] is not found["model.layers.1.mlp.up_proj"]


def test_nothing_that_counts_is_an_error() -> None:
    batch = {**zoo.batch("llama"), "attention_mask": torch.zeros(4, 7, dtype=torch.long)}
    with pytest.raises(DataError, match="every token is masked or unlabelled"):
        components(batch)


@pytest.mark.parametrize("pattern", ["wte", "wpe"])
def test_look_ups_have_no_activations(pattern: str) -> None:
    model = zoo.build("gpt2", tie_word_embeddings=False)
    with pytest.raises(TargetError, match=f"{pattern} is no linear layer"):
        activation_components(
            model, find_targets(model, Targets((pattern,))), Calibration([zoo.batch("gpt2")]), components=2
        )


def test_half_precision_activations_are_decomposed_in_float32() -> None:
    model = zoo.build("llama", dtype=torch.bfloat16)
    found = activation_components(
        model, find_targets(model, Targets()), Calibration([zoo.batch("llama")]), components=3
    )
    for one in found.values():
        assert one.V.dtype == torch.float32
        torch.testing.assert_close(one.V.T @ one.V, torch.eye(3), rtol=0, atol=1e-5)


def test_the_model_is_left_alone() -> None:
    model = zoo.build("llama").train()
    activation_components(model, find_targets(model, Targets()), Calibration(zoo.batches("llama")), components=2)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(not m._forward_pre_hooks for m in model.modules())
