"""The counter-based generator: known answers, addressability, statistics, and independence of everything but its arguments."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from rankloom.kernels import generated
from rankloom.kernels.generated import choice, digest, normal, signs, uniform, words

KINDS = {"words": words, "uniform": uniform, "normal": normal, "signs": signs}
MASK = 2**64 - 1

KNOWN_WORDS = [1836830582, 1811810388, 700294959, 3683905799]
KNOWN_NORMALS = ["-0x1.263cbe0000000p+0", "0x1.3ab0640000000p-1", "0x1.3163e80000000p+0", "-0x1.7c14d00000000p+0"]
KNOWN_SIGNS = [0.0, 0.0, -1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
KNOWN_FEW = [849901430, 95268655, 888862139]
KNOWN_ALL = [2, 1, 4, 5, 0, 3]
KNOWN_DIGEST = "dafbce0d0919960f7055a98c24269020"


def splitmix(state: int, count: int) -> list[int]:
    """The published generator, in unbounded integers."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def test_the_hash_is_splitmix64() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [int(z) & MASK for z in generated._hash(1234567, 0, 5, "cpu")] == published == splitmix(1234567, 5)


@pytest.mark.parametrize(("seed", "stream"), [(0, "a"), (0, "b"), (1, "a"), (-3, "a"), (2**70, "")])
def test_words_are_the_halves_of_the_hash_of_seed_and_stream(seed: int, stream: str) -> None:
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest(), "little")
    want = [half for z in splitmix(key, 50) for half in (z & 0xFFFFFFFF, z >> 32)]
    assert words(seed, stream, 0, 100).tolist() == want
    far = 10**15
    (z,) = splitmix(key + far // 2 * 0x9E3779B97F4A7C15, 1)
    assert words(seed, stream, far, 2).tolist() == [z & 0xFFFFFFFF, z >> 32]


def test_known_answers() -> None:
    """What saved adapters rest on: these values may never change, in no process and on no machine."""
    assert words(0, "rankloom", 0, 4).tolist() == KNOWN_WORDS
    assert (uniform(0, "rankloom", 0, 4) * 2**24).tolist() == [word >> 8 for word in KNOWN_WORDS]
    assert [value.hex() for value in normal(0, "rankloom", 0, 4).tolist()] == KNOWN_NORMALS
    assert signs(0, "rankloom", 0, 8, 0.5).tolist() == KNOWN_SIGNS
    assert choice(0, "rankloom", 10**9, 3).tolist() == KNOWN_FEW
    assert choice(0, "rankloom", 6, 6).tolist() == KNOWN_ALL
    assert bytes(digest(normal(5, "rankloom", 0, 100_000)).tolist()).hex() == KNOWN_DIGEST


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_is_the_slice_of_the_whole(kind: str) -> None:
    make, count = KINDS[kind], 3 * generated.CHUNK
    whole = make(3, "x", 0, count)
    edges = (0, 1, 7, generated.CHUNK - 1, 2 * generated.CHUNK - 1, 2 * generated.CHUNK, count - 2)
    for start in edges:
        for length in (0, 1, 2, 5, count - start):
            assert torch.equal(make(3, "x", start, min(length, count - start)), whole[start : start + length])


@pytest.mark.parametrize("kind", KINDS)
def test_values_do_not_depend_on_threads_or_global_state(kind: str) -> None:
    make, threads = KINDS[kind], torch.get_num_threads()
    want, state = make(1, "x", 0, 100_000), torch.get_rng_state()
    try:
        torch.set_num_threads(3)
        torch.manual_seed(5)
        torch.set_default_dtype(torch.float64)
        assert torch.equal(make(1, "x", 0, 100_000), want)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    torch.set_rng_state(state)
    make(1, "x", 0, 10)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(make(1, "x", 0, 100_000), want)


def test_normals_are_box_and_mullers() -> None:
    made, w = normal(2, "n", 0, 200_000).double(), words(2, "n", 0, 200_000).double().view(-1, 2)
    radius = ((w[:, 0] + 0.5) / 2**32).log().mul(-2).sqrt()
    angle = 2 * math.pi * (w[:, 1] / 2**32)
    want = torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()
    # The radius is coarse where it is near zero: the grid of float32 just below one.
    torch.testing.assert_close(made, want, rtol=0, atol=2e-4)
    assert float((made - want).abs().mean()) < 1e-6


def moments(x: Tensor) -> list[float]:
    return [float((x**k).mean()) for k in range(1, 5)]


N = 500_000


@pytest.mark.parametrize(
    ("kind", "want", "spread"),
    [
        ("uniform", [0, 1 / 12, 0, 1 / 80], [1 / 12, 1 / 180, 1 / 448, 1 / 3600]),
        ("normal", [0, 1, 0, 3], [1, 2, 15, 96]),
        ("signs", [0, 1, 0, 1], [1, 1e-20, 1, 1e-20]),
    ],
)
def test_moments(kind: str, want: list[float], spread: list[float]) -> None:
    """Within five standard errors; ``spread`` is the variance of each power."""
    x = KINDS[kind](11, "moments", 0, N).double() - (0.5 if kind == "uniform" else 0)
    for got, expected, variance in zip(moments(x), want, spread, strict=True):
        assert abs(got - expected) < 5 * (variance / N) ** 0.5 + 1e-9


@pytest.mark.parametrize("kind", ["uniform", "normal", "signs"])
def test_neighbours_and_streams_do_not_correlate(kind: str) -> None:
    make = KINDS[kind]
    x, others = make(0, "x", 0, N), [make(0, "y", 0, N), make(1, "x", 0, N), make(0, "x.0", 0, N)]
    centred = x.double() - x.double().mean()
    variance = float(centred.square().mean())
    lagged = [float((centred[lag:] * centred[: N - lag]).mean()) for lag in (1, 2, 3, 16, 64, 768, 4096, 65536)]
    squares = [float((centred.abs()[lag:] * centred[: N - lag]).mean()) for lag in (1, 2)]
    across = [float((centred * (other.double() - other.double().mean())).mean()) for other in others]
    assert max(map(abs, [*lagged, *across])) < 5 * variance / N**0.5
    assert max(map(abs, squares)) < 5 * variance / N**0.5 * 1.5


def test_bits_are_even_and_words_do_not_repeat() -> None:
    w = words(4, "bits", 0, N)
    ones = torch.stack([(w >> bit & 1).double().mean() for bit in range(32)])
    assert float((ones - 0.5).abs().max()) < 5 * 0.5 / N**0.5
    # Pairs of words are a bijection of the counter: no cycle shorter than 2^64. Single words collide as often as chance has it.
    pairs = w.view(-1, 2)
    assert len(torch.unique(pairs[:, 0] << 31 ^ pairs[:, 1])) == N // 2
    collisions = N - len(torch.unique(w))
    expected = N**2 / 2**33
    assert abs(collisions - expected) < 5 * expected**0.5


def test_cells_of_the_square_are_filled_evenly() -> None:
    """Chi-squared of successive pairs and of triples over a grid."""
    u = uniform(6, "grid", 0, N)
    for dim, side in ((2, 64), (3, 16)):
        cells = (u[: N // dim * dim].view(-1, dim) * side).long() @ torch.tensor([side**k for k in range(dim)])
        counts = torch.bincount(cells, minlength=side**dim).double()
        expected = len(cells) / side**dim
        chi, freedom = float(((counts - expected) ** 2 / expected).sum()), side**dim - 1
        assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("density", [0.0, 0.02, 1 / 3, 1.0])
def test_density_of_signs(density: float) -> None:
    x = signs(8, "sparse", 0, N, density)
    assert set(x.unique().tolist()) <= {-1.0, 0.0, 1.0}
    for share, want in ((x.abs().double().mean(), density), ((x == 1).double().mean(), density / 2)):
        assert abs(float(share) - want) <= 5 * (want * (1 - want) / N) ** 0.5


@pytest.mark.parametrize(
    ("population", "count"), [(1, 1), (10, 0), (10, 10), (97, 40), (97, 5), (10**12, 1000), (5000, 600)]
)
def test_choices_are_distinct(population: int, count: int) -> None:
    chosen = choice(9, "choice", population, count)
    assert len(chosen) == count == len(torch.unique(chosen))
    assert all(0 <= int(i) < population for i in chosen)


def test_choices_are_even() -> None:
    for population, count, draws in ((8, 3, 4000), (40, 4, 1000)):
        hits = torch.zeros(count, population)
        for seed in range(draws):
            hits[torch.arange(count), choice(seed, "even", population, count)] += 1
        expected = draws / population  # at every place, every number is equally likely
        assert float((hits - expected).abs().max()) < 5 * expected**0.5
    with pytest.raises(ValueError, match="cannot choose 5 distinct numbers out of 4"):
        choice(0, "", 4, 5)


def test_the_digest_sees_every_bit_shape_and_dtype() -> None:
    x = normal(0, "d", 0, 12)
    marks = [digest(x), digest(x.view(3, 4)), digest(x.double()), digest(x, x), digest(torch.cat([x, x]))]
    moved = x.clone()
    moved.view(torch.int32)[5] ^= 1
    marks.append(digest(moved))
    assert len({bytes(mark.tolist()) for mark in marks}) == len(marks)
    assert marks[0].dtype == torch.uint8 and marks[0].shape == (16,)
    assert torch.equal(digest(x.view(3, 4).T), digest(x.view(3, 4).T.contiguous()))
    assert torch.equal(digest(x.bfloat16()), digest(x.bfloat16().clone()))
