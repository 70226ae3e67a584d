"""GIN attention against its formula, written out with full attention matrices, and its invariants on whole models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rankloom
from rankloom.adapters import GINAttention
from rankloom.adapters.gin_attention import GINAttentionAdapter
from rankloom.attended import Attention
from rankloom.blocks import find_blocks
from rankloom.errors import RecipeError
from rankloom.targets import Targets
from tests import zoo
from tests.test_blocks import gin, left_padded

B, H, KV, N, DH, D = 2, 4, 2, 7, 5, 16


def adapter(**settings: Any) -> GINAttentionAdapter:
    made = GINAttention(**{"hidden": 6, "multiplier": 2, **settings}).build(
        find_blocks(zoo.build("llama"), Targets("layers.1"))[0]
    )
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) / 2)
    return made


def call(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (B, N, D), (B, H, N, DH), (B, KV, N, DH)
    h, q, k = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    return h.requires_grad_(), (2 * q).requires_grad_(), k.requires_grad_()


def formula(a: GINAttentionAdapter, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The card's equations 1 to 5."""
    s, p = a.settings, dict(a.named_parameters())
    if s.detach_adjacency:
        q, k = q.detach(), k.detach()
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(H // KV, 1)) / math.sqrt(DH)
    probabilities = logits.masked_fill(~causal, -math.inf).softmax(-1)
    if s.aggregate == "learned":
        probabilities = p["heads"][:, None, None] * probabilities
    strength = probabilities.mean(1) if s.aggregate == "mean" else probabilities.sum(1).clamp(max=1)
    keep = causal & (strength > s.threshold + math.log(s.cutoff / (1 - s.cutoff)) / s.sharpness)
    own = torch.eye(N, dtype=torch.bool)
    keep = keep & {"causal": torch.ones_like(own), "past": ~own, "self": own}[s.edges]
    w = torch.sigmoid(s.sharpness * (strength - s.threshold)) * keep

    def act(u: Tensor) -> Tensor:
        return torch.where(u > 0, u, p["slope"] * u)

    x = h @ p["W_in"].T + p["b_in"]
    m = p["eps"] * x + w @ x
    u = act(m @ p["W_1"].T + p["b_1"]) @ p["W_2"].T + p["b_2"] + m
    z = act(u) @ p["W_out"].T + p["b_out"]
    if s.norm:
        z = p["norm"] * z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return p["gain"] * z


SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "learning graph": {"detach_adjacency": False},
    "mean": {"aggregate": "mean", "threshold": 0.2, "detach_adjacency": False},
    "self": {"edges": "self"},
    "past": {"edges": "past"},
    "learned": {"aggregate": "learned"},
    "learned past": {"aggregate": "learned", "edges": "past", "detach_adjacency": False},
    "no norm": {"norm": False, "multiplier": 1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_gradients_are_the_formula(name: str) -> None:
    made = adapter(**SETTINGS[name]).eval()
    h, q, k = call()
    leaves = [h, q, k, *made.parameters()]
    got = made(h, Attention(q, k, None, 1 / math.sqrt(DH)))
    want = formula(made, h, q, k)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert want.abs().max() > 0.1
    pull = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    grads = (torch.autograd.grad(y, leaves, pull, allow_unused=True) for y in (got, want))
    for g, w in zip(*grads, strict=True):
        assert (g is None) == (w is None)
        if g is not None and w is not None:
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_the_released_filter_leaves_tokens_alone() -> None:
    """``edges="self"``: another token's state reaches a token's update neither in value nor by gradient."""
    made = adapter(edges="self").eval()
    h, q, k = call()
    attention = Attention(q, k, None, 1 / math.sqrt(DH))
    before = made(h, attention)
    (grad,) = torch.autograd.grad(before[:, 4].sum(), h)
    assert grad[:, 4].any() and not grad[:, :4].any() and not grad[:, 5:].any()
    moved = h.detach().clone()
    moved[:, 2] += 1.0
    after = made(moved, attention)
    changed = (after != before).any(-1)
    assert changed[:, 2].all() and changed.sum() == B
    assert (adapter().eval()(moved, attention) != adapter().eval()(h, attention)).any(-1).sum() > B


def test_without_loops_a_token_counts_by_eps_alone() -> None:
    """``edges="past"``: at ``eps = 0`` a token's own state reaches no message of its own, and the first token has none."""
    made = adapter(edges="past").eval()
    made.eps.data.zero_()
    h, q, k = call()
    attention = Attention(q, k, None, 1 / math.sqrt(DH))
    before = made(h, attention)
    (grad,) = torch.autograd.grad(before[:, 4].sum(), h)
    assert grad[:, :4].any() and not grad[:, 4:].any()
    silent = made(torch.zeros_like(h), attention)[:, 0]
    empty = made._linear("2", made._act(made._linear("1", torch.zeros(6, dtype=torch.float64))))
    z = made._linear("out", made._act(empty))
    alone = made.gain * made.norm * z / (z.square().mean() + 1e-6).sqrt()
    torch.testing.assert_close(before[:, 0], alone.expand(B, D), rtol=1e-12, atol=1e-12)
    assert torch.equal(before[:, 0], silent)


def test_learned_aggregation_starts_as_the_sum_and_its_heads_learn() -> None:
    outputs = []
    for aggregate in ("sum", "learned"):
        model = zoo.build("llama")
        handle = gin(model, aggregate=aggregate, size=0.0)
        made = handle.bindings[0].adapter
        made.gain.data.fill_(0.5)
        outputs.append(zoo.logits(model, zoo.batch("llama")))
    assert torch.equal(*outputs) and made.heads.shape == (4,) and "heads" in made.roles
    count = sum(p.numel() for p in made.parameters())
    assert count == 2 * 16 * 6 + 2 * 36 + 2 * 16 + 3 * 6 + 3 + 4
    before = made.heads.detach().clone()
    zoo.train(handle, handle.optimizer(1e-2), zoo.batches("llama"), 2)
    assert not torch.isclose(made.heads, before, atol=1e-4).any()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_later_tokens_change_nothing_earlier(kind: str) -> None:
    model = zoo.build(kind)
    gin(model, size=0.5)
    ids = zoo.batch(kind)["input_ids"]
    before = model(ids).logits
    ids[:, 4] = (ids[:, 4] + 1) % zoo.VOCAB
    after = model(ids).logits
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.isclose(before[:, 4:], after[:, 4:], atol=1e-9).all(-1).any()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_neither_sends_nor_receives(side: str) -> None:
    model = zoo.build("llama")
    handle = gin(model, size=0.5)
    inputs = left_padded()
    if side == "right":
        inputs = {name: value.flip(1) for name, value in inputs.items()}
    real = inputs["attention_mask"].bool()
    inputs["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)  # rotations are by float32 angles
    messages: list[Tensor] = []
    out = model(**inputs).logits
    for row in range(4):  # each sequence alone, without its padding
        alone = model(inputs["input_ids"][row : row + 1, real[row]]).logits[0]
        torch.testing.assert_close(out[row, real[row]], alone, rtol=1e-10, atol=1e-10)
    other = torch.where(real, inputs["input_ids"], 5)
    assert torch.equal(model(**{**inputs, "input_ids": other}).logits[real], out[real])
    # A padded token's own message is eps x alone: with eps = 0 its update does not depend on its state.
    made = handle.bindings[0].adapter
    made.eps.zero_()
    hook = made.register_forward_hook(lambda m, args, update: messages.append(update))
    model(**inputs)
    hook.remove()
    updates = messages[0][~real]
    assert torch.equal(updates, updates[:1].expand_as(updates)) and len(updates) == 4


def test_parameters_are_counted_by_the_formula_and_nothing_else_trains() -> None:
    for settings in ({"hidden": 155}, {"hidden": 7, "multiplier": 3}):
        model = zoo.build("llama")
        handle = rankloom.adapt(model, rankloom.methods.get("gin-attention").with_(adapter={**settings}))
        d, n, c = 16, settings["hidden"], settings.get("multiplier", 1)
        count = 2 * d * n + 2 * c * n * n + 2 * d + (c + 2) * n + 3
        assert [sum(p.numel() for p in b.adapter.parameters()) for b in handle.bindings] == [count, count]
        names = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
        assert names == GINAttentionAdapter.roles.keys() - {"heads"}


def test_the_papers_start_has_gains_that_grow_with_depth() -> None:
    model = zoo.build("llama", num_hidden_layers=5)
    recipe = zoo.recipe_of("gin-attention")
    inputs = zoo.batch("llama")
    before = zoo.logits(model, inputs)
    handle = rankloom.adapt(model, recipe.with_({"adapter.start": "paper"}))
    assert [b.adapter.gain.item() for b in handle.bindings] == [0.0, 0.125, 0.25, 0.375, 0.5]
    assert not torch.equal(zoo.logits(model, inputs), before)
    handle.detach()
    some = rankloom.adapt(model, recipe.with_({"adapter.start": "paper", "targets.modules": ["layers.2"]}))
    assert some.bindings[0].adapter.gain.item() == 0.25  # the model's depth, not the recipe's
    some.detach()
    a, b = some.bindings[0].adapter, some.bindings[0].adapter.W_in
    assert b.abs().max() <= 0.25 and a.W_out.abs().max() <= 6**-0.5 and a.slope.item() == 0.25 and a.eps.item() == 0


def test_dropout_is_a_function_of_seed_layer_and_step() -> None:
    def losses(seed: int, shuffle: int) -> list[float]:
        torch.manual_seed(shuffle)
        recipe = zoo.recipe_of("gin-attention").with_({"adapter.dropout": 0.5, "adapter.seed": seed})
        handle = rankloom.adapt(zoo.build("llama"), recipe)
        zoo.perturb(handle, 0.5)
        optimizer = handle.optimizer(0.0)
        return zoo.train(handle, optimizer, zoo.batches("llama", 1), 3)

    first = losses(0, 1)
    assert first == losses(0, 2) != losses(1, 1)
    assert len(set(first)) == 3  # nothing has moved but the mask
    made = adapter(dropout=0.25).train()
    u = torch.ones(50, 60, dtype=torch.float64)
    assert set(made._dropout(u).unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(float(made._dropout(u).mean()) - 1) < 4 * (0.25 / 0.75 / u.numel()) ** 0.5
    assert made.eval()._dropout(u) is u


def test_a_copy_on_an_evaluating_model_evaluates() -> None:
    model = zoo.build("llama")
    handle = rankloom.adapt(model, zoo.recipe_of("gin-attention"))
    assert not any(m.training for m in model.modules())
    handle.detach().train()
    handle.attach()
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    "settings",
    [{"hidden": 0}, {"multiplier": 0}, {"sharpness": 0.0}, {"cutoff": 1.0}, {"cutoff": -0.1}, {"dropout": 1.0}],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(settings))):
        rankloom.methods.get("gin-attention").with_(adapter=settings)
