"""Principal angles against scipy's, which takes another route, and at both ends of their range."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankloom.linalg import principal_angles


@given(n=st.integers(1, 12), j=st.integers(1, 6), k=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_angles_agree_with_scipy(n: int, j: int, k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    one = torch.randn(n, min(j, n), generator=g, dtype=torch.float64)
    other = torch.randn(n, min(k, n), generator=g, dtype=torch.float64)
    want = sorted(scipy.linalg.subspace_angles(one.numpy(), other.numpy()).tolist())
    assert principal_angles(one, other).tolist() == pytest.approx(want, abs=1e-7)  # scipy's own zeros are 2e-8
    assert principal_angles(other, one).tolist() == pytest.approx(want, abs=1e-7)


def test_equal_nested_and_orthogonal_spans() -> None:
    q = torch.linalg.qr(torch.randn(9, 6, dtype=torch.float64)).Q
    mixed = q[:, :3] @ torch.randn(3, 3, dtype=torch.float64)
    assert float(principal_angles(q[:, :3], mixed).max()) < 1e-14  # another basis of one span
    assert float(principal_angles(q, q[:, :2]).max()) < 1e-14
    assert principal_angles(q[:, :3], q[:, 3:]).tolist() == pytest.approx([math.pi / 2] * 3, abs=1e-14)


def test_small_angles_keep_their_digits() -> None:
    """``arccos`` of a cosine would return 0 or 1.5e-8 here."""
    one = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    other = torch.tensor([[math.cos(1e-10)], [math.sin(1e-10)]], dtype=torch.float64)
    assert float(principal_angles(one, other)) == pytest.approx(1e-10, rel=1e-6)
