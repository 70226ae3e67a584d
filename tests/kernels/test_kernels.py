"""The fused linears against plain autograd compositions of the same equations, written out here."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.kernels import dora_linear, lowrank, lowrank_linear

OUT, IN, RANK, SCALE = 5, 7, 3, 1.7
SHAPES = {"2-D": (6, IN), "3-D": (2, 3, IN), "4-D": (2, 1, 3, IN), "1 token": (1, IN), "no token": (0, IN)}


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    return {
        "x": rand(*shape),
        "weight": rand(OUT, IN),
        "bias": rand(OUT),
        "a": rand(RANK, IN),
        "b": rand(OUT, RANK),
        "gain": rand(OUT),
    }


def lowrank_oracle(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, weight + SCALE * b @ a)
    return y if bias is None else y + bias


def dora_oracle(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, gain[:, None] * (weight + SCALE * b @ a))
    return y if bias is None else y + bias


def compare(kernel: str, given: dict[str, Tensor], wanted: tuple[str, ...], rtol: float = 1e-12) -> None:
    """Output and the gradients asked for, kernel against oracle, under a random pull."""
    names = ["x", "weight", "bias", "a", "b"] + (["gain"] if kernel == "dora" else [])
    for t in given.values():
        t.requires_grad_(False)
    given = {n: t.detach().requires_grad_(n in wanted) if t is not None else None for n, t in given.items()}
    arguments = [given[n] for n in names]
    got = (dora_linear if kernel == "dora" else lowrank_linear)(*arguments, SCALE)
    want = (dora_oracle if kernel == "dora" else lowrank_oracle)(*arguments)
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)
    assert got.requires_grad == bool(wanted)
    if not wanted:
        return
    pull = torch.randn(got.shape, dtype=got.dtype)
    ours = torch.autograd.grad(got, [given[n] for n in wanted], pull)
    theirs = torch.autograd.grad(want, [given[n] for n in wanted], pull)
    for n, g, w in zip(wanted, ours, theirs, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype, n
        torch.testing.assert_close(g, w, rtol=rtol, atol=rtol * 10, msg=lambda m, n=n: f"gradient of {n}: {m}")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", ["lowrank", "dora"])
def test_values_and_gradients(kernel: str, shape: str, bias: bool) -> None:
    given = tensors(SHAPES[shape])
    if not bias:
        given["bias"] = torch.zeros(OUT, dtype=torch.float64)
        zero = dict(given)
        compare(kernel, zero, ("x", "a", "b") + (("gain",) if kernel == "dora" else ()))
        arguments = [given[n] for n in ("x", "weight")] + [None] + [given[n] for n in ("a", "b")]
        if kernel == "dora":
            got = dora_linear(*arguments, given["gain"], SCALE)
            torch.testing.assert_close(got, dora_oracle(*arguments, given["gain"]))
        else:
            torch.testing.assert_close(lowrank_linear(*arguments, SCALE), lowrank_oracle(*arguments))
        return
    compare(kernel, given, ("x", "a", "b") + (("gain",) if kernel == "dora" else ()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", ["lowrank", "dora"])
def test_gradcheck(kernel: str, bias: bool) -> None:
    given = tensors((2, 3, IN))
    leaves = [given[n].requires_grad_() for n in ("x", "a", "b", *(["gain"] if kernel == "dora" else []))]
    offset = given["bias"] if bias else None

    def call(x: Tensor, a: Tensor, b: Tensor, *gain: Tensor) -> Tensor:
        kernel_ = dora_linear if gain else lowrank_linear
        return kernel_(x, given["weight"], offset, a, b, *gain, SCALE)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("kernel", ["lowrank", "dora"])
def test_only_the_gradients_asked_for(kernel: str) -> None:
    names = ("x", "a", "b") + (("gain",) if kernel == "dora" else ())
    for count in range(len(names) + 1):
        for wanted in itertools.combinations(names, count):
            compare(kernel, tensors((2, 3, IN)), wanted)


@pytest.mark.parametrize("kernel", ["lowrank", "dora"])
def test_layouts(kernel: str) -> None:
    """Strided, transposed and expanded inputs and pulls, transposed factors."""
    base = tensors((2, 3, IN))
    wide = torch.randn(2, 3, 2 * IN, dtype=torch.float64)
    wanted = ("x", "a", "b") + (("gain",) if kernel == "dora" else ())
    for x in (wide[..., ::2], base["x"].transpose(0, 1), base["x"][:1].expand(4, 3, IN), base["x"].mT.contiguous().mT):
        factors = {"a": base["a"].mT.contiguous().mT, "b": base["b"].mT.contiguous().mT}
        compare(kernel, {**base, **factors, "x": x}, wanted)
    x = base["x"].requires_grad_()
    arguments = (x, base["weight"], base["bias"], base["a"].requires_grad_(), base["b"])
    out = dora_linear(*arguments, base["gain"], SCALE) if kernel == "dora" else lowrank_linear(*arguments, SCALE)
    out.sum().backward()  # an expanded pull with zero strides
    ones = (base["gain"] if kernel == "dora" else torch.ones(OUT, dtype=torch.float64))[:, None]
    slope = (ones * (base["weight"] + SCALE * base["b"] @ base["a"])).sum(0).detach()
    torch.testing.assert_close(x.grad, slope.expand_as(x))


def test_zero_update_leaves_every_bit() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in SHAPES.values():
            t = tensors(shape, dtype)
            for bias in (t["bias"], None):
                frozen = F.linear(t["x"], t["weight"], bias)
                zero, one = torch.zeros_like(t["b"]), torch.ones_like(t["gain"])
                assert torch.equal(lowrank_linear(t["x"], t["weight"], bias, t["a"], zero, SCALE), frozen)
                assert torch.equal(dora_linear(t["x"], t["weight"], bias, t["a"], zero, one, SCALE), frozen)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-12, -1e-7])
def test_zero_gain_rows_keep_their_gradient(value: float, bias: bool) -> None:
    """The output of a row with zero gain says nothing about its input: the way back must not divide by it."""
    given = tensors((4, IN))
    given["gain"][1] = value
    if not bias:
        given["bias"] = torch.zeros(OUT, dtype=torch.float64)
    compare("dora", given, ("x", "a", "b", "gain"), rtol=1e-9)


@pytest.mark.parametrize("kernel", ["lowrank", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_the_plain_composition(kernel: str, dtype: torch.dtype) -> None:
    """Error against a float64 oracle: at the level of one rounding of the output, and no worse than plain autograd's."""
    g = torch.Generator().manual_seed(0)
    rows, fan_in, fan_out, rank = 64, 96, 80, 8

    def rand(*size: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*size, generator=g)).to(dtype)

    x, w, bias = rand(rows, fan_in), rand(fan_out, fan_in, std=0.1), rand(fan_out)
    a, b, gain = rand(rank, fan_in, std=0.1), rand(fan_out, rank, std=0.1), (1 + 0.1 * rand(fan_out))
    pull = rand(rows, fan_out)
    leaves = {"x": x, "a": a, "b": b, **({"gain": gain} if kernel == "dora" else {})}

    def run(compute: torch.dtype, fused: bool) -> list[Tensor]:
        t = {n: v.detach().to(compute).requires_grad_() for n, v in leaves.items()}
        extra = (t["gain"],) if kernel == "dora" else ()
        if fused:
            y = (dora_linear if extra else lowrank_linear)(t["x"], w, bias, t["a"], t["b"], *extra, SCALE)
        else:
            y = F.linear(t["x"], w.to(compute)) + SCALE * F.linear(F.linear(t["x"], t["a"]), t["b"])
            y = (y * extra[0] if extra else y) + bias.to(compute)
        return [y.detach(), *torch.autograd.grad(y, list(t.values()), pull.to(compute))]

    exact = run(torch.float64, fused=False)
    for name, ours, plain, want in zip(
        ["y", *leaves], run(dtype, fused=True), run(dtype, fused=False), exact, strict=True
    ):
        assert ours.dtype == dtype
        scale = want.norm()
        error, theirs = ((t.double() - want).norm() / scale for t in (ours, plain))
        assert error <= 2 * torch.finfo(dtype).eps, (name, float(error))
        assert error <= 1.5 * theirs + torch.finfo(dtype).eps / 8, (name, float(error), float(theirs))


