"""The certificate against the true errors of small dense heads, in float64."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from rankloom.attention.certificate import KEYS, Certificate, certify
from rankloom.attention.contract import Approximation, Rows
from rankloom.attention.factored import Factored
from rankloom.attention.polynomial import Isotropic
from rankloom.attention.precondition import Preconditioner
from rankloom.attention.projection import Projection
from rankloom.attention.strata import SumOfRows, stratify, sum_of_rows, total
from rankloom.errors import AttentionError
from rankloom.kernels.lowrank import Linear


class Polynomial(Approximation):
    """Dense attention with the Taylor polynomial of the exponential in the logits of centred keys."""

    def __init__(self, degree: int, *, scale: float, causal: bool) -> None:
        self.degree, self.scale, self.causal = degree, scale, causal

    def value(self, logits: Tensor) -> Tensor:
        return torch.stack([logits**j / math.factorial(j) for j in range(self.degree + 1)]).sum(0)

    def kernel(self, k: Tensor, to: Tensor, every: Tensor) -> Rows:
        def rows(q: Tensor, at: Tensor) -> Tensor:
            value = self.value(self.scale * q @ (k - every.detach().mean(0)).mT)
            return value.masked_fill(to > at[:, None], 0.0) if self.causal else value

        return rows

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        every = torch.arange(len(k))
        kernels = [self.kernel(k, every, k)(head, every) for head in q]
        sums = torch.stack([kernel.sum(1) for kernel in kernels])
        return torch.stack([kernel @ v for kernel in kernels]) / sums[..., None], sums.detach()

    def difficulty(self, q: Tensor) -> Tensor:
        return q.norm(dim=-1)


class Exact(Polynomial):
    """The oracle: the same with the exponential itself."""

    def value(self, logits: Tensor) -> Tensor:
        return logits.exp()


def inputs(
    heads: int, length: int, dim: int, spread: float, seed: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v and an output gradient; queries of very different norms, so that errors sit on few rows."""
    g = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    q = rand(heads, length, dim) * spread * rand(heads, length, 1).exp() ** 0.5
    return [q, rand(length, dim) + rand(dim), rand(length, dim), rand(heads, length, dim)]


