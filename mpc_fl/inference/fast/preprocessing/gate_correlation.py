"""What a comparison gate consumes: C draws its part, S draws some and is sent the rest, the dealer makes that rest.

One `ComparisonGate` is a batch of `count` gates of one width k and one result. The borrow of c - r, with c public and r the mask of
the input, is compared in digits of four bits by one-time truth tables (Ishai et al., TCC 2013). Per gate, L digits:

  drawn by each party      r (k bits); masks m of the 2L - 1 digit bits, q: one bit each
  corrected, bits          tables [v < digit of r], v = 0 .. 2^s - 2, for each digit of s bits; the products of masks that
                           the polynomial of the borrow needs: 2^(L-1) - L of "equal" masks alone, and for digit j
                           2^(L-1-j) - 1 with its "less" mask
  corrected, words         what the result is linear in, see `Result`

With a ceiling m, public, a gate gives min(relu(x), m). Its two comparisons, of x and of x - m with zero, look up c and c - m in the
same tables of r. Digits below the lowest bit of m that is one are alike in c and c - m, so their masks and products serve both; the
digits above have masks of their own in each comparison, and each has its q.

*Drawn*: r = r_C + r_S modulo 2^k, m = m_C ^ m_S, q = q_C ^ q_S, so nobody knows r, m or q. *Corrected*: C's share comes from
its seed, S's is the true value less C's (or exclusive or). C's share is uniform and independent of everything S sees,
so S's correction is uniform too.

Size of a correction, k = 20: 67 bits of tables (equality needs none: [v = r] = [v-1 < r] - [v < r]), 37 bits of products, 14
bytes of words: 27 bytes per wide ReLU, 21 per narrow one, 4 per sign extension. With a ceiling whose 13 lowest bits are zero:
67 bits of tables, 57 of products, 18 bytes of words: 33.5 bytes per wide gate.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

import numpy as np

from mpc_fl.crypto.stream_cipher import Stream
from mpc_fl.inference.fast.kernels.bit_planes import Planes, words_for
from mpc_fl.inference.fast.network import NARROWEST, RING_BITS, WIDEST_GATE

DIGIT = 4
WIDEST_DIGIT = 6  # with a ceiling
MOST_DIGITS = 6
# A bit that both parties send while an image waits is worth as many that the dealer sends ahead.
_WAITED_FOR = 8
# Gates per pass: their tables stay in the second-level cache.
CHUNK = 1 << 17


class Result(enum.Enum):
    """What a gate returns, and the words it takes. w = q ^ msb(r), kappa = 1 where r_C + r_S wraps around 2^k.

    With a ceiling w is q ^ q', and q' ^ msb(r) comes after w r, as wide as these.
    """

    WIDE = "relu, extended to 32 bits"  # w, w r (mod 2^32); kappa, w msb(r), (1 - w) msb(r) (mod 2^(32-k))
    NARROW = "relu in k bits"  # w, w r (mod 2^k)
    EXTENDED = "the same value, extended to 32 bits"  # kappa + msb(r), kappa (mod 2^(32-k)): nothing is compared


@dataclass(frozen=True)
class ComparisonGate:
    """`count` comparison gates of width `bits` (8 .. 24); a ReLU may have a `ceiling` below 2^(bits - 1), which is public."""

    bits: int
    count: int
    result: Result
    ceiling: int | None = None

    def __post_init__(self) -> None:
        if not NARROWEST <= self.bits <= WIDEST_GATE or self.count < 1:
            raise ValueError("a gate has 8 to 24 bits and a positive count")
        if self.ceiling is not None and (self.result is Result.EXTENDED or not 0 < self.ceiling < 1 << (self.bits - 1)):
            raise ValueError("a gate's ceiling is that of a ReLU, positive, and below 2^(bits - 1)")

    @property
    def words(self) -> int:
        """Words of one plane."""
        return words_for(self.count)

    @cached_property
    def thresholds(self) -> tuple[int, ...]:
        """What x is compared with: nothing, or zero, then the ceiling."""
        if self.result is Result.EXTENDED:
            return ()
        return (0,) if self.ceiling is None else (0, self.ceiling)

    @property
    def openings(self) -> int:
        """How often both parties send."""
        return 3 if self.thresholds else 1

    @cached_property
    def digits(self) -> tuple[int, ...]:
        """Bits of each digit that is compared, lowest first. The highest bit of c and r is treated apart."""
        return _digits(self.bits - 1, self.ceiling) if self.thresholds else ()

    @cached_property
    def common(self) -> int:
        """How many of the lowest digits all thresholds have in common."""
        return _common(self.digits, self.ceiling)

    @cached_property
    def mask_rows(self) -> tuple[tuple[int, ...], ...]:
        """For each threshold the rows, among all masks, of `less` of every digit, then of `equal` of every digit but the lowest."""
        digits, common = len(self.digits), self.common
        rows = [tuple(range(2 * digits - 1))] if self.thresholds else []
        if self.ceiling is not None:
            less = range(2 * digits - 1, 3 * digits - 1 - common)
            equal = range(less.stop, less.stop + digits - max(common, 1))
            kept = rows[0]
            rows.append((*kept[:common], *less, *kept[digits : digits + max(common, 1) - 1], *equal))
        return tuple(rows)

    @property
    def masks(self) -> int:
        """Masks of digit bits."""
        return self.mask_rows[-1][-1] + 1 if self.thresholds else 0

    @property
    def table_planes(self) -> int:
        """Planes of all tables."""
        return sum((1 << size) - 1 for size in self.digits)

    @cached_property
    def product_rows(self) -> tuple[tuple[int, ...], ...]:
        """For each threshold the rows, among all products, of its `monomials`."""
        if not self.thresholds:
            return ()
        every = monomials(len(self.digits))
        rows = [tuple(range(len(every)))]
        if self.ceiling is not None:
            following = iter(range(len(every), 2 * len(every)))
            alike = 1 << max(self.common, 1) - 1  # subsets below have common digits alone
            shared = [subset < alike and (less is None or less < self.common) for less, subset in every]
            rows.append(tuple(row if kept else next(following) for row, kept in zip(rows[0], shared, strict=True)))
        return tuple(rows)

    @property
    def product_planes(self) -> int:
        """Planes of all products of masks."""
        return max((row for rows in self.product_rows for row in rows), default=-1) + 1

    @property
    def word_dtypes(self) -> tuple[type[np.generic], ...]:
        """Dtypes of the corrected words, each of shape (count,)."""
        high: type[np.generic] = np.uint16 if RING_BITS - self.bits <= 16 else np.uint32
        if self.result is Result.EXTENDED:
            return high, high
        whole = (np.uint32,) * (1 + len(self.thresholds))
        return whole if self.result is Result.NARROW else (*whole, high, high, high)

    @property
    def correction_bytes(self) -> int:
        """Bytes of S's correction."""
        planes = self.table_planes + self.product_planes
        return 8 * planes * self.words + self.count * sum(np.dtype(dtype).itemsize for dtype in self.word_dtypes)

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Slices of at most `CHUNK` gates, and of the words of a plane that hold them."""
        for start in range(0, self.count, CHUNK):
            yield (
                slice(start, min(start + CHUNK, self.count)),
                slice(start // 64, min((start + CHUNK) // 64, self.words)),
            )


@dataclass(frozen=True, repr=False)
class Drawn:
    """What a party draws itself: `input_mask` uint32 (count,) below 2^k, `masks` (gate.masks, words), `result_masks`: q of each
    threshold (thresholds, words)."""

    input_mask: np.ndarray
    masks: Planes
    result_masks: Planes


@dataclass(frozen=True, repr=False)
class Corrected:
    """Shares of what depends on the drawn values: `tables` and `products` as planes, `arrays` by `ComparisonGate.word_dtypes`."""

    tables: Planes
    products: Planes
    arrays: tuple[np.ndarray, ...]


class GateMaterial:
    """One party's part for a `ComparisonGate`, from its stream and, at S, the dealer's correction. Use once.

    Nothing is drawn before it is read: until then a gate takes a key at C. `value_mask` is A of the value that the gate makes, at
    C, see `draw`. Raises `ValueError` for a correction (uint8) of another size than `gate.correction_bytes`.
    """

    def __init__(
        self,
        gate: ComparisonGate,
        stream: Stream,
        correction: np.ndarray | None = None,
        value_mask: np.ndarray | None = None,
    ) -> None:
        if correction is not None and (correction.dtype, correction.shape) != (np.uint8, (gate.correction_bytes,)):
            raise ValueError("the correction has another size than the gate needs")
        self.gate = gate
        self._stream, self._correction, self._value_mask = stream, correction, value_mask

    @cached_property
    def drawn(self) -> Drawn:
        """This party's own masks: the beginning of its stream."""
        return draw(self.gate, self._stream, self._value_mask)

    @cached_property
    def corrected(self) -> Corrected:
        """This party's shares of all else: at C the rest of its stream."""
        _ = self.drawn  # comes first in the stream
        if self._correction is None:
            return corrected_from(self.gate, self._stream.words(self.gate.correction_bytes, np.uint8))
        return corrected_from(self.gate, self._correction)


