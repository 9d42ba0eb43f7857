"""Integer Gaussian noise from a key stream, each sample within statistical distance 2^-127 of exact.

The discrete Gaussian N_Z(0, v) gives every integer x a weight of exp(-x^2 / 2v) (Canonne, Kamath, Steinke, NeurIPS 2020).
Nothing here is floating point: weights, tables and samples are integers, so Mironov's attack (CCS 2012) finds no gaps.

One lemma carries everything. Write S(c) for the sum over all integers y of exp(-(y-c)^2 / 2g). By Poisson summation
S(c) = sqrt(2 pi g) (1 + 2 sum_j exp(-2 pi^2 g j^2) cos(2 pi j c)), j = 1, 2, ...: largest at c = 0, and for g >= 1 all
within a factor of 1 +- r, r = 2.01 exp(-2 pi^2 g), of sqrt(2 pi g). Let X be N_Z(0, a), Y be N_Z(0, b), k a whole
number. Completing the square, P[X + k Y = z] is proportional to exp(-z^2 / 2(a + k^2 b)) S(c_z) with
1/g = k^2/a + 1/b. So X + k Y has the law N_Z(0, a + k^2 b) up to a factor between (1 - r)/(1 + r) and its inverse: a
statistical distance of at most `smoothing_distance(g)` = 3 exp(-2 pi^2 g), 2^-140 at g = 5. (Micciancio and Walter,
CRYPTO 2017, for lattices; Kairouz, Liu, Steinke, ICML 2021, for k = 1.)

The lemma makes large variances from small tables (here), and the sum of the parties' noise a discrete Gaussian again
(`distributed_gaussian`). Skellam noise is closed under sums exactly. But its privacy loss has a further term in the L1
norm (Agarwal, Kairouz, Liu, NeurIPS 2021), its accounting under sampling is looser, and it cannot be sampled this way:
no multiple of a Poisson variable is Poisson, so a variance of 2^40 would need a table of millions of entries.

Sampling. N_Z(0, v) = X_0 + k (X_1 + k (X_2 + ...)), every X_i of variance 6 k^2 but the last, which has what is
missing and at least 30: so 1/g <= 1/6 + 1/30 and g >= 5 at every level. Each level is an alias table (Walker 1977; Vose
1991) of 224-bit probabilities: 32 bits come from one word, the other 192 are drawn only where these leave it open.

Statistical distance of a sample, with at most 6 levels. Per level: 2 exp(-13.5^2 / 2) < 2^-130.4 for the tail cut off
beyond 13.5 standard deviations (S(c) <= S(0) makes N_Z subgaussian), 2^-208 for probabilities of 224 bits, 2^-270 for
weights of 320 bits, 2^-140 for the lemma. In all less than 2^-127 = `TOTAL_VARIATION`.

The places looked up in tables are secret and could be timed by another program on the same processor: the machine is
trusted with them as it is with the images.
"""

from __future__ import annotations

import decimal
import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from mpc_fl.crypto.stream_cipher import Seed, Stream

TOTAL_VARIATION = 2.0**-127
SMOOTHING = 5  # the least g for which the lemma is used
SMALLEST_VARIANCE, LARGEST_VARIANCE = Fraction(1, 1 << 10), Fraction(1 << 80)
_LEVEL_VARIANCE, _LEAST_TOP_VARIANCE = 6, 30  # 1/6 + 1/30 = 1/g
_LARGEST_FACTOR = 123  # tables of at most 2^13 columns stay in the second-level cache
_REACH_SQUARED = Fraction(27, 2) ** 2
_WEIGHT_BITS = 320
_WORD_BITS = 32
_TIE_BITS = 192
_BLOCK = 1 << 15  # elements worked on at a time, inside the cache
_PIECE = 1 << 20  # elements drawn from one stream, by one thread


def smoothing_distance(g: float) -> float:
    """Statistical distance between X + k Y and the discrete Gaussian of the same variance, for g >= 1; see above."""
    return 3 * math.exp(-2 * math.pi**2 * g)


def _reach(variance: Fraction) -> int:
    """Where the table of this variance ends: the smallest whole number of at least 13.5 standard deviations."""
    return math.isqrt(math.ceil(_REACH_SQUARED * variance) - 1) + 1