def backward(approximation: Approximation, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, _ = approximation(*leaves)
    return dict(zip(("output", "dQ", "dK", "dV"), (out.detach(), *torch.autograd.grad(out, leaves, grad)), strict=True))


def results(approximation: Approximation, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> dict[str, Any]:
    """What a certificate can be given instead of computing it."""
    got = backward(approximation, q, k, v, grad)
    gradients = got["dQ"], got["dK"], got["dV"]
    return {"out": got["output"], "denominators": approximation(q, k, v)[1], "gradients": gradients}


def truth(approximation: Polynomial, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[dict[str, Tensor], ...]:
    exact = Exact(0, scale=approximation.scale, causal=approximation.causal)
    return backward(approximation, q, k, v, grad), backward(exact, q, k, v, grad)


def estimates(certificate: Certificate) -> dict[str, tuple[float, float]]:
    gradients = {name: (e.error, e.upper) for name, e in certificate.gradients.items()}
    return {"output": (certificate.error, certificate.upper), **gradients}


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(("heads", "causal"), product((1, 3), (False, True)))
def test_all_rows_give_the_error_itself(heads: int, causal: bool) -> None:
    q, k, v, grad = inputs(heads, 60 // heads, 4, 0.5, seed=heads)
    head = Polynomial(3, scale=0.5, causal=causal)
    approximate, exact = truth(head, q, k, v, grad)
    certificate = certify(head, q, k, v, grad=grad)
    assert certificate.rows == 60 and certificate.reason is None and set(estimates(certificate)) == set(exact)
    for name, (error, upper) in estimates(certificate).items():
        absolute, norm = (approximate[name] - exact[name]).norm(), approximate[name].norm()
        assert error == pytest.approx(float(absolute / norm), rel=1e-9), name
        assert upper == pytest.approx(float(absolute / (norm - absolute)), rel=1e-9), name
        assert upper >= relative(approximate[name], exact[name]) * (1 - 1e-9)
    for name in ("dK", "dV"):
        estimate = certificate.gradients[name]
        assert estimate.correction is not None and estimate.residual == 0.0
        torch.testing.assert_close(approximate[name] + estimate.correction, exact[name], rtol=1e-10, atol=1e-12)
    given = certify(head, q, k, v, grad=grad, **results(head, q, k, v, grad))
    assert estimates(given) == estimates(certificate)


@pytest.mark.parametrize("causal", [False, True])
def test_adapter_gradients_against_autograd(causal: bool) -> None:
    """Two query heads on one key head, adapters on all three projections, queries and keys turned by position."""
    heads, length, dim, width, rank = 2, 30, 4, 10, 3
    g = torch.Generator().manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    x, grad = rand(length, width), rand(heads, length, dim)
    sizes = {"q": heads * dim, "k": dim, "v": dim}
    base = {n: 0.15 * rand(size, width) for n, size in sizes.items()}
    a, b = {n: rand(rank, width) for n in sizes}, {n: 0.1 * rand(size, rank) for n, size in sizes.items()}
    turns = torch.linalg.qr(rand(length, dim, dim)).Q

    def made(n: str) -> Tensor:
        y = (x @ (base[n] + 0.7 * b[n] @ a[n]).mT).view(length, -1, dim).transpose(0, 1)
        return y if n == "v" else torch.einsum("lij,hlj->hli", turns, y)

    def turn_back(grad: Tensor, at: Tensor) -> Tensor:
        return torch.einsum("lij,hli->hlj", turns[at], grad)

    leaves = [t.requires_grad_() for n in sizes for t in (a[n], b[n])]
    names = [f"{factor}_{n}" for n in sizes for factor in ("dA", "dB")]
    head = Polynomial(3, scale=0.5, causal=causal)
    want = []
    for map_ in (head, Exact(0, scale=0.5, causal=causal)):
        out, _ = map_(made("q"), made("k")[0], made("v")[0])
        want.append(dict(zip(names, torch.autograd.grad(out, leaves, grad), strict=True)))
    projections = {
        n: Projection(x, Linear(base[n], None, a[n], b[n], 0.7), None if n == "v" else turn_back) for n in sizes
    }
    q, k, v = made("q").detach(), made("k")[0].detach(), made("v")[0].detach()
    certificate = certify(head, q, k, v, grad=grad, projections=projections)
    assert list(certificate.gradients) == names
    for name, estimate in certificate.gradients.items():
        error = float((want[0][name] - want[1][name]).norm() / want[0][name].norm())
        assert estimate.error == pytest.approx(error, rel=1e-9) and error > 1e-4, name
        assert estimate.correction is not None
        torch.testing.assert_close(want[0][name] + estimate.correction, want[1][name], rtol=1e-10, atol=1e-12)
    partial = certify(head, q, k, v, grad=grad, projections={n: projections[n] for n in "qv"})
    assert list(partial.gradients) == ["dA_q", "dB_q", "dA_v", "dB_v"]


def test_a_gradient_that_is_zero_has_no_error() -> None:
    """With ``B = 0``, ``dA`` is zero exactly and approximately."""
    q, k, v, grad = inputs(1, 600, 4, 0.3, seed=0)
    a, b = torch.randn(2, 6, dtype=q.dtype), q.new_zeros(4, 2)
    projection = Projection(torch.randn(600, 6, dtype=q.dtype), Linear(b @ a, None, a, b, 1.0))
    found = certify(Polynomial(2, scale=0.5, causal=True), q, k, v, grad=grad, projections={"q": projection}).gradients
    assert (found["dA_q"].error, found["dA_q"].upper) == (0.0, 0.0) and found["dB_q"].error > 0


def test_strata() -> None:
    difficulty = torch.rand(5000, dtype=torch.float64)
    sample = stratify([difficulty], 256)
    order = difficulty.argsort(descending=True)
    assert torch.equal(sample.top, order[:64])
    assert sample.drawn.shape == (8, 3, 8) and sample.sizes.tolist() == [192, 768, 3976]
    for rows, low, high in zip(sample.drawn.unbind(1), (64, 256, 1024), (256, 1024, 5000), strict=True):
        assert rows.shape == (8, 8) and torch.isin(rows, order[low:high]).all()
        assert len(rows.unique()) > 32  # drawn apart
    assert (sample.weights.sum(1) == sample.sizes).all()
    short = stratify([difficulty[:300]], 256)
    assert (
        short.sizes.tolist() == [192] and len(short.top) == 64 + 44
    )  # a stratum no larger than its sample is taken whole


def test_estimators_are_unbiased() -> None:
    """Means over 1000 draws, within four standard errors; the plain squared norm of the mean would be far off."""
    g = torch.Generator().manual_seed(1)
    terms = torch.randn(600, 6, generator=g, dtype=torch.float64) + 0.05
    terms[:, 0] *= torch.linspace(3, 0.1, 600, dtype=torch.float64).exp()
    squares, difficulty = terms.square().sum(1), terms[:, 0].abs() + torch.rand(600, generator=g)
    sums, norms, plain, means, variances = [], [], [], [], []
    for _ in range(1000):
        sample = stratify([difficulty], 64, g)
        sums.append(total(sample, squares[sample.top], squares[sample.drawn])[0])
        replicates = terms[sample.top].sum(0) + torch.einsum(
            "rhmc,hm->rc", terms[sample.drawn], sample.weights.double()
        )
        found = sum_of_rows(replicates[:, None])
        norms.append(found.squared_norm)
        plain.append(float(found.mean.square().sum()))
        means.append(found.mean)
        variances.append(found.variance)
    whole = terms.sum(0)

    def off(values: list[float], want: Tensor | float) -> float:
        t = torch.tensor(values, dtype=torch.float64)
        return float((t.mean() - want).abs() / (t.std() / len(t) ** 0.5))

    assert off(sums, squares.sum()) < 4
    assert off(norms, whole.square().sum()) < 4 < off(plain, whole.square().sum())
    mean = torch.stack(means)
    assert off(variances, mean.var(0).sum()) < 5  # of a variance that is itself estimated
    assert ((mean.mean(0) - whole).abs() < 4 * mean.std(0) / len(mean) ** 0.5).all()


def test_strata_by_several_difficulties() -> None:
    """The leading rows of each difficulty lead, as in an order by the highest rank."""
    several = [torch.rand(5000, dtype=torch.float64) for _ in range(3)]
    sample = stratify(several, 128)
    highest = torch.stack([t.argsort().argsort() for t in several]).amax(0)
    assert highest[sample.top].min() >= highest.sort().values[-32]
    for rows, low, high in zip(sample.drawn.unbind(1), (32, 128, 512), (128, 512, 5000), strict=True):
        bounds = highest.sort(descending=True).values[[low, high - 1]]
        assert bool(((highest[rows] <= bounds[0]) & (highest[rows] >= bounds[1])).all())


def test_products_of_cells_are_unbiased() -> None:
    """Sums over rows and keys from samples of both: means over 600 draws within four standard errors, limits above the truth.

    The key samples are shared by the rows', so products that are apart in rows alone would be far off."""
    g = torch.Generator().manual_seed(2)
    terms = torch.randn(90, 70, 3, generator=g, dtype=torch.float64) + 0.1  # rows, keys
    terms += torch.randn(70, 3, generator=g, dtype=torch.float64)
    want, norms, variances, means, limits, rows_only = terms.sum((0, 1)), [], [], [], [], []
    for _ in range(600):
        rows, keys = (torch.randint(n, (8, 5), generator=g) for n in (90, 70))
        cells = terms[rows][:, :, keys].sum((1, 3)) * (90 / 5) * (70 / 5)
        found = sum_of_rows(cells)
        norms.append(found.squared_norm)
        variances.append(found.variance)
        means.append(found.mean)
        limits.append(found.upper)
        rows_only.append(sum_of_rows(cells.mean(1, keepdim=True)).squared_norm)

    def off(values: list[float], truth: float) -> float:
        t = torch.tensor(values, dtype=torch.float64)
        return float((t.mean() - truth).abs() / (t.std() / len(t) ** 0.5))

    truth = float(want.square().sum())
    assert off(norms, truth) < 4 < off(rows_only, truth)
    mean, parts = torch.stack(means), (terms.mean(1, keepdim=True), terms.mean(0, keepdim=True), terms)
    by_row, by_key, each = (float(t.sub(terms.mean((0, 1))).square().mean((0, 1)).sum()) for t in parts)
    exact = (90 * 70) ** 2 * ((by_row + by_key) / 40 + (each - by_row - by_key) / 40**2)  # of 40 rows and 40 keys
    assert off(variances, exact) < 4
    assert ((mean.mean(0) - want).abs() < 4 * mean.std(0) / 600**0.5).all()
    assert sum(limit >= truth for limit in limits) >= 0.98 * 600


@pytest.mark.parametrize("causal", [False, True])
def test_factor_gradients_from_some_keys_are_unbiased(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one key in four and one row in five: the mean correction, and the squared error where it is not cut off at zero."""
    q, k, v, grad = inputs(1, 300, 4, 0.4, seed=3)
    grad = 0.1 * grad + 1.0
    g = torch.Generator().manual_seed(4)
    x, a = (torch.randn(n, 6, generator=g, dtype=q.dtype) for n in (300, 2))
    b = torch.randn(4, 2, generator=g, dtype=q.dtype)
    made = {n: Projection(x + 0.5, Linear(b @ a, None, a, b, 1.0)) for n in "kv"}
    head = Polynomial(1, scale=0.5, causal=causal)
    given, seen = results(head, q, k, v, grad), list[SumOfRows]()
    monkeypatch.setattr(
        "rankloom.attention.certificate.sum_of_rows", lambda cells: seen.append(sum_of_rows(cells)) or seen[-1]
    )
    for _ in range(80):
        certify(head, q, k, v, grad=grad, projections=made, rows=64, keys=80, generator=g, **given)
    approximate, exact = truth(head, q, k, v, grad)
    wanted = [
        f for n, p in made.items() for f in p.gradients((exact[f"d{n.upper()}"] - approximate[f"d{n.upper()}"])[None])
    ]
    for number, want in enumerate(wanted):
        mine = seen[number :: len(wanted)]
        squares = torch.tensor([found.squared_norm for found in mine], dtype=torch.float64)
        assert abs(squares.mean() - want.square().sum()) < 4 * squares.std() / 80**0.5
        mean = torch.stack([found.mean for found in mine])
        assert (mean.mean(0) - want).norm() < 2 * (mean.var(0).sum() / 80).sqrt()
        assert sum(found.upper >= want.square().sum() for found in mine) >= 76


@pytest.mark.parametrize(("causal", "keys"), product((False, True), (None, 80)))
def test_certificates_are_unbiased(causal: bool, keys: int | None) -> None:
    q, k, v, grad = inputs(2, 300, 4, 0.4, seed=3)
    grad = 0.1 * grad + 1.0
    head = Polynomial(2, scale=0.5, causal=causal)
    approximate, exact = truth(head, q, k, v, grad)
    given, generator = results(head, q, k, v, grad), torch.Generator().manual_seed(0)
    draws = [certify(head, q, k, v, grad=grad, keys=keys, generator=generator, **given) for _ in range(60)]
    for name in exact:
        squares = torch.tensor([estimates(c)[name][0] ** 2 for c in draws], dtype=torch.float64)
        want = (approximate[name] - exact[name]).norm() ** 2 / approximate[name].norm() ** 2
        assert abs(squares.mean() - want) < 4 * squares.std() / 60**0.5, name
        assert squares.std() > 0, name
    if keys:
        assert all(c.gradients[name].correction is None for c in draws for name in ("dK", "dV"))
        return
    if causal:
        return  # where the correction is offered in some draws only, those are not a fair sample
    mean = torch.stack([c.gradients["dV"].correction for c in draws])
    error = (mean.mean(0) - (exact["dV"] - approximate["dV"])).norm()
    assert error < 2 * (mean.var(0).sum() / 60).sqrt()


def test_the_control_variate_helps_where_it_is_offered() -> None:
    """Offered for a biased factor, where it removes most of the error; not where the sampling noise exceeds the error."""
    q, k, v, grad = inputs(1, 2000, 4, 0.4, seed=5)
    head = Polynomial(1, scale=0.5, causal=False)
    approximate, exact = truth(head, q, k, v, torch.ones_like(grad))
    estimate = certify(head, q, k, v, grad=torch.ones_like(grad), rows=256).gradients["dK"]
    assert estimate.correction is not None and estimate.residual is not None
    before, after = (relative(approximate["dK"] + c, exact["dK"]) for c in (0.0, estimate.correction))
    assert after < before / 2
    expected = estimate.residual * float(approximate["dK"].norm() / exact["dK"].norm())
    assert 0.5 < after / expected < 2
    noise = certify(head, 0.5 * q / q.norm(dim=-1, keepdim=True), k, v, grad=grad).gradients["dV"]
    assert noise.correction is None and noise.residual is None


def coverage(heads: int, length: int, rows: int, keys: int | None = None) -> dict[str, tuple[int, float, float]]:
    """Heads with a true error <= 3e-2: how many, the share that the limit covers, and the median limit over the truth."""
    ratios: dict[str, list[float]] = {}
    seed = 0
    while len(ratios.get("output", ())) < heads:
        seed += 1
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(6, generator=generator).tolist()
        dim = (4, 8, 16)[int(3 * draw[0])]
        q, k, v, grad = inputs(1 + int(2 * draw[1]), length, dim, 10 ** (-1.5 + 1.2 * draw[2]), seed, torch.float32)
        if draw[3] < 0.5:
            grad = grad * torch.randn(*grad.shape[:2], 1, generator=generator).exp()  # tokens of unequal weight
        if draw[4] < 0.5:
            grad = grad + torch.randn(dim, generator=generator)  # a common direction
        head = Polynomial(1 + int(4 * draw[5]), scale=dim**-0.5, causal=seed % 2 == 0)
        approximate, exact = truth(head, q, k, v, grad)
        if not 1e-5 < relative(approximate["output"], exact["output"]) <= 3e-2:
            continue
        certificate = certify(
            head, q, k, v, grad=grad, rows=rows, keys=keys, generator=generator, **results(head, q, k, v, grad)
        )
        for name, (_, upper) in estimates(certificate).items():
            if (error := relative(approximate[name], exact[name])) <= 3e-2:
                ratios.setdefault(name, []).append(upper / error)
    values = {name: torch.tensor(r) for name, r in ratios.items()}
    return {n: (len(r), float((r >= 1).float().mean()), float(r.median())) for n, r in values.items()}


@pytest.mark.parametrize("keys", [None, 192])
def test_limits_cover_the_truth(keys: int | None) -> None:
    found = coverage(24, 768, 128, keys)
    assert set(found) == {"output", "dQ", "dK", "dV"}
    for name, (count, covered, median) in found.items():
        assert count >= 10 and count * (1 - covered) < 2.5 and median <= (1.3 if name in ("output", "dQ") else 2.0), (
            name,
            found,
        )


@pytest.mark.slow
@pytest.mark.parametrize("keys", [None, 256])
def test_limits_cover_the_truth_on_200_heads(keys: int | None) -> None:
    found = coverage(200, 2048, 256, keys)
    print(found)
    for name, (count, covered, median) in found.items():
        assert count >= 80 and covered >= 0.95 and median <= (1.3 if name in ("output", "dQ") else 2.0), (name, found)


class Watched(Polynomial):
    """Notes which keys it was asked for, and which rows of them."""

    asked: list[tuple[Tensor, list[Tensor]]]

    def kernel(self, k: Tensor, to: Tensor, every: Tensor) -> Rows:
        rows, seen = super().kernel(k, to, every), list[Tensor]()
        self.asked.append((to, seen))

        def watched(q: Tensor, at: Tensor) -> Tensor:
            seen.append(at)
            return rows(q, at)

        return watched


def test_cost_is_bounded() -> None:
    """By default one row in 256, between 64 and 256, at 2304 keys, all of them once, and never more than 2^20 pairs at once."""

    def counted(length: int, rows: int | None = None, keys: int | None = None) -> int:
        head.asked = []
        given = {"out": grad, "denominators": torch.ones_like(grad[..., 0]), "gradients": (grad, grad[0], grad[0])}
        found = certify(head, q, k, v, grad=grad, rows=rows, keys=keys, **given).rows
        for to, seen in head.asked:
            assert sum(map(len, seen)) == found and max(map(len, seen)) * len(to) <= 2**20
        compared = torch.cat([to for to, _ in head.asked])
        assert bool((compared.diff() > 0).all())
        wanted = min(length, keys or KEYS)
        assert len(compared) == length if wanted == length else 0.75 * wanted < len(compared) <= wanted
        return found

    head = Watched(1, scale=0.5, causal=False)
    for length, most in ((70_000, 256), (40_000, 156), (800, 64)):
        q, k, v, grad = inputs(1, length, 2, 0.1, seed=0, dtype=torch.float32)
        assert most - 32 <= counted(length) <= most
    assert counted(800, rows=256) == 192  # three quarters: too short for a third stratum
    assert counted(800, keys=800) == 64


def test_causal_rows_meet_no_later_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the keys is asked for by the rows from its first key on, and by no others."""
    monkeypatch.setattr("rankloom.attention.rows._KEYS", {True: 50})
    q, k, v, grad = inputs(2, 400, 4, 0.2, seed=0)
    head = Watched(3, scale=0.5, causal=True)
    head.asked = []
    rows = certify(head, q, k, v, grad=grad).rows
    parts = [(int(to[0]), torch.cat(seen)) for to, seen in head.asked if len(to) == 50]
    assert [first for first, _ in parts] == list(range(0, 400, 50)) and len(parts[0][1]) == rows
    assert all(at.tolist() == parts[0][1][parts[0][1] >= first].tolist() for first, at in parts)


def test_failures_say_why() -> None:
    q, k, v, grad = inputs(1, 200, 4, 5.0, seed=0)
    failed = certify(Polynomial(1, scale=0.5, causal=True), q, k, v, grad=grad)
    assert failed.reason is not None and "denominators are not positive and finite" in failed.reason
    assert failed.error == failed.upper == math.inf and not failed.gradients and not failed.passes(1e3)
    head, q = Polynomial(2, scale=0.5, causal=False), 0.01 * q
    out, denominators = head(q, k, v)
    denominators[0, 7] = math.nan
    assert "1 of 200 denominators" in str(certify(head, q, k, v, out=out, denominators=denominators).reason)
    out[0, 0, 0], denominators[0, 7] = math.inf, 1.0
    assert certify(head, q, k, v, out=out, denominators=denominators).reason == "the approximate output is not finite"

    class Broken(Polynomial):
        def kernel(self, k: Tensor, to: Tensor, every: Tensor) -> Rows:
            rows = super().kernel(k, to, every)
            return lambda q, at: rows(q, at) * (math.nan if len(at) < 150 else 1.0)  # not when it is called

    broken = Broken(2, scale=0.5, causal=False)
    assert "not finite in dK, dV" in str(certify(broken, q, k, v, grad=grad).reason)


@pytest.mark.parametrize("causal", [False, True])
def test_a_factored_head(causal: bool) -> None:
    """Its rows, a polynomial of the logits without features, are those of the engine: all of them give the error itself."""
    q, k, v, grad = inputs(2, 150, 3, 0.3, seed=0)
    preconditioner = Preconditioner.fit(q.flatten(0, 1), k, 0.5)
    head = Factored(preconditioner, Isotropic(3, 3), scale=0.5, causal=causal, chunk=32)
    exact = backward(Exact(0, scale=0.5, causal=causal), q, k, v, grad)
    approximate = backward(head, q, k, v, grad)
    for name, (error, _) in estimates(certify(head, q, k, v, grad=grad, rows=300)).items():
        want = float((approximate[name] - exact[name]).norm() / approximate[name].norm())
        assert want > 1e-4 and error == pytest.approx(want, rel=1e-8), name


@pytest.mark.parametrize("series", ["taylor", "chebyshev"])
def test_a_polynomial_of_the_logits_is_its_factor(series: str) -> None:
    factor = Isotropic(3, 4, series, 2.0)
    x, y = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    phi, mixed = factor.features(y), factor.mix(factor.features(x))
    leaf = y.clone().requires_grad_()
    got = factor.kernel(x.mT @ leaf)
    torch.testing.assert_close(got, mixed.mT @ phi, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(factor.kernel(x.mT @ y), got.detach())
    pull = torch.randn_like(got)
    want = factor.pull_back(y, phi, mixed @ pull)
    torch.testing.assert_close(torch.autograd.grad(got, leaf, pull)[0], want, rtol=1e-10, atol=1e-10)


def test_passes() -> None:
    q, k, v, grad = inputs(1, 500, 4, 0.1, seed=0, dtype=torch.bfloat16)
    certificate = certify(Polynomial(3, scale=0.5, causal=True), q, k, v, grad=grad)
    worst = max(e.upper for e in certificate.gradients.values())
    assert 0 < certificate.upper < worst < 1
    assert certificate.passes(worst) and not certificate.passes(0.9 * worst)
    assert certificate.passes(certificate.upper, worst) and not certificate.passes(0.9 * certificate.upper, worst)


def test_bad_input_is_refused() -> None:
    q, k, v, grad = inputs(1, 100, 4, 0.1, seed=0)
    head = Polynomial(1, scale=0.5, causal=False)
    for arguments, message in (
        ((q[0], k, v), "of one length"),
        ((q, k[:-1], v), "of one length"),
        ((q, k, v[:-1]), "of one length"),
        ((q, k * math.nan, v), "k is not finite"),
    ):
        with pytest.raises(AttentionError, match=message):
            certify(head, *arguments)
    for options, message in (
        ({"grad": grad[:, :-1]}, "gradient is"),
        ({"grad": grad / 0}, "grad is not finite"),
        ({"rows": 10}, "at least 64 rows"),
        ({"keys": 63}, "at least 64 keys"),
        ({"out": q}, "denominators too"),
        ({"projections": {"o": Projection(q, Linear(k, None, k, v, 1.0))}}, "not o"),
    ):
        with pytest.raises(AttentionError, match=message):
            certify(head, q, k, v, **options)
