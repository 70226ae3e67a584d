"""The generic suite: what every method of the table has to keep, whatever it is made of.

Everything here is parametrised from ``rankloom.methods.TABLE``; facts that differ by method are read from its parts
(``init.moves_output``, ``adapter.offers``, roles of tensors), so a new entry is covered by being in the table.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import rankloom
import rankloom.errors
from rankloom import Calibration, Recipe
from rankloom.adapters import LayerAdapterPart
from rankloom.rank import RankPart
from tests import zoo

METHODS = tuple(rankloom.methods.TABLE)
every_method = pytest.mark.parametrize("method", METHODS)
every_model = pytest.mark.parametrize("kind", zoo.MODELS)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Identity and content of everything a model is made of."""
    return {
        "modules": [
            (n, id(m), type(m), m.training, sorted(k for k in m.__dict__ if k[0] != "_"))
            for n, m in model.named_modules()
        ],
        "private": [sorted(k for k in m.__dict__ if "rankloom" in k) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "parameters": [
            (n, id(p), p.requires_grad, p.grad is None) for n, p in model.named_parameters(remove_duplicate=False)
        ],
        "buffers": [(n, id(b)) for n, b in model.named_buffers(remove_duplicate=False)],
    }


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def clones(handle: rankloom.Adaptation) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in handle.state_dict().items()}


def moves(method: str) -> bool:
    return rankloom.methods.get(method).init.moves_output


@every_model
@every_method
def test_step_zero_leaves_every_bit_or_moves_as_documented(method: str, kind: str) -> None:
    model, inputs = zoo.build(kind), zoo.batch(kind, seed=5)
    before = zoo.logits(model, inputs)
    handle = zoo.adapted(method, model, kind)
    after = zoo.logits(model, inputs)
    if not moves(method):
        assert torch.equal(before, after)
        for b in handle.bindings if zoo.is_matrix(method) else ():
            assert torch.count_nonzero(b.adapter.delta(b.layer)) == 0
        return
    assert not torch.equal(before, after)
    for b in handle.bindings:
        DOCUMENTED_MOVES[handle.recipe.init.kind](b, handle.recipe.init)


def _one_step(b: Any, init: Any) -> None:
    """Every weight changes by exactly `scale / gamma` in operator norm."""
    move = torch.linalg.matrix_norm(b.adapter.delta(b.layer).detach(), 2)
    torch.testing.assert_close(float(move), b.adapter.scale / init.gamma, rtol=1e-9, atol=0)


def _noise(b: Any, init: Any) -> None:
    """A core of `std` between singular vectors, the singular values on one side."""
    top = torch.linalg.matrix_norm(b.layer.weight(), 2)
    move = torch.linalg.matrix_norm(b.adapter.delta(b.layer).detach(), 2)
    assert 0 < move < b.adapter.scale * top * 5 * init.std * b.adapter.rank


def _some_rank(b: Any, init: Any) -> None:
    """A best approximation of something: its rank, balanced by the form; exactly what is tested with the init itself."""
    delta = b.adapter.delta(b.layer).detach()
    assert 0 < torch.linalg.matrix_rank(delta) <= b.adapter.rank


DOCUMENTED_MOVES = {
    "one-step-gradient": _one_step,
    "weight-subspace": _noise,
    "update-svd": _some_rank,
    "quantization-residual": _some_rank,
}


