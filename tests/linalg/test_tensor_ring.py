"""Tensor rings against their definition written out entry by entry, and penalties against the dense matrix."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from rankloom.linalg import (
    chain,
    mode_sizes,
    ring_change,
    ring_identity_penalty,
    ring_orthogonality_penalty,
)

SHAPES = [((2, 3), 2), ((2, 3, 4), 1), ((2, 3, 2), 3), ((2, 2, 3, 2), 2)]


def made(sizes: tuple[int, ...], rank: int, size: float = 0.5) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    cores = [size * torch.randn(n, n, rank, rank, generator=generator, dtype=torch.float64) for n in sizes]
    bonds = torch.randn(len(sizes), rank, rank, generator=generator, dtype=torch.float64)
    bonds[-1] = torch.linalg.inv(torch.linalg.multi_dot([torch.eye(rank).double(), *bonds[:-1]])) / rank
    return cores, bonds


def entrywise(cores: list[Tensor], bonds: Tensor) -> Tensor:
    """``T`` by its definition."""
    whole = [torch.eye(len(c))[:, :, None, None].double() * m + c for c, m in zip(cores, bonds, strict=True)]
    index = list(itertools.product(*(range(len(c)) for c in cores)))
    rows = []
    for i in index:
        row = []
        for j in index:
            product = torch.eye(bonds.shape[-1], dtype=torch.float64)
            for d, core in enumerate(whole):
                product = product @ core[i[d], j[d]]
            row.append(product.trace())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize(("sizes", "rank"), SHAPES)
def test_the_change_is_the_ring_less_the_identity(sizes: tuple[int, ...], rank: int) -> None:
    cores, bonds = made(sizes, rank)
    want = entrywise(cores, bonds) - torch.eye(math.prod(sizes), dtype=torch.float64)
    torch.testing.assert_close(ring_change(cores, bonds), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("sizes", "rank"), SHAPES)
def test_without_movement_it_is_zero_and_small_without_cancellation(sizes: tuple[int, ...], rank: int) -> None:
    cores, bonds = made(sizes, rank, 0.0)
    assert not ring_change(cores, bonds).any()
    identity = torch.eye(math.prod(sizes), dtype=torch.float64)
    torch.testing.assert_close(entrywise(cores, bonds), identity, rtol=0, atol=1e-12)
    one, other = (made(sizes, rank, size)[0] for size in (1e-12, 1e-6))
    first = ring_change(one, bonds) / 1e-12
    torch.testing.assert_close(first, ring_change(other, bonds) / 1e-6, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("sizes", "rank"), SHAPES)
def test_penalties_are_the_dense_norms(sizes: tuple[int, ...], rank: int) -> None:
    cores, bonds = made(sizes, rank)
    t, identity = entrywise(cores, bonds), torch.eye(math.prod(sizes), dtype=torch.float64)
    torch.testing.assert_close(ring_identity_penalty(cores, bonds), (t - identity).square().sum(), rtol=1e-9, atol=1e-9)
    want = (t.mT @ t - identity).square().sum()
    torch.testing.assert_close(ring_orthogonality_penalty(cores, bonds), want, rtol=1e-8, atol=1e-8)


def test_rank_one_is_a_kronecker_product() -> None:
    cores, bonds = made((2, 3, 4), 1)
    whole = [torch.eye(len(c)).double() * m + c[:, :, 0, 0] for c, m in zip(cores, bonds, strict=True)]
    want = torch.kron(torch.kron(whole[0], whole[1]), whole[2])
    torch.testing.assert_close(ring_change(cores, bonds) + torch.eye(24, dtype=torch.float64), want)


def test_a_chain_is_the_product_of_its_slices() -> None:
    cores = [torch.randn(n, 3, 3, dtype=torch.float64) for n in (2, 4, 3)]
    got = chain(cores)
    for at, (i, j, k) in enumerate(itertools.product(range(2), range(4), range(3))):
        torch.testing.assert_close(got[at], cores[0][i] @ cores[1][j] @ cores[2][k])


@pytest.mark.parametrize("modes", [1, 2, 3, 4])
def test_sizes_are_near_balanced_whatever_the_dimension(modes: int) -> None:
    for dimension in [*range(1, 60), 97, 576, 577, 1280, 1536, 4096]:
        sizes = mode_sizes(dimension, modes)
        assert len(sizes) == modes and dimension <= math.prod(sizes) <= 1.5 * dimension + 3
        assert max(sizes) <= 2 * math.ceil(math.prod(sizes) ** (1 / modes))
    assert mode_sizes(1280, 3) == (8, 10, 16) and mode_sizes(97, 2) == (7, 14)
