"""What exact and approximate attention cost on this machine: a few timed calls, then a prediction for any length.

One forward and backward pass of ``g`` query heads that share a key head, in seconds:

    exact(L)       = b L + c L^2                       scaled_dot_product_attention
    approximate(L) = a + L r(k) + s p L^2              k features, chunk by chunk, and a share s of the keys exactly

``b, c`` come from two lengths; ``a, r`` from two lengths at a narrow and a wide candidate of each kind, ``r`` linear
between them and proportional to ``k`` beyond the widest; ``p`` from the difference that a large share makes. Of a few rounds
of calls the fastest counts: another program on the machine can only slow a call down. The approximation's time holds its
preconditioner, not its certificate.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from math import inf, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.attention.candidates import CANDIDATES, KINDS, Candidates, Kind
from rankloom.attention.contract import Approximation
from rankloom.attention.precondition import Preconditioner

__all__ = ["KINDS", "MARGIN", "CostModel", "Kind", "calibrate"]

_WIDE = 1024  # wider ones cost in proportion,
_WIDEST = 2200  # but one size alone says nothing: the degree-2 polynomial of a 64-dimensional head is the next
_SHARE = 0.5  # of the keys, for an exact part large enough to time
_ROUNDS = 2
MARGIN = 1.1
"""An approximation has to be predicted this many times as fast as exact attention before it is used: predictions err too."""
_LEAST_SECONDS = 4e-3  # a shorter call times the launch instead of the work


@dataclass(frozen=True)
class CostModel:
    """Predicted seconds of forward and backward of ``group`` query heads on one key head, under one mask and dtype.

    ``quadratic`` holds ``(b, c)``; ``linear[kind]`` a tuple of ``(width, a, r)``, ascending in width; ``pair`` is ``p``. A kind
    that ``linear`` does not have takes forever.
    """

    quadratic: tuple[float, float]
    linear: dict[Kind, tuple[tuple[int, float, float], ...]]
    group: int = 1
    pair: float = 0.0

    def exact(self, length: int) -> float:
        """Seconds of exact attention."""
        b, c = self.quadratic
        return b * length + c * length * length

    def worth(self, length: int) -> float:
        """Seconds that an approximation has to stay below to be worth using: exact attention's over :data:`MARGIN`."""
        return self.exact(length) / MARGIN

    def approximate(self, length: int, width: int, kind: Kind) -> float:
        """Seconds of attention through ``width`` features."""
        fixed, rate = self._line(width, kind)
        return fixed + rate * length + self._curvature(kind) * length * length

    def break_even(self, width: int, kind: Kind) -> float:
        """The length from which on the approximation is worth using; infinite where it never is.

        The positive root of ``(c / m - s p) L^2 + (b / m - r) L - a`` with the margin ``m``: exact attention is convex in ``L``
        and starts below.
        """
        (b, c), (fixed, rate) = (x / MARGIN for x in self.quadratic), self._line(width, kind)
        slope, c = b - rate, c - self._curvature(kind)
        if c <= 0:
            return fixed / slope if slope > 0 and c == 0 else inf
        return (-slope + sqrt(slope * slope + 4 * c * fixed)) / (2 * c)

    def widest(self, length: int, kind: Kind, *, most: int, within: float = inf) -> int:
        """The largest width up to ``most`` that is worth using and takes less than ``within`` seconds; 0 for none."""
        limit = min(within, self.worth(length))
        # Seconds never fall with the width, so the first width that is too slow can be bisected for.
        return bisect_left(range(1, most + 1), limit, key=lambda width: self.approximate(length, width, kind))

    def _curvature(self, kind: Kind) -> float:
        return CANDIDATES[kind].share * self.pair

    def _line(self, width: int, kind: Kind) -> tuple[float, float]:
        points = self.linear.get(kind)
        if points is None:
            return inf, inf
        above = next((index for index, point in enumerate(points) if point[0] >= width), len(points))
        if above == 0:
            return points[0][1:]
        if above == len(points):
            last, fixed, rate = points[-1]
            return fixed, rate * width / last
        (w0, *low), (w1, *high) = points[above - 1], points[above]
        share = (width - w0) / (w1 - w0)
        fixed, rate = (x + share * (y - x) for x, y in zip(low, high, strict=True))
        return fixed, rate