@every_model
@every_method
def test_delta_is_what_the_forward_computes(method: str, kind: str) -> None:
    zoo.require_matrix(method)
    model, bare = zoo.build(kind), zoo.build(kind)
    handle = zoo.adapted(method, model, kind)
    zoo.perturb(handle)
    inputs = zoo.batch(kind, seed=5)
    merged = zoo.merged_copy(handle, bare)
    torch.testing.assert_close(zoo.logits(model, inputs), zoo.logits(merged, inputs), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(zoo.logits(model, inputs), zoo.logits(zoo.build(kind), inputs), atol=1e-6)
    for b in handle.bindings:  # exact factors, where the form has them
        if (factors := b.adapter.factors()) is not None:
            up, down = factors
            torch.testing.assert_close(up @ down, b.adapter.delta(b.layer), rtol=1e-12, atol=1e-13)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (3, 5)),
    "conv1d": (lambda: _conv1d(), (2, 3, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 2, 4, 4)),
    "embedding": (lambda: nn.Embedding(6, 4), None),
}


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(4, 5)


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _square_loss(model: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    out = model(x)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    return (weights * out).square().mean() + (weights * out).mean(), 1.0


@pytest.mark.parametrize("layer", LAYERS)
@every_method
def test_gradients_of_the_forms(method: str, layer: str) -> None:
    zoo.require_weight(method)
    make, shape = LAYERS[layer]
    model = OneLayer(make()).double()
    if model.layer.__class__.__name__ == "Conv1D":
        nn.init.normal_(model.layer.bias)
    x = torch.randint(6, (2, 3)) if shape is None else torch.randn(shape, dtype=torch.float64)
    recipe = zoo.with_reference(zoo.recipe_of(method).with_(targets={"modules": ("layer",)}), model)
    if recipe.init.evidence == "activations" and layer in ("conv2d", "embedding"):
        with pytest.raises(rankloom.errors.TargetError, match="no linear layer"):
            rankloom.adapt(model, recipe, Calibration([x], _square_loss))
        return
    handle = rankloom.adapt(model, recipe, Calibration([x], _square_loss))
    zoo.perturb(handle, 0.3)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in named.values()} == {id(p) for p in handle.parameters()}
    binding = handle.bindings[0]

    def through_forward(*tensors: Tensor) -> Tensor:
        return functional_call(model, dict(zip(named, tensors, strict=True)), (x,))

    # 1. Against autograd through the dense update in place of the weight, where the update is a matrix.
    if zoo.is_matrix(method):
        out = model(x)
        pull = torch.randn_like(out)
        got = torch.autograd.grad(out, list(named.values()), pull, allow_unused=True)
        dense = binding.layer.apply(x, binding.layer.weight() + binding.adapter.delta(binding.layer))
        want = torch.autograd.grad(dense, list(named.values()), pull, allow_unused=True)
        for g, w, name in zip(got, want, named, strict=True):
            assert (g is None) == (w is None), name
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)
    # 2. Against finite differences, wherever nothing is held constant on purpose (a magnitude form's norm is).
    if "magnitude" not in recipe.adapter.offers:
        leaves = tuple(p.detach().clone().requires_grad_() for p in named.values())
        assert torch.autograd.gradcheck(through_forward, leaves)


@every_method
def test_state_dict_round_trip(method: str) -> None:
    first = zoo.adapted(method, zoo.build("llama"), "llama")
    zoo.perturb(first)
    second = zoo.adapted(method, zoo.build("llama"), "llama", seed=1)
    inputs = zoo.batch("llama")
    assert not torch.equal(zoo.logits(first.model, inputs), zoo.logits(second.model, inputs))
    second.load_state_dict(clones(first))
    assert same(clones(first), clones(second))
    assert torch.equal(zoo.logits(first.model, inputs), zoo.logits(second.model, inputs))


@every_method
def test_load_is_strict_and_all_or_nothing(method: str) -> None:
    handle = zoo.adapted(method, zoo.build("llama"), "llama")
    good = clones(handle)
    name = next(iter(good))
    wrong = {n: t + 1 for n, t in good.items() if n != name}
    for broken in (wrong, {**wrong, name: good[name], "stray": good[name]}, {**wrong, name: good[name][:1]}):
        with pytest.raises(rankloom.errors.ArtifactError, match=r"missing|unexpected|shape"):
            handle.load_state_dict(broken)
        assert same(good, clones(handle))


