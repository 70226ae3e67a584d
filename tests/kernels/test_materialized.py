"""Updates formed block by block against plain autograd through the whole dense sum, written out here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rankloom.kernels import Update, materialize, materialized_linear
from rankloom.kernels import materialized as module

OUT, IN = 7, 5
SHAPES = {"2-D": (6, IN), "3-D": (2, 3, IN), "1 token": (1, IN), "no token": (0, IN)}


@pytest.fixture(params=["one block", "a row a block", "uneven blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    height = {"one block": OUT, "a row a block": 1, "uneven blocks": 3}[request.param]
    monkeypatch.setattr(module, "BLOCK", height * IN)
    yield height


def rows(weight: Tensor, span: slice, left: Tensor, right: Tensor) -> Tensor:
    """Nonlinear in both parameters and in the weight; ``left`` by rows, ``right`` by all of them."""
    return torch.tanh(left[span].to(weight.dtype) * weight) * right.to(weight.dtype).square()


def made(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = {"x": shape, "weight": (OUT, IN), "bias": (OUT,), "left": (OUT, IN), "right": (IN,)}
    return {n: torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for n, size in sizes.items()}


def update(given: dict[str, Tensor], **settings: object) -> Update:
    return Update((OUT, IN), rows, lambda: given["weight"], **settings)


def run(given: dict[str, Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    return materialized_linear(x, update(given), parameters, lambda x, v: F.linear(x, v, given["bias"]))


@pytest.mark.parametrize("wanted", [("x", "left", "right"), ("x",), ("left",), ("x", "right"), ()])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: str, wanted: tuple[str, ...], blocks: int) -> None:
    given = made(SHAPES[shape])
    leaves = {n: given[n].requires_grad_(n in wanted) for n in ("x", "left", "right")}
    got = run(given, *leaves.values())
    whole = given["weight"] + rows(given["weight"], slice(0, OUT), leaves["left"], leaves["right"])
    want = leaves["x"] @ whole.mT + given["bias"]
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    assert got.requires_grad == bool(wanted)
    if wanted:
        pull = torch.randn_like(want)
        ours, theirs = (torch.autograd.grad(y, [leaves[n] for n in wanted], pull) for y in (got, want))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradcheck(blocks: int) -> None:
    given = made((2, 3, IN))
    leaves = [given[n].requires_grad_() for n in ("x", "left", "right")]
    assert torch.autograd.gradcheck(lambda *t: run(given, *t), leaves)
    assert torch.autograd.gradcheck(lambda *t: materialize(update(given), t, torch.float64), leaves[1:])


def test_the_weight_gets_no_gradient(blocks: int) -> None:
    given = made((4, IN))
    given["weight"].requires_grad_()
    run(given, given["x"], given["left"].requires_grad_(), given["right"]).sum().backward()
    assert given["weight"].grad is None and given["left"].grad is not None


def test_parameters_may_come_from_a_graph(blocks: int) -> None:
    given = made((4, IN))
    left, right = given["left"].requires_grad_(), given["right"].requires_grad_()
    got = run(given, given["x"], left * right, right.exp())
    whole = given["weight"] + rows(given["weight"], slice(0, OUT), left * right, right.exp())
    pull = torch.randn_like(got)
    ours = torch.autograd.grad(got, (left, right), pull)
    theirs = torch.autograd.grad(given["x"] @ whole.mT, (left, right), pull)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_an_update_alone_and_one_that_reads_no_weight() -> None:
    given = made((4, IN))
    delta = rows(given["weight"], slice(0, OUT), given["left"], given["right"])
    torch.testing.assert_close(
        materialize(update(given, added=False), (given["left"], given["right"]), torch.float64), delta
    )
    bare = Update((OUT, IN), lambda weight, span, left: left[span] if weight is None else None)
    assert torch.equal(
        materialized_linear(given["x"], bare, (given["left"],), F.linear), F.linear(given["x"], given["left"])
    )


def test_blocks_begin_at_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = lambda out, multiple: [(s.start, s.stop) for s in Update((out, IN), rows, multiple=multiple).spans()]  # noqa: E731
    monkeypatch.setattr(module, "BLOCK", 5 * IN)
    assert spans(12, 2) == [(0, 4), (4, 8), (8, 12)]
    assert spans(12, 6) == [(0, 6), (6, 12)]  # never less than one multiple
    assert spans(7, 1) == [(0, 5), (5, 7)]


def test_an_update_of_zero_changes_no_bit() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = made((3, 4, IN), dtype)
        wide = torch.promote_types(dtype, torch.float32)
        left, right = (torch.zeros(size, dtype=wide) for size in ((OUT, IN), (IN,)))
        assert torch.equal(run(given, given["x"], left, right), F.linear(given["x"], given["weight"], given["bias"]))


def test_a_half_precision_input_with_float32_parameters(blocks: int) -> None:
    given = made((64, IN), torch.bfloat16)
    left, right = (given[n].float().requires_grad_() for n in ("left", "right"))
    x = given["x"].requires_grad_()
    got = run(given, x, left, right)
    pull = torch.randn_like(got)
    ours = torch.autograd.grad(got, (x, left, right), pull)
    assert got.dtype == torch.bfloat16 and [g.dtype for g in ours] == [torch.bfloat16, torch.float32, torch.float32]
    wide = {n: t.detach().double() for n, t in given.items()}
    leaves = [t.detach().double().requires_grad_() for t in (x, left, right)]
    want = leaves[0] @ (wide["weight"] + rows(wide["weight"], slice(0, OUT), *leaves[1:])).mT + wide["bias"]
    for one, other in zip(ours, torch.autograd.grad(want, leaves, pull.double()), strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 2e-2


def test_saved_are_the_input_and_the_parameters(blocks: int) -> None:
    given = made((3, 4, IN))
    left, right = given["left"].requires_grad_(), given["right"].requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(given, given["x"].requires_grad_(), left, right)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (given["x"], left, right)}
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(given, given["x"], left.detach(), right.detach())
    assert all(t.data_ptr() != given["x"].data_ptr() for t in saved)  # nothing trained: no activation


class Sizes(TorchDispatchMode):
    """The most entries any single operation has made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out._base is None:
            self.largest = max(self.largest, out.numel())
        return out


def test_the_backward_pass_makes_nothing_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    out, width, tokens = 40, 30, 3
    monkeypatch.setattr(module, "BLOCK", 8 * width)
    weight, bound = torch.randn(out, width), torch.randn(out, 1).requires_grad_()
    x = torch.randn(tokens, width).requires_grad_()
    form = Update((out, width), lambda w, span, b: w * b[span], lambda: weight)
    y = materialized_linear(x, form, (bound,), F.linear)
    with Sizes() as sizes:
        y.backward(torch.ones_like(y))
    assert 0 < sizes.largest <= 8 * width


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool, blocks: int) -> None:
    given = made((2, 3, IN))
    leaves = [given[n].requires_grad_() for n in ("x", "left", "right")]
    grads = []
    for call in (run, lambda *t: checkpoint(run, *t, use_reentrant=reentrant)):
        call(given, *leaves).square().sum().backward()
        grads.append([leaf.grad.clone() for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
