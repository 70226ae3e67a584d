"""The choice of a head's approximation: the fastest that is certified, hysteresis, and its state."""

from __future__ import annotations

import io
from math import inf, nan
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.attention import fitting
from rankloom.attention.candidates import CANDIDATES, KINDS, Kind
from rankloom.attention.contract import Factor
from rankloom.attention.cost import CostModel
from rankloom.attention.factored import Factored
from rankloom.attention.fitting import Fit, Sample, fit
from rankloom.attention.mehler import Mehler
from rankloom.attention.nystrom import Nystrom
from rankloom.attention.polynomial import Anisotropic, Isotropic
from rankloom.attention.precondition import Preconditioner
from rankloom.errors import AttentionError

SCALE = 0.5


def cost(most: int = 576) -> CostModel:
    """At 96 tokens factors of fewer than ``most`` features are faster than exact attention, wider ones slower."""
    return CostModel((0.0, most * 1e-3 / 96), dict.fromkeys(KINDS, ((1, 0.0, 1e-3), (10_000, 0.0, 10.0))))


def sample(size: float, seed: int = 0, group: int = 2, length: int = 96) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((group, length, 4), (length, 4), (length, 3), (group, length, 3))
    )
    return Sample(size * q, size * k, v, grad)


def fitted(size: float, **changes: Any) -> Fit:
    generator = torch.Generator().manual_seed(1)
    settings: dict[str, Any] = {"scale": SCALE, "causal": False, "eps": 1e-2, "cost": cost(), "generator": generator}
    samples = changes.pop("samples", [sample(size)])
    return fit(samples, **{**settings, **changes})


def error(found: Fit, at: Sample) -> float:
    """The true worst relative error of output and gradients."""

    def run(attend: Any) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (at.q, at.k, at.v)]
        out = attend(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, at.grad)]

    assert found.approximation is not None
    exact = run(lambda q, k, v: F.softmax(SCALE * q @ k.mT, -1) @ v)
    got = run(lambda q, k, v: found.approximation(q, k, v)[0])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("size", [0.3, 0.5, 0.7])
def test_the_fastest_that_passes(size: float) -> None:
    found = fitted(size)
    assert found.approximation is not None
    assert error(found, sample(size)) <= found.error <= 1e-2
    assert found.length <= 96
    width = int(found.reason.split()[1])
    assert found.seconds == pytest.approx(96e-3 * width)
    with_less = fitted(size, cost=cost(width))  # now this width does not pay any more
    assert with_less.approximation is None and with_less.error > 1e-2