def _through_disk(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_method
def test_resume_mid_run_is_bit_exact(method: str) -> None:
    data, total, stop = zoo.batches("llama", 3), 9, 4

    def start(seed: int) -> tuple[rankloom.Adaptation, torch.optim.Optimizer]:
        handle = zoo.adapted(method, zoo.build("llama"), "llama", seed=seed)
        return handle, handle.optimizer(1e-2, total_steps=total, max_grad_norm=1.0)

    straight, optimizer = start(0)
    losses = zoo.train(straight, optimizer, data, total)

    broken, optimizer = start(0)
    zoo.train(broken, optimizer, data, stop)
    saved = _through_disk((dict(broken.state_dict()), broken.schedule_state(), optimizer.state_dict()))

    resumed, optimizer = start(1)  # another seed: everything has to come from the saved state
    resumed.load_state_dict(saved[0])
    resumed.load_schedule_state(saved[1])
    optimizer.load_state_dict(saved[2])
    rest = zoo.train(resumed, optimizer, data, total - stop, start=stop)
    assert rest == losses[stop:]
    assert resumed.driver.step == total
    assert same(clones(straight), clones(resumed))


@every_method
def test_half_precision_base(method: str) -> None:
    model, data = zoo.build("llama", dtype=torch.bfloat16), zoo.batches("llama")
    base = contents(model)
    before = zoo.logits(model, data[0])
    handle = zoo.adapted(method, model, "llama")
    if not moves(method):
        assert torch.equal(before, zoo.logits(model, data[0]))
    losses = zoo.train(handle, handle.optimizer(1e-2, total_steps=12), data, 12)
    assert losses[-1] < losses[0]
    added = [t for t in handle.trainables() if t.role not in ("dense", "whole")]
    assert all(t.parameter.dtype == torch.float32 for t in added)  # steps are far below half precision's resolution
    assert zoo.logits(model, data[0]).dtype == torch.bfloat16
    assert same(base, contents(handle.detach()))


@every_method
def test_tied_weights_stay_tied(method: str) -> None:
    model, data = zoo.build("llama", tie_word_embeddings=True), zoo.batches("llama")
    table = model.get_input_embeddings().weight
    base = contents(model)
    handle = zoo.adapted(method, model, "llama")
    zoo.train(handle, handle.optimizer(1e-2, total_steps=3), data, 3)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    handle.detach()
    assert model.get_input_embeddings().weight is table is model.get_output_embeddings().weight
    assert same(base, contents(model))


@every_method
def test_untied_use_of_a_tied_weight(method: str) -> None:
    zoo.require_matrix(method)
    recipe = zoo.recipe_of(method).with_(targets={"modules": ("lm_head",)})
    model = zoo.build("llama", tie_word_embeddings=True)
    with pytest.raises(rankloom.errors.TargetError, match=r"lm_head shares its weight with model.embed_tokens.*untie"):
        zoo.adapted(recipe, model, "llama")
    handle = zoo.adapted(recipe.with_({"targets.ties": "untie"}), model, "llama")
    zoo.perturb(handle)
    merged = zoo.build("llama", tie_word_embeddings=True)
    merged.lm_head.weight = nn.Parameter(merged.lm_head.weight.detach().clone())
    merged = zoo.merged_copy(handle, merged)
    inputs = zoo.batch("llama")
    torch.testing.assert_close(zoo.logits(model, inputs), zoo.logits(merged, inputs), rtol=1e-10, atol=1e-10)


SPECIAL = {
    "fused slices": ("gpt2", ("c_attn[q]", "h.1.attn.c_attn[32:48]"), {}),
    "fused slice, one": ("gpt2", ("h.0.attn.c_attn[1/3]",), {}),
    "slice of a linear": ("llama", ("q_proj[0:8]", "gate_proj[5:20]"), {}),
    "embedding": ("gpt2", ("wte",), {"tie_word_embeddings": False}),
    "shared table, one use": ("t5", ("encoder.embed_tokens",), {}),
    "convolutions": ("convnet", ("stem", "body"), {}),
    "head": ("llama", ("lm_head",), {}),
    "experts": ("mixtral", ("gate_up_proj", "down_proj"), {}),
    "regular expression": ("bert", (r"re:.*attention\.self\.(query|value)",), {}),
}


@pytest.mark.parametrize("case", SPECIAL)
@every_method
def test_special_targets(method: str, case: str) -> None:
    zoo.require_weight(method)
    kind, modules, changes = SPECIAL[case]
    model, bare = zoo.build(kind, **changes), zoo.build(kind, **changes)
    inputs = zoo.batch(kind, seed=5)
    before = zoo.logits(model, inputs)
    recipe = zoo.recipe_of(method).with_(targets={"modules": modules, "ties": "untie"})
    if case == "experts":
        zoo.require_matrix(method)
    if recipe.init.evidence == "activations" and case in (
        "embedding",
        "shared table, one use",
        "convolutions",
        "experts",
    ):
        with pytest.raises(rankloom.errors.TargetError, match="no linear layer"):
            zoo.adapted(recipe, model, kind)
        return
    if recipe.init.evidence == "gradient" and case == "experts":
        with pytest.raises(rankloom.errors.TargetError, match="one expert of a stack"):
            zoo.adapted(recipe, model, kind)
        return
    handle = zoo.adapted(recipe, model, kind)
    if not moves(method):
        assert torch.equal(before, zoo.logits(model, inputs))
    untie(bare, handle)
    zoo.perturb(handle)
    if zoo.is_matrix(method):
        merged = zoo.merged_copy(handle, bare)
        torch.testing.assert_close(zoo.logits(model, inputs), zoo.logits(merged, inputs), rtol=1e-10, atol=1e-10)
    data = zoo.batches(kind)
    losses = zoo.train(handle, handle.optimizer(1e-2, total_steps=6), data, 6)
    assert all(l == l for l in losses)


def untie(bare: nn.Module, handle: rankloom.Adaptation) -> None:
    for target in handle.targets:
        if target.tied_to:
            module = bare.get_submodule(target.module_name)
            module.weight = nn.Parameter(module.weight.detach().clone())


@every_method
def test_accumulated_micro_batches_equal_one_big_batch(method: str) -> None:
    whole = zoo.batch("llama", rows=4)
    halves = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2)]
    results = []
    for parts in ([whole], halves):
        handle = zoo.adapted(method, zoo.build("llama"), "llama")
        zoo.perturb(handle)
        optimizer = handle.optimizer(1e-2, total_steps=6)
        for _ in range(3):
            for part in parts:
                (handle.model(**part).loss / len(parts)).backward()
            handle.step()
        assert optimizer.param_groups and handle.driver.step == 3
        results.append(clones(handle))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-6, atol=1e-7)