def calibrate(
    dim: int,
    dim_v: int | None = None,
    *,
    group: int = 1,
    causal: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CostModel:
    """Time this machine for heads of ``dim`` (values ``dim_v``), ``group`` query heads a key head; seconds, once a process.

    Remembered for each geometry, device, dtype and number of threads.
    """
    return _calibrate(dim, dim_v or dim, group, causal, str(device), dtype, torch.get_num_threads())


@lru_cache(maxsize=64)
def _calibrate(
    dim: int, dim_v: int, group: int, causal: bool, device: str, dtype: torch.dtype, threads: int
) -> CostModel:
    def inputs(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((group, length, dim), (length, dim), (length, dim_v), (group, length, dim_v))
        q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad

    def exact(length: int) -> Callable[[], None]:
        q, k, v, grad = inputs(length)
        short = max(0, 16 - dim)  # below 16 the kernel leaves its fast path, so exact attention is better off padded

        def run() -> None:
            wide_q, wide_k = (F.pad(x, (0, short)) if short else x for x in (q, k))
            out = F.scaled_dot_product_attention(
                wide_q[None], wide_k[None, None], v[None, None], is_causal=causal, scale=dim**-0.5, enable_gqa=True
            )
            torch.autograd.backward(out, grad[None])

        return run

    def approximate(approximation: Approximation) -> Callable[[int], Callable[[], None]]:
        def at(length: int) -> Callable[[], None]:
            q, k, v, grad = inputs(length)
            return lambda: torch.autograd.backward(approximation(q, k, v)[0], grad)

        return at

    q, k = (x.detach().float() for x in inputs(2048)[:2])
    preconditioner = Preconditioner.fit(q[0], k, 0.1 * dim**-0.5)

    def made(candidates: Candidates, size: int) -> Callable[[int], Callable[[], None]]:
        choice = candidates.choose(size, preconditioner, k, torch.Generator().manual_seed(0))
        return approximate(candidates.build(choice, preconditioner, causal=causal))

    plain = {kind: replace(candidates, share=0.0) for kind, candidates in CANDIDATES.items()}
    points = [(kind, size) for kind in KINDS for size in _few(plain[kind], dim, len(k))]
    sharing = next(kind for kind in KINDS if CANDIDATES[kind].share)
    shared = replace(CANDIDATES[sharing], share=_SHARE), dict(reversed(points))[sharing]
    starts = [exact, made(*shared), *(made(plain[kind], size) for kind, size in points)]
    lengths = [_long_enough(at, device) for at in starts]
    both = (at(times * length) for at, length in zip(starts, lengths, strict=True) for times in (1, 2))
    seconds = _fastest(list(both), device)
    timed = list(zip(lengths, seconds[::2], seconds[1::2], strict=True))
    linear = {
        kind: _ascending(
            (plain[kind].width(dim, size), *_line(*t))
            for (other, size), t in zip(points, timed[2:], strict=True)
            if other == kind
        )
        for kind in KINDS
    }
    model = CostModel(_parabola(*timed[0]), linear, group)
    length, _, twice = timed[1]
    pairs = _SHARE * (2 * length) ** 2
    return replace(model, pair=max(0.0, twice - model.approximate(2 * length, shared[1], sharing)) / pairs)


def _few(candidates: Candidates, dim: int, tokens: int) -> list[int]:
    """A narrow and a wide one: a feature more costs about as much whatever their number."""
    sizes = candidates.sizes(dim, _WIDE, tokens)
    if len(sizes) < 2:
        sizes = candidates.sizes(dim, max(_WIDEST, dim + 1), tokens)
    return sorted({sizes[0], sizes[-1]})


def _ascending(points: Iterable[tuple[int, float, float]]) -> tuple[tuple[int, float, float], ...]:
    """The points with timing noise taken out: more features never take less time."""
    widths, *columns = zip(*sorted(points), strict=True)
    return tuple(zip(widths, *(accumulate(column, max) for column in columns), strict=True))


def _long_enough(at: Callable[[int], Callable[[], None]], device: str) -> int:
    """A length whose call is long enough to time; on a CPU the shortest one is."""
    length = 1024
    while device != "cpu" and length < 65536 and _fastest([at(length)], device)[0] < _LEAST_SECONDS:
        length *= 2
    return length


def _fastest(runs: Sequence[Callable[[], None]], device: str) -> list[float]:
    """Seconds of every call, the fewest of some rounds through all of them: a burst of other work spoils only some rounds."""
    # On one thread the processor's own clock: it stands still while another program has the core.
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    fastest = [inf] * len(runs)
    for number in range(_ROUNDS + 1):  # the first warms up
        for index, run in enumerate(runs):
            _wait(device)
            begin = clock()
            run()
            _wait(device)
            if number:
                fastest[index] = min(fastest[index], clock() - begin)
    return fastest


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _line(length: int, once: float, twice: float) -> tuple[float, float]:
    """``a`` and ``r`` from the seconds at a length and at its double."""
    mean = twice / (2 * length)
    # Above the mean where the first chunk is cheaper than later ones, as in causal attention; beyond, it is noise.
    rate = min(max((twice - once) / length, 0.5 * mean), 1.25 * mean)
    return max(0.0, twice - 2 * length * rate), rate


def _parabola(length: int, once: float, twice: float) -> tuple[float, float]:
    """``b`` and ``c``, neither of them negative."""
    quadratic = min(max(0.0, (twice - 2 * once) / (2 * length * length)), twice / (4 * length * length))
    return max(0.0, twice / (2 * length) - 2 * quadratic * length), quadratic