@pytest.mark.parametrize("kernel", ["lowrank", "dora"])
def test_wider_factors_get_gradients_in_their_own_dtype(kernel: str) -> None:
    """float32 factors over a bfloat16 base: the result is the one of factors rounded to bfloat16, to its rounding."""
    t = tensors((6, IN), torch.bfloat16)
    wide = {n: (t[n].float() + 1e-4).requires_grad_() for n in ("a", "b", "gain")}
    round_ = {n: v.detach().bfloat16().requires_grad_() for n, v in wide.items()}
    results = []
    for f in (wide, round_):
        arguments = (t["x"], t["weight"], t["bias"], f["a"], f["b"])
        y = dora_linear(*arguments, f["gain"], SCALE) if kernel == "dora" else lowrank_linear(*arguments, SCALE)
        assert y.dtype == torch.bfloat16
        used = list(f.values()) if kernel == "dora" else [f["a"], f["b"]]
        grads = torch.autograd.grad(y.float().square().sum(), used)
        assert [g.dtype for g in grads] == [u.dtype for u in used]
        results.append((y, *grads))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2**-7, atol=2**-5)
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(one, other.float(), rtol=3e-2, atol=3e-1)


@pytest.mark.parametrize("kernel", ["lowrank", "dora"])
@pytest.mark.parametrize("frozen", ["a", "b"])
def test_a_frozen_factor_costs_nothing(kernel: str, frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other gradients stay as they are; without ``dA`` the low-rank linear has no use for ``x`` and does not keep it."""
    monkeypatch.setattr(lowrank, "forming_pays", lambda *_: False)
    t = tensors((2, 3, IN))
    results = []
    for names in ("abx", "abx".replace(frozen, "")):
        leaves = {n: t[n].detach().clone().requires_grad_(n in names) for n in "abx"}
        arguments = (leaves["x"], t["weight"], t["bias"], leaves["a"], leaves["b"])
        kept: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda s, kept=kept: kept.append(s.shape) or s, lambda s: s):
            y = dora_linear(*arguments, t["gain"], SCALE) if kernel == "dora" else lowrank_linear(*arguments, SCALE)
        y.square().sum().backward()
        results.append(({n: leaves[n].grad for n in "abx"}, kept))
    (full, _), (part, kept) = results
    assert part.pop(frozen) is None
    for name, grad in part.items():
        assert torch.equal(grad, full[name])
    if kernel == "lowrank":
        tokens = 2 * 3
        assert (t["x"].shape in kept) == (frozen == "b")
        assert ((len(t["a"]), tokens) in kept) == (frozen == "a")


def test_accumulates_into_existing_gradients_and_runs_twice() -> None:
    t = tensors((2, 3, IN))
    a, b = t["a"].requires_grad_(), t["b"].requires_grad_()
    y = lowrank_linear(t["x"], t["weight"], t["bias"], a, b, SCALE)
    y.sum().backward(retain_graph=True)
    first = a.grad.clone(), b.grad.clone()
    y.sum().backward()
    torch.testing.assert_close(a.grad, 2 * first[0])
    torch.testing.assert_close(b.grad, 2 * first[1])


@pytest.mark.parametrize("shape", ["2-D", "3-D"])
def test_the_output_may_be_changed_in_place(shape: str) -> None:
    """As a plain linear's may: an in-place activation or residual after the layer."""
    t = tensors(SHAPES[shape])
    x, a, b = (t[n].requires_grad_() for n in ("x", "a", "b"))
    got = lowrank_linear(x, t["weight"], t["bias"], a, b, SCALE).mul_(2).relu_().square().sum()
    want = (2 * lowrank_oracle(x, t["weight"], t["bias"], a, b)).relu().square().sum()
    for one, other in zip(torch.autograd.grad(got, [x, a, b]), torch.autograd.grad(want, [x, a, b]), strict=True):
        torch.testing.assert_close(one, other)


def test_dora_refuses_a_changed_output_rather_than_using_it() -> None:
    """The gain's gradient reads the output back: one that was changed in place has to be noticed."""
    t = tensors((4, IN))
    y = dora_linear(t["x"], t["weight"], t["bias"], t["a"], t["b"], t["gain"].requires_grad_(), SCALE)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.mul_(2).sum().backward()


def test_the_input_is_not_touched() -> None:
    t = tensors((2, 3, IN))
    before = {n: v.clone() for n, v in t.items()}
    x, a, b, gain = (t[n].requires_grad_() for n in ("x", "a", "b", "gain"))
    dora_linear(
        lowrank_linear(x, torch.eye(IN).double(), None, a, a.mT, 1.0), t["weight"], t["bias"], a, b, gain, SCALE
    ).sum().backward()
    assert all(torch.equal(v.detach(), before[n]) for n, v in t.items())


def test_higher_derivatives_are_refused_not_wrong() -> None:
    t = tensors((4, IN))
    x = t["x"].requires_grad_()
    y = lowrank_linear(x, t["weight"], t["bias"], t["a"].requires_grad_(), t["b"], SCALE)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
@pytest.mark.parametrize("kernel", ["lowrank", "dora"])
def test_it_traces(kernel: str) -> None:
    """torch.compile takes the functions without a graph break (the eager backend: no compiler needed)."""
    t = tensors((2, 3, IN))
    leaves = [t[n].requires_grad_() for n in ("a", "b", "gain")]

    def call(x: Tensor) -> Tensor:
        if kernel == "dora":
            return dora_linear(x, t["weight"], t["bias"], *leaves, SCALE).square().mean()
        return lowrank_linear(x, t["weight"], t["bias"], *leaves[:2], SCALE).square().mean()

    used = leaves if kernel == "dora" else leaves[:2]
    want = torch.autograd.grad(call(t["x"]), used)
    got = torch.autograd.grad(torch.compile(call, backend="aot_eager", fullgraph=kernel == "lowrank")(t["x"]), used)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
