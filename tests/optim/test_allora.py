"""ALLoRA (2410.09692): the row coefficient, what it does to gradients and directions, and how it leaves zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankloom import Recipe, methods
from rankloom.errors import RecipeError
from rankloom.optim import ALLoRA, find_pairs, stacked
from tests.optim.toy import Toy, moved, toy


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.1, 1e3), st.floats(1e-6, 1e6))
def test_every_row_of_b_has_its_coefficient(seed: int, eta: float, size: float) -> None:
    of = toy(seed=seed)
    of.b.data *= size
    of.backward()
    c = [1 / (float(row.detach().norm()) + 1 / eta**2) ** 0.5 for row in of.b]
    assert all(0 < x <= eta * (1 + 1e-12) for x in c)
    grad_a, grad_b = transformed(ALLoRA(eta=eta), of)
    assert torch.equal(grad_a, of.a.grad)
    want = torch.tensor(c, dtype=torch.float64)[:, None] * of.b.grad
    torch.testing.assert_close(grad_b, want, rtol=1e-12, atol=0)


def transformed(part: ALLoRA, of: Toy) -> tuple[Tensor, Tensor]:
    """What the part makes of the gradients at hand."""
    [(_, stack)] = stacked(find_pairs(of.trainables), {of.a: of.a.grad, of.b: of.b.grad})
    grad_a, grad_b = part.precondition(stack)
    return grad_a[0], grad_b[0]


def test_limits_of_the_coefficient() -> None:
    of = toy()
    of.b.data[0] = 0
    of.b.data[1:] *= torch.logspace(-2, 3, 6, dtype=torch.float64)[:, None] / of.b.data[1:].norm(dim=1, keepdim=True)
    of.backward()
    ratio = transformed(ALLoRA(eta=1e4), of)[1] / of.b.grad
    assert torch.allclose(ratio[0], torch.full_like(ratio[0], 1e4))  # a row at zero: eta
    norms = of.b.detach()[1:].norm(dim=1, keepdim=True)
    torch.testing.assert_close(ratio[1:], norms.rsqrt().expand(-1, 3), rtol=1e-5, atol=0)  # eta -> inf: ||b||^-1/2
    assert (ratio[1:-1] > ratio[2:]).all()  # falls with the norm


def test_from_loras_start_b_is_eta_times_faster() -> None:
    of = toy()
    of.b.data.zero_()
    step_a, step_b = moved(ALLoRA(inner="sgd", eta=3.0), of)
    of.backward()
    assert torch.count_nonzero(step_a) == 0
    torch.testing.assert_close(step_b, 3 * of.b.grad, rtol=1e-12, atol=0)


def escape(eta: float | None) -> int:
    """Steps of descent on ``(1 - b a)^2 / 2`` from ``b = 0`` until ``b a`` is half way."""
    of = Toy(
        nn.Parameter(torch.full((1, 1), 0.1).double()), nn.Parameter(torch.zeros(1, 1).double()), torch.eye(1), 1.0
    )
    part = ALLoRA(inner="sgd", eta=eta or 1.0)
    optimizer = part.build(of.trainables, 1e-3) if eta else torch.optim.SGD([of.a, of.b], lr=1e-3)
    for step in range(20000):
        if float(of.weight) > 0.01:
            return step
        of.g = (of.weight - 1).double()
        of.backward()
        optimizer.step()
    raise AssertionError("never escaped")


def test_it_leaves_zero_about_eta_times_sooner() -> None:
    plain = escape(None)
    for eta in (2.0, 3.0):
        assert 0.7 * eta < plain / escape(eta) < 1.2 * eta


def test_after_adamw_the_coefficient_is_a_learning_rate_of_the_row() -> None:
    """Before AdamW a constant coefficient changes nothing; after it, it does."""
    rows = {}
    for acts_on in ("gradient", "direction"):
        of = toy()
        of.b.data.zero_()
        rows[acts_on] = moved(ALLoRA(eta=3.0, acts_on=acts_on), of, 1e-2)[1]  # type: ignore[arg-type]
    of = toy()
    of.b.data.zero_()
    of.backward()
    torch.testing.assert_close(rows["gradient"], of.b.grad.sign(), rtol=1e-6, atol=1e-6)  # AdamW's first step
    torch.testing.assert_close(rows["direction"], 3 * of.b.grad.sign(), rtol=1e-6, atol=1e-6)


def test_the_table_says_what_is_reconstructed() -> None:
    entry = methods.TABLE["allora"]
    adapter = entry.recipe.adapter
    assert adapter.alpha == adapter.rank and adapter.dropout == 0  # type: ignore[attr-defined]
    assert "reconstructed" in entry.deviations
    with pytest.raises(RecipeError, match="eta must be above 0"):
        Recipe(optimizer=ALLoRA(eta=0)).check()