@every_method
def test_gradient_checkpointing(method: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = zoo.build("llama")
        handle = zoo.adapted(method, model, "llama")
        zoo.perturb(handle)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        model(**zoo.batch("llama")).loss.backward()
        assert all(p.grad is not None for p in handle.parameters())
        grads.append([p.grad.clone() for p in handle.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@every_method
def test_the_seed_decides_everything(method: str) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed + 100)  # the global generator must not matter
        handle = zoo.adapted(method, zoo.build("llama"), "llama", seed=seed if seed < 2 else 0)
        zoo.train(handle, handle.optimizer(1e-2, total_steps=3), zoo.batches("llama"), 3)
        return clones(handle)

    first = run(0)
    assert same(first, run(2))
    # Targets draw from generators of their own: adapting one more weight does not change the others.
    recipe = zoo.recipe_of(method)
    if hasattr(recipe.init, "rho"):
        recipe = recipe.with_({"init.rho": 1})  # ranks that are shared out over all targets depend on all of them
    if type(recipe.rank).ranks is not RankPart.ranks:
        recipe = recipe.with_(rank="fixed")
    one, two = ("layers.0", "layers.1") if isinstance(recipe.adapter, LayerAdapterPart) else ("q_proj", "up_proj")
    few = zoo.adapted(recipe.with_(targets={"modules": (one,), "train": ()}), zoo.build("llama"), "llama")
    all_of = zoo.adapted(recipe.with_(targets={"modules": (one, two), "train": ()}), zoo.build("llama"), "llama")
    more = clones(all_of)
    for name, tensor in clones(few).items():
        assert torch.equal(tensor, more[name]), name


@every_model
@every_method
def test_detach_gives_the_same_objects_bit_for_bit(method: str, kind: str) -> None:
    model = zoo.build(kind)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)  # a flag the user set has to come back
    before, base = snapshot(model), contents(model)
    inputs = zoo.batch(kind)
    out = zoo.logits(model, inputs)
    handle = zoo.adapted(method, model, kind)
    stored = {n: (p, p.detach().clone()) for n, p in model.named_parameters() if not p.requires_grad}
    zoo.train(handle, handle.optimizer(1e-2, total_steps=3), zoo.batches(kind), 3)
    trained = zoo.logits(model, inputs)
    for name, (tensor, value) in stored.items():
        assert torch.equal(tensor, value), f"the base weight of {name} was edited"
    assert handle.detach() is model
    model.eval()
    assert snapshot(model) == before
    assert same(base, contents(model))
    assert torch.equal(out, zoo.logits(model, inputs))
    handle.attach()
    assert torch.equal(trained, zoo.logits(model, inputs))
    handle.detach()
    assert snapshot(model) == before


@every_model
@every_method
def test_it_learns(method: str, kind: str) -> None:
    data, curves = zoo.batches(kind, 1), []
    for lr in (1e-2, 1e-1):  # a few numbers a weight (a core, a scale) have to go further than the entries of matrices
        handle = zoo.adapted(method, zoo.build(kind), kind)
        losses = zoo.train(handle, handle.optimizer(lr, total_steps=40), data, 40)
        curves.append(losses)
        if max(losses[-3:]) < losses[0] - 0.05:
            return
    pytest.fail(f"learns at neither rate: {curves}")


@every_method
def test_only_the_named_tensors_train(method: str) -> None:
    model = zoo.build("llama")
    handle = zoo.adapted(method, model, "llama")
    names = handle.named_parameters()
    assert len({id(p) for p in names.values()}) == len(names) == len(handle.parameters())
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in handle.parameters()}
    added = sum(p.numel() for t in handle.trainables() if t.role not in ("dense", "whole") for p in [t.parameter])
    total = sum(p.numel() for p in zoo.build("llama").parameters())
    count = sum(p.numel() for p in handle.parameters())
    assert handle.summary().startswith(f"trainable params: {count:,} || all params: {total + added:,} ||")


