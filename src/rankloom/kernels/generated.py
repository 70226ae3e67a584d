"""Random numbers as a function of (seed, stream, index): the same bits on every device, in any slice, with any thread count.

Number ``i`` of a stream is a hash of ``i``, so a frozen random tensor needs no storage: its seed gives it back, whole or in
pieces. The hash is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in counter mode,

    z = key + (j + 1) g,   z = (z ^ z >> 30) m1,   z = (z ^ z >> 27) m2,   z ^ z >> 31,

its ``key`` the BLAKE2 hash of seed and stream, and each 64-bit result gives the two words ``2 j`` and ``2 j + 1``. Everything
after it is a chain of single, correctly rounded operations (``+ - * / sqrt``): library functions such as ``log`` or ``cos``
differ in the last bit between devices, and on one device between vectorised and left-over elements.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["choice", "digest", "normal", "signs", "uniform", "words"]

CHUNK = 1 << 15  # pairs of words at a time: every temporary stays in the caches

LOW = (1 << 32) - 1
GOLDEN, FIRST, SECOND = (z - (1 << 64) for z in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

# log m = 2 s (1 + s^2 / 3 + s^4 / 5 + ...) with s = (m - 1) / (m + 1), |s| <= 0.172
LOG = [1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0]
# sin(t pi / 2) = t (pi / 2 - ...) on [-1, 1], by its Taylor series up to t^13
SINE = [(-1) ** k * (math.pi / 2) ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(6, -1, -1)]


def words(seed: int, stream: str, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """32-bit words ``start .. start + count`` of a stream, as int64 in [0, 2^32)."""
    return _filled(_pair_of_words, torch.int64, seed, stream, start, count, device)


def uniform(seed: int, stream: str, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``U[0, 1)`` on the grid of 2^-24: numbers ``start .. start + count`` of a stream, float32."""
    return _filled(_pair_of_uniforms, torch.float32, seed, stream, start, count, device)


def normal(seed: int, stream: str, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``N(0, 1)`` by Box and Muller: numbers ``start .. start + count`` of a stream, float32; at most 6.8 in size."""
    return _filled(_pair_of_normals, torch.float32, seed, stream, start, count, device)


def signs(
    seed: int, stream: str, start: int, count: int, density: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """+1 and -1 with probability ``density / 2`` each, else 0 (to within 2^-32), float32."""
    tail = round(density * 2**31)

    def pair(z: Tensor) -> tuple[Tensor, Tensor]:
        up, down = ((word >= (1 << 32) - tail, word < tail) for word in _pair_of_words(z))
        return up[0].float() - up[1].float(), down[0].float() - down[1].float()

    return _filled(pair, torch.float32, seed, stream, start, count, device)


def choice(seed: int, stream: str, population: int, count: int) -> Tensor:
    """``count`` distinct numbers of ``range(population)`` in random order, int64."""
    if not 0 <= count <= population:
        raise ValueError(f"cannot choose {count} distinct numbers out of {population}")
    key = _key(seed, stream)
    if 8 * count > population:
        return _hash(key, 0, population, "cpu").argsort(stable=True)[:count]
    # Few of many: draw with repetition, and keep what comes for the first time.
    drawn = (_hash(key, 0, 2 * count + 64, "cpu") & (2**63 - 1)).remainder_(population)
    values, order = drawn.sort(stable=True)
    first = torch.ones_like(values, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    return drawn[order[first].sort().values][:count]


def digest(*tensors: Tensor) -> Tensor:
    """128-bit BLAKE2 hash of tensors (dtype, shape, bytes), uint8 (16,): proves that regenerated tensors are the saved ones."""
    state = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(state.digest()), dtype=torch.uint8)


def _key(seed: int, stream: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest(), "little", signed=True)


def _wrapped(z: int) -> int:
    """An integer as int64 arithmetic has it."""
    return (z + (1 << 63)) % (1 << 64) - (1 << 63)


def _hash(key: int, start: int, count: int, device: torch.device | str) -> Tensor:
    """SplitMix64's outputs ``start .. start + count`` after state ``key``."""
    z = torch.arange(1, count + 1, dtype=torch.int64, device=device).mul_(GOLDEN)
    z.add_(_wrapped(key + start * GOLDEN))
    shifted = torch.empty_like(z)
    for shift, factor in ((30, FIRST), (27, SECOND), (31, 1)):
        # Shifts of signed integers repeat the sign: the mask makes them logical.
        torch.bitwise_right_shift(z, shift, out=shifted)
        z.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1))
        if factor != 1:
            z.mul_(factor)
    return z


def _filled(
    pair: Callable[[Tensor], tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    seed: int,
    stream: str,
    start: int,
    count: int,
    device: torch.device | str,
) -> Tensor:
    """Numbers ``start .. start + count``, two to a hash, made in chunks."""
    first, last, key = start // 2, (start + count + 1) // 2, _key(seed, stream)
    out = torch.empty(last - first, 2, dtype=dtype, device=device)
    for at in range(first, last, CHUNK):
        stop = min(at + CHUNK, last)
        even, odd = pair(_hash(key, at, stop - at, device))
        out[at - first : stop - first, 0], out[at - first : stop - first, 1] = even, odd
    return out.flatten()[start % 2 :][:count]


def _pair_of_words(z: Tensor) -> tuple[Tensor, Tensor]:
    return z & LOW, (z >> 32) & LOW


def _pair_of_uniforms(z: Tensor) -> tuple[Tensor, Tensor]:
    even, odd = (z >> 8) & 0xFFFFFF, (z >> 40) & 0xFFFFFF
    return even.float().mul_(2**-24), odd.float().mul_(2**-24)


def _pair_of_normals(z: Tensor) -> tuple[Tensor, Tensor]:
    radius, angle = _pair_of_words(z)
    r = _log(radius.float().add_(0.5).mul_(2**-32)).mul_(-2).sqrt_()
    # A triangle wave of period 1 takes sin(t pi / 2) to cos(2 pi v); a quarter turn on, to the sine.
    turn = (angle >> 8).float().mul_(2**-22)
    cosine = _sine((turn - 2).abs_().sub_(1))
    return cosine.mul_(r), _sine((turn - 1).abs_().sub_(2).abs_().sub_(1)).mul_(r)


def _log(u: Tensor) -> Tensor:
    """The logarithm of positive normal float32 numbers."""
    bits = u.view(torch.int32)
    # Exponents are counted so that the mantissa falls into [1 / sqrt 2, sqrt 2).
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).view(torch.float32)
    s = (m - 1).div_(m + 1)
    return _polynomial(LOG, s.square()).mul_(s).mul_(2).add_(exponent.float().mul_(math.log(2)))


def _sine(t: Tensor) -> Tensor:
    """``sin(t pi / 2)`` on [-1, 1]."""
    return _polynomial(SINE, t.square()).mul_(t)


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    value = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[-1])