def draw(gate: ComparisonGate, stream: Stream, value_mask: np.ndarray | None = None) -> Drawn:
    """A party's own masks from the start of its stream.

    With A of the value that a sign extension makes, int32 of `count` elements, r_C is -A modulo 2^k: as uniform as any other, and
    then the low k bits of E are those of what was opened (`evaluation`).
    """
    masks = (
        stream.words(gate.count, np.uint32)
        if value_mask is None
        else np.negative(value_mask.reshape(-1).view(np.uint32))
    )
    masks &= np.uint32((1 << gate.bits) - 1)
    count = gate.masks + len(gate.thresholds)
    planes = stream.words(count * gate.words, np.uint64).reshape(count, gate.words)
    return Drawn(masks, planes[: gate.masks], planes[gate.masks :])


def corrected_from(gate: ComparisonGate, buffer: np.ndarray) -> Corrected:
    """Views into `gate.correction_bytes` bytes of uint8: a correction, or as many bytes of C's stream."""
    planes = gate.table_planes + gate.product_planes
    end = 8 * planes * gate.words
    bits = buffer[:end].view(np.uint64).reshape(planes, gate.words)
    arrays = []
    for dtype in gate.word_dtypes:
        start, end = end, end + gate.count * np.dtype(dtype).itemsize
        arrays.append(buffer[start:end].view(dtype))
    return Corrected(bits[: gate.table_planes], bits[gate.table_planes :], tuple(arrays))