@every_method
def test_recipes_round_trip_and_explain_themselves(method: str) -> None:
    entry = rankloom.methods.TABLE[method]
    entry.recipe.check()
    assert Recipe.from_text(entry.recipe.to_yaml()) == entry.recipe
    assert Recipe.from_text(entry.recipe.to_json()) == entry.recipe
    assert len(entry.recipe.expand().splitlines()) == len(entry.recipe.parts())
    assert entry.title and entry.paper and entry.summary and entry.parameters and entry.export


@every_method
def test_a_second_adaptation_is_refused_until_the_first_is_gone(method: str) -> None:
    model = zoo.build("llama")
    handle = zoo.adapted(method, model, "llama")
    with pytest.raises(rankloom.errors.TargetError, match="already carries an adapter"):
        zoo.adapted(method, model, "llama")
    handle.detach()
    zoo.adapted(method, model, "llama").detach()


@every_method
def test_a_copy_of_an_adapted_model_is_independent(method: str) -> None:
    handle = zoo.adapted(method, zoo.build("llama"), "llama")
    zoo.perturb(handle)
    inputs = zoo.batch("llama")
    twin = copy.deepcopy(handle.model)
    out = zoo.logits(twin, inputs)
    assert torch.equal(out, zoo.logits(handle.model, inputs))
    zoo.perturb(handle)
    assert torch.equal(out, zoo.logits(twin, inputs))
    assert not torch.equal(out, zoo.logits(handle.model, inputs))


@every_method
def test_whole_parameters_train_beside_adapters(method: str) -> None:
    zoo.require_weight(method)
    model = zoo.build("bert")
    recipe = zoo.recipe_of(method).with_(targets={"modules": ("query", "value"), "train": ("classifier", "*.bias")})
    base = contents(model)
    handle = zoo.adapted(recipe, model, "bert")
    data = zoo.batches("bert", 1)
    zoo.train(handle, handle.optimizer(1e-2, total_steps=4), data, 4)
    own = handle.named_parameters()
    assert "whole.classifier.weight" in own and "whole.bert.encoder.layer.0.attention.self.query.bias" in own
    for name, p in own.items():
        if name.startswith("whole.") and not name.endswith("key.bias"):  # a key's bias cancels in the softmax
            assert not torch.equal(p, base[name.removeprefix("whole.")]), name
    assert same(base, contents(handle.detach()))
