"""Banks and combinations: corners that depend on nothing else, nothing kept or saved where it is asked not to be."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from rankloom.kernels.bank import Bank
from rankloom.kernels.combine import combine

F64, CPU = torch.float64, torch.device("cpu")


@pytest.mark.parametrize("entries", ["uniform", "normal", "ternary"])
def test_entries_have_mean_zero_and_variance_one_and_do_not_depend_on_the_size(entries: str) -> None:
    density = 0.25 if entries == "ternary" else 1.0
    bank = Bank(3, "x", 200, 500, entries, density=density)  # type: ignore[arg-type]
    whole = bank.corner(200, 500, torch.empty(0, dtype=F64))
    assert abs(float(whole.mean())) < 5 / whole.numel() ** 0.5
    assert abs(float(whole.square().mean()) - 1) < 0.04
    if entries == "ternary":
        assert set(whole.unique().tolist()) == {-2.0, 0.0, 2.0}
    smaller = Bank(3, "x", 20, 31, entries, density=density, kept=False)  # type: ignore[arg-type]
    assert torch.equal(smaller.rows(4, 20, 31, CPU, F64), whole[4:20, :31])
    gram = whole @ whole.mT / 500
    assert float((gram - torch.diag(gram.diag())).abs().max()) < 6 / 500**0.5  # rows are independent


def test_a_bank_is_made_once_and_shared_by_copies_but_never_pickled() -> None:
    bank = Bank(0, "x", 4, 10)
    first = bank.corner(2, 5, torch.empty(0))
    assert bank.corner(4, 10, torch.empty(0)).data_ptr() == first.data_ptr()
    assert copy.deepcopy(bank) is bank
    again = pickle.loads(pickle.dumps(bank))
    assert not again._held and torch.equal(again.corner(4, 10, torch.empty(0)), bank.corner(4, 10, torch.empty(0)))
    bare = Bank(0, "x", 4, 10, kept=False)
    bare.corner(4, 10, torch.empty(0))
    assert not bare._held


def test_the_digest_is_of_the_corner_kept_or_not() -> None:
    marks = [Bank(seed, "x", 6, 10, kept=kept).digest(4, 7) for seed, kept in ((0, True), (0, False), (1, True))]
    assert torch.equal(marks[0], marks[1]) and not torch.equal(marks[0], marks[2])
    assert torch.equal(marks[0], Bank(0, "x", 60, 90).digest(4, 7))
    assert not torch.equal(marks[0], Bank(0, "x", 6, 10).digest(5, 7))


def explicit(bank: Bank, c: Tensor, shape: tuple[int, int], scale: float) -> Tensor:
    """The sum written out."""
    out = torch.zeros(shape, dtype=F64)
    for i, value in enumerate(c):
        out = out + scale * value * bank.row(i, shape[0] * shape[1]).double().view(shape)
    return out


@pytest.mark.parametrize("kept", [True, False])
def test_combinations_are_sums_over_the_bank(kept: bool) -> None:
    bank, c = Bank(1, "m", 9, 40, kept=kept), torch.randn(9, dtype=F64, requires_grad=True)
    want = explicit(bank, c, (5, 7), 0.3)
    pull = torch.randn(5, 7, dtype=F64)
    by_hand = torch.stack([0.3 * (bank.row(i, 35).double().view(5, 7) * pull).sum() for i in range(9)])
    results = []
    for chunk in (1, 4, 9, None):
        out = combine(c, bank, (5, 7), 0.3, chunk)
        torch.testing.assert_close(out, want, rtol=1e-13, atol=1e-14)
        (grad,) = torch.autograd.grad(out, c, pull)
        torch.testing.assert_close(grad, by_hand, rtol=1e-13, atol=1e-14)
        results.append(out)
    assert torch.autograd.gradcheck(lambda c: combine(c, bank, (5, 7), 0.3, 4), (c,))
    assert combine(c, bank, (5, 7)).grad_fn.saved_tensors == ()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = combine(c.float(), bank, (5, 7), 0.3)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), want, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused() -> None:
    bank, c = Bank(1, "m", 3, 4), torch.randn(3, requires_grad=True)
    weight = torch.randn(2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad((combine(c, bank, (2, 2)) * weight).sum(), c, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    rows = Bank.rows

    def watched(self: Bank, *args: object) -> Tensor:
        seen.append(rows(self, *args))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(Bank, "rows", watched)
    bank, c = Bank(1, "m", 64, 60_000, kept=False), torch.randn(64, requires_grad=True)
    combine(c, bank, (200, 300)).sum().backward()
    assert sum(map(len, seen)) == 2 * 64 and max(t.numel() for t in seen) <= 1 << 20


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    c = torch.randn(3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    combine(c, Bank(0, "x", 3, 6, kept=False), (2, 3)).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
