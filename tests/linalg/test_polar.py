"""The polar factor against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from rankloom.linalg import polar_factor


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (9, 5), (1, 4), (40, 30)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_is_u_vt(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    matrix = 7 * torch.randn(shape, dtype=dtype)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(polar_factor(matrix), u @ vh, rtol=tolerance, atol=tolerance)


def test_singular_values_over_five_orders() -> None:
    u, v = (torch.linalg.qr(torch.randn(n, 6, dtype=torch.float64)).Q for n in (12, 9))
    matrix = (u * torch.logspace(0, -5, 6, dtype=torch.float64)) @ v.mT
    torch.testing.assert_close(polar_factor(matrix), u @ v.mT, rtol=1e-8, atol=1e-8)
    # Rounded to float32, the matrix itself says no more than this about its smallest directions.
    narrow = matrix.float()
    u, _, vh = torch.linalg.svd(narrow.double(), full_matrices=False)
    kept = u[:, :6] @ vh[:6]
    found = polar_factor(narrow).double()
    torch.testing.assert_close(u[:, :6].mT @ found @ vh[:6].mT, torch.eye(6, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert (found - kept).norm() < 0.05  # what rounding made of the three zero values is damped


def test_zero_directions_stay_zero() -> None:
    u, v = (torch.linalg.qr(torch.randn(n, 2, dtype=torch.float64)).Q for n in (7, 5))
    torch.testing.assert_close(polar_factor(3 * u @ v.mT), u @ v.mT, rtol=1e-9, atol=1e-9)
    assert not polar_factor(torch.zeros(3, 4)).any()