@cache
def monomials(digits: int) -> tuple[tuple[int | None, int], ...]:
    """The products of masks that are corrected, in their order: a digit whose "less" mask is a factor, or None, and the "equal"
    masks that are, as a bit set over the digits 1 .. L-1: first subsets of two members or more, ascending; then for each digit
    j < L-1 its products with the subsets of digits above j."""
    every = 1 << digits - 1
    alone = [(None, subset) for subset in range(every) if subset.bit_count() >= 2]
    return *alone, *((digit, subset) for digit in range(digits - 1) for subset in range(1 << digit, every, 1 << digit))


def _digits(compared: int, ceiling: int | None) -> tuple[int, ...]:
    """Digits of `compared` bits. With a ceiling those below its lowest bit that is one are cut apart from those above, and all as
    costs the least."""
    if ceiling is None:
        full, rest = divmod(compared, DIGIT)
        return (DIGIT,) * full + ((rest,) if rest else ())
    alike = (ceiling & -ceiling).bit_length() - 1
    possible = [
        _cut(below, lower) + _cut(compared - below, upper)
        for below in range(alike + 1)
        for lower in range(MOST_DIGITS)
        for upper in range(1, MOST_DIGITS + 1 - lower)
        if lower <= below <= lower * WIDEST_DIGIT and upper <= compared - below <= upper * WIDEST_DIGIT
    ]

    def cost(digits: tuple[int, ...]) -> int:
        common = _common(digits, ceiling)
        masks = 4 * len(digits) - 1 - 2 * common - (common == 0)
        entries = sum((1 << size) - 1 for size in digits)
        return _WAITED_FOR * masks + entries + 2 * _products(len(digits)) - _products(common)

    return min((digits for digits in possible if len(digits) > 1), key=cost)


def _products(digits: int) -> int:
    return len(monomials(digits)) if digits else 0


def _cut(bits: int, digits: int) -> tuple[int, ...]:
    """`bits` in so many digits of nearly one size, the wider ones first."""
    return tuple(bits // digits + (place < bits % digits) for place in range(digits))


def _common(digits: tuple[int, ...], ceiling: int | None) -> int:
    if ceiling is None:
        return len(digits)
    alike = (ceiling & -ceiling).bit_length() - 1
    return sum(end <= alike for end in accumulate(digits))


def gates_to_try(result: Result) -> Iterator[ComparisonGate]:
    """Gates of every kind and many widths, on which another way to compute them is held against the specification."""
    for bits, count in ((8, 65), (13, 600), (16, 520), (17, 9), (19, 700), (20, 1029), (23, 64), (24, 130)):
        yield ComparisonGate(bits, count, result)
        if result is not Result.EXTENDED:
            for alike in (0, bits // 2, bits - 3):
                yield ComparisonGate(bits, count, result, 1 << alike)