def _weights(variance: Fraction, reach: int) -> list[int]:
    """exp(-x^2 / 2 variance) for x = 0 .. reach in units of 2^-320, each to within 2 reach^2 + 2 units.

    By exp(-(x+1)^2 / 2v) = exp(-x^2 / 2v) exp(-1 / 2v) exp(-2x / 2v): one exponential, taken in decimal arithmetic.
    """
    context = decimal.Context(prec=_WEIGHT_BITS // 3 + 10, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)
    exponent = context.divide(decimal.Decimal(-variance.denominator), decimal.Decimal(2 * variance.numerator))
    ratio = int(context.multiply(context.exp(exponent), decimal.Decimal(1 << _WEIGHT_BITS)))
    square = ratio * ratio >> _WEIGHT_BITS
    weights = [1 << _WEIGHT_BITS]
    for _ in range(reach):
        weights.append(weights[-1] * ratio >> _WEIGHT_BITS)
        ratio = ratio * square >> _WEIGHT_BITS
    return weights


class _Room:
    """Working memory for `count` samples at a time."""

    def __init__(self, count: int) -> None:
        self.words = np.empty(count, dtype=np.uint32)
        self.thresholds = np.empty(count, dtype=np.uint32)
        self.places = np.empty(count, dtype=np.intp)
        self.flags = np.empty(count, dtype=np.bool_)
        self.values = np.empty(count, dtype=np.int64)
        self.noise = np.empty(count, dtype=np.int64)


@dataclass(frozen=True)
class _AliasTable:
    """One level. The first bits of a word are the number c of a column. A word below `thresholds[c]` means
    `values[2c]`, one above means `values[2c + 1]`; where they are equal, 192 more bits are compared with `ties[c]`."""

    column_bits: int
    thresholds: np.ndarray  # uint32 (columns,)
    ties: list[int]
    values: np.ndarray  # int64 (2 * columns,)

    def draw(self, stream: Stream, room: _Room) -> np.ndarray:
        """As many samples as `room` has room for, int64, valid until the next draw."""
        stream.fill(room.words.view(np.uint8).data)
        np.right_shift(room.words, _WORD_BITS - self.column_bits, out=room.places, casting="unsafe")
        # No index is out of range; numpy's default mode would only copy everything through a buffer.
        np.take(self.thresholds, room.places, out=room.thresholds, mode="wrap")
        np.left_shift(room.places, 1, out=room.places)
        np.greater_equal(room.words, room.thresholds, out=room.flags)
        np.add(room.places, room.flags, out=room.places)
        np.equal(room.words, room.thresholds, out=room.flags)
        for tie in np.flatnonzero(room.flags):
            further = int.from_bytes(stream.words(_TIE_BITS // 8, np.uint8).tobytes(), "little")
            if further < self.ties[int(room.places[tie]) >> 1]:
                room.places[tie] -= 1
        return np.take(self.values, room.places, out=room.values, mode="wrap")


@functools.lru_cache(maxsize=64)
def _alias_table(variance: Fraction) -> _AliasTable:
    """Vose's construction in whole numbers: the columns hold the 224-bit probabilities exactly."""
    reach = _reach(variance)
    column_bits = (2 * reach).bit_length()
    columns, capacity = 1 << column_bits, 1 << (_WORD_BITS + _TIE_BITS - column_bits)

    # 1. Probabilities in units of 2^-224, rounded down; the mode takes what is left over.
    half = _weights(variance, reach)
    weights = half[:0:-1] + half
    total = sum(weights)
    masses = [weight * columns * capacity // total for weight in weights]
    masses[reach] += columns * capacity - sum(masses)
    masses += [0] * (columns - len(masses))

    # 2. Fill up every column that has less than its capacity from one that has more.
    own, other = [capacity] * columns, list(range(columns))
    small = [column for column, mass in enumerate(masses) if mass < capacity]
    large = [column for column, mass in enumerate(masses) if mass >= capacity]
    while small:
        column, donor = small.pop(), large[-1]
        own[column], other[column] = masses[column], donor
        masses[donor] -= capacity - masses[column]
        if masses[donor] < capacity:
            small.append(large.pop())

    # 3. A column's part below its threshold, as the word's own bits and 192 more. A full column has itself besides.
    parts = [divmod(mass % capacity, 1 << _TIE_BITS) for mass in own]
    starts = np.arange(columns, dtype=np.uint32) << np.uint32(_WORD_BITS - column_bits)
    values = np.empty(2 * columns, dtype=np.int64)
    values[0::2], values[1::2] = range(columns), other
    thresholds = starts + np.array([part for part, _ in parts], dtype=np.uint32)
    return _AliasTable(column_bits, thresholds, [tie for _, tie in parts], values - reach)


def _levels(variance: Fraction) -> tuple[int, list[Fraction]]:
    """The factor k and the variances v_i of X_0, X_1, ...: sum_i k^(2i) v_i = variance, exactly."""
    count = 1
    while variance > _LEVEL_VARIANCE * _LARGEST_FACTOR ** (2 * count):
        count += 1
    if count == 1:
        return 1, [variance]
    factor = 2
    while variance > _LEVEL_VARIANCE * factor ** (2 * count):
        factor += 1
    lower = [Fraction(_LEVEL_VARIANCE * factor**2)] * (count - 1)
    rest = variance - sum(factor ** (2 * level) * one for level, one in enumerate(lower))
    top = rest / factor ** (2 * (count - 1))
    if top < _LEAST_TOP_VARIANCE:
        raise ArithmeticError("the smoothing lemma would not hold")  # by the choice of factor, it does
    return factor, [*lower, top]


class DiscreteGaussian:
    """The sampler of N_Z(0, variance), variance an exact number from 2^-10 to 2^80 (a float stands for its exact value).

    Samples are within `TOTAL_VARIATION` of exact, and none is larger in magnitude than `largest`: headroom can be
    proven without a probability. Making one is cheap; its tables (about 0.02 s) are made for the first sample.
    """

    def __init__(self, variance: int | float | Fraction) -> None:
        self.variance = Fraction(variance)
        if not SMALLEST_VARIANCE <= self.variance <= LARGEST_VARIANCE:
            raise ValueError("the variance must lie in 2^-10 .. 2^80")
        self._factor, self._variances = _levels(self.variance)
        self.largest = sum(self._factor**level * _reach(one) for level, one in enumerate(self._variances))

    def __repr__(self) -> str:
        return f"DiscreteGaussian({float(self.variance):g})"

    @functools.cached_property
    def _tables(self) -> list[_AliasTable]:
        return [_alias_table(variance) for variance in reversed(self._variances)]  # X_0 last

    def sample(self, stream: Stream, shape: Sequence[int]) -> torch.Tensor:
        """Independent samples of this shape from one stream, int64."""
        samples = torch.zeros(tuple(shape), dtype=torch.int64)
        self._add_samples(samples.numpy().reshape(-1), stream)
        return samples

    def add_to(self, total: torch.Tensor, seed: Seed, threads: int = 1) -> None:
        """Add an independent sample to every element of `total` in place (int64 or int32, contiguous, any shape).

        Sums are taken in the ring of the dtype. The samples come from streams of `seed` labelled by place, a million
        elements each, shared out over `threads`, whose number does not change them. Raises `ValueError` for a tensor of
        another dtype or layout or too narrow for `largest`, `SecrecyError` when the seed has been used before.
        """
        if total.dtype not in (torch.int32, torch.int64) or not total.is_contiguous():
            raise ValueError("noise goes into contiguous int64 or int32 tensors only")
        if self.largest > torch.iinfo(total.dtype).max:
            raise ValueError(f"noise of variance {float(self.variance):g} does not fit {total.dtype}")
        elements = total.detach().numpy().reshape(-1)
        starts = range(0, max(1, elements.size), _PIECE)

        def add_piece(start: int) -> None:
            self._add_samples(elements[start : start + _PIECE], seed.stream("integer noise", start // _PIECE))

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(add_piece, starts))

    def _add_samples(self, elements: np.ndarray, stream: Stream) -> None:
        """Add a sample to each element in place, int64 or int32 (count,)."""
        room = _Room(min(_BLOCK, elements.size))
        for start in range(0, elements.size, _BLOCK):
            block = elements[start : start + _BLOCK]
            if len(block) < len(room.words):
                room = _Room(len(block))
            room.noise.fill(0)
            for table in self._tables:
                np.multiply(room.noise, self._factor, out=room.noise)
                np.add(room.noise, table.draw(stream, room), out=room.noise)
            np.add(block, room.noise, out=block, casting="same_kind")