@pytest.mark.parametrize("size", [0.5, 3.0])
def test_spent_is_what_was_tried(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Screens at 1 second and certificates, of each sequence, at 100; nothing is booked that was not run."""
    certify, tried = fitting.certify, list[float]()

    def counted(*args: Any, **named: Any) -> Any:
        tried.append(1.0 if named["rows"] == 64 else 100.0)
        return certify(*args, **named)

    monkeypatch.setattr(fitting, "certify", counted)
    monkeypatch.setattr(fitting, "screen_seconds", lambda *_: 1.0)
    monkeypatch.setattr(fitting, "certificate_seconds", lambda *_: 100.0)
    found = fitted(size, samples=[sample(size), sample(size, seed=1)])
    assert (found.approximation is None) == (size == 3.0) and found.spent == sum(tried) > 0
    assert Fit.restore(found.state(), torch.device("cpu")).spent == 0.0


def test_nothing_pays_and_nothing_passes() -> None:
    assert fitted(0.3, cost=cost(2)) == Fit("no factor is faster at this length")
    large = fitted(8.0)
    assert large.approximation is None and large.reason == "certificate" and large.error > 1e-2


def test_the_worst_of_several_sequences_counts() -> None:
    small, large = sample(0.3), sample(0.7, seed=2)
    one, both = fitted(0.3), fitted(0.3, samples=[small, large])
    assert one.approximation is not None and both.approximation is not None
    assert both.seconds > one.seconds
    assert max(error(both, small), error(both, large)) <= both.error <= 1e-2


def test_without_a_gradient_the_output_counts() -> None:
    at = sample(0.4)
    output = fitted(0.4, samples=[Sample(at.q, at.k, at.v, None)])
    assert output.approximation is not None
    assert output.seconds < fitted(0.4).seconds


def test_hysteresis() -> None:
    found = fitted(0.6)
    eps = 1.6 * found.error  # passes eps, but not half of it
    assert fitted(0.6, eps=eps).seconds == found.seconds
    assert fitted(0.6, eps=eps, before=found).seconds == found.seconds
    wider = fitted(0.6, eps=eps, before=Fit("wider", found.approximation, seconds=2 * found.seconds))
    assert wider.reason != found.reason
    assert wider.seconds >= 2 * found.seconds or wider.error <= eps / 2
    failed = fitted(0.6, eps=eps, before=Fit("certificate"))
    assert failed.approximation is None or failed.error <= eps / 2
    assert fitted(0.6, eps=eps, before=Fit("certificate"), hysteresis=1.0).seconds == found.seconds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_state_restores_the_very_same_map(kind: Kind, causal: bool) -> None:
    at = sample(0.6)
    preconditioner = Preconditioner.fit(at.q.flatten(0, 1), at.k, SCALE)
    size = 3 if kind == "isotropic" else 24
    choice = CANDIDATES[kind].choose(size, preconditioner, at.k, torch.Generator().manual_seed(0))
    made = CANDIDATES[kind].build(choice, preconditioner, causal=causal)
    before = Fit(kind, made, 1e-3, 100.0, 0.5, (kind, choice))
    buffer = io.BytesIO()
    torch.save(before.state(), buffer)
    buffer.seek(0)
    after = Fit.restore(torch.load(buffer, weights_only=True), torch.device("cpu"))
    assert after.approximation is not None
    assert (after.reason, after.error, after.length, after.seconds) == (kind, 1e-3, 100.0, 0.5)
    assert after.approximation.causal == causal and type(after.approximation) is type(made)
    for a, b in zip(after.approximation(at.q, at.k, at.v), made(at.q, at.k, at.v), strict=True):
        assert torch.equal(a, b)
    assert Fit.restore(Fit("certificate", error=inf).state(), torch.device("cpu")) == Fit("certificate")


def test_states_of_before_load() -> None:
    """A factor by its degree, width or landmarks, under the names the state has had from the first release on."""
    at = sample(0.6)
    preconditioner = Preconditioner.fit(at.q.flatten(0, 1), at.k, SCALE)
    landmarks = Nystrom.fit(preconditioner.keys(at.k), 24, generator=torch.Generator().manual_seed(0)).landmarks
    factors: dict[str, tuple[Any, Factor]] = {
        "isotropic": (3, Isotropic(4, 3)),
        "anisotropic": (50, Anisotropic(preconditioner.spectrum, 50)),
        "mehler": (50, Mehler(preconditioner.spectrum, 50)),
        "nystrom": (landmarks, Nystrom(landmarks)),
    }
    for kind, (stored, factor) in factors.items():
        state = {"reason": kind, "error": 1e-3, "length": 100.0, "seconds": 0.5, "causal": True}
        state |= {"preconditioner": dict(vars(preconditioner)), "factor": (kind, stored)}
        found = Fit.restore(state, torch.device("cpu")).approximation
        made = Factored(preconditioner, factor, scale=SCALE, causal=True)
        assert found is not None and torch.equal(found(at.q, at.k, at.v)[0], made(at.q, at.k, at.v)[0])


def test_nan_is_an_error() -> None:
    at = sample(0.3)
    at.k[3, 1] = nan
    with pytest.raises(AttentionError, match="NaN or infinity"):
        fitted(0.3, samples=[at])
