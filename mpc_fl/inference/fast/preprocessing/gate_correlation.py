"""What a comparison gate consumes: C draws its part, S draws some and is sent the rest, the dealer makes that rest.

One `ComparisonGate` is a batch of `count` gates of one width k and one result. The borrow of c - r, with c public and r the mask of
the input, is compared in digits of four bits by one-time truth tables (Ishai et al., TCC 2013). Per gate, L digits:

  drawn by each party      r (k bits); masks m of the 2L - 1 digit bits, q: one bit each
  corrected, bits          tables [v < digit of r], v = 0 .. 2^s - 2, for each digit of s bits; the products of masks that
                           the polynomial of the borrow needs: 2^(L-1) - L of "equal" masks alone, and for digit j
                           2^(L-1-j) - 1 with its "less" mask
  corrected, words         what the result is linear in, see `Result`

*Drawn*: r = r_C + r_S modulo 2^k, m = m_C ^ m_S, q = q_C ^ q_S, so nobody knows r, m or q. *Corrected*: C's share comes from
its seed, S's is the true value less C's (or exclusive or). C's share is uniform and independent of everything S sees,
so S's correction is uniform too.

Size of a correction, k = 20: 67 bits of tables (equality needs none: [v = r] = [v-1 < r] - [v < r]), 37 bits of products, 14
bytes of words: 27 bytes per wide ReLU, 21 per narrow one, 18 per sign extension.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpc_fl.crypto.stream_cipher import Stream
from mpc_fl.inference.fast.kernels.bit_planes import Planes, words_for
from mpc_fl.inference.fast.network import NARROWEST, RING_BITS, WIDEST_GATE

DIGIT = 4
# Gates per pass: their tables stay in the second-level cache.
CHUNK = 1 << 17


class Result(enum.Enum):
    """What a gate returns, and the words it takes. w = q ^ msb(r), kappa = 1 where r_C + r_S wraps around 2^k."""

    WIDE = "relu, extended to 32 bits"  # w, w r (mod 2^32); kappa, w msb(r), (1 - w) msb(r) (mod 2^(32-k))
    NARROW = "relu in k bits"  # w, w r (mod 2^k)
    EXTENDED = "the same value, extended to 32 bits"  # kappa + q, kappa + 1 - q (mod 2^(32-k))


@dataclass(frozen=True)
class ComparisonGate:
    """`count` comparison gates of width `bits` (8 .. 24)."""

    bits: int
    count: int
    result: Result

    def __post_init__(self) -> None:
        if not NARROWEST <= self.bits <= WIDEST_GATE or self.count < 1:
            raise ValueError("a gate has 8 to 24 bits and a positive count")

    @property
    def words(self) -> int:
        """Words of one plane."""
        return words_for(self.count)

    @cached_property
    def digits(self) -> tuple[int, ...]:
        """Bits of each digit that is compared, lowest first. ReLU treats the highest bit of c and r apart."""
        compared = self.bits if self.result is Result.EXTENDED else self.bits - 1
        full, rest = divmod(compared, DIGIT)
        return (DIGIT,) * full + ((rest,) if rest else ())

    @property
    def masks(self) -> int:
        """Masks of digit bits: `less` of every digit, then `equal` of every digit but the lowest."""
        return 2 * len(self.digits) - 1

    @property
    def table_planes(self) -> int:
        """Planes of all tables."""
        return sum((1 << size) - 1 for size in self.digits)

    @property
    def product_planes(self) -> int:
        """Planes of all products of masks."""
        digits = len(self.digits)
        return (1 << digits - 1) - digits + sum((1 << digits - 1 - j) - 1 for j in range(digits - 1))

    @property
    def word_dtypes(self) -> tuple[type[np.generic], ...]:
        """Dtypes of the corrected words, each of shape (count,)."""
        high: type[np.generic] = np.uint16 if RING_BITS - self.bits <= 16 else np.uint32
        return {
            Result.WIDE: (np.uint32, np.uint32, high, high, high),
            Result.NARROW: (np.uint32, np.uint32),
            Result.EXTENDED: (high, high),
        }[self.result]

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
    """What a party draws itself: `input_mask` uint32 (count,) below 2^k, `masks` (2L - 1, words), `result_mask` (words,)."""

    input_mask: np.ndarray
    masks: Planes
    result_mask: Planes


@dataclass(frozen=True, repr=False)
class Corrected:
    """Shares of what depends on the drawn values: `tables` and `products` as planes, `arrays` by `ComparisonGate.word_dtypes`."""

    tables: Planes
    products: Planes
    arrays: tuple[np.ndarray, ...]


class GateMaterial:
    """One party's part for a `ComparisonGate`, from its stream and, at S, the dealer's correction. Use once.

    Nothing is drawn before it is read: until then a gate takes a key at C. Raises `ValueError` for a correction (uint8) of
    another size than `gate.correction_bytes`.
    """

    def __init__(self, gate: ComparisonGate, stream: Stream, correction: np.ndarray | None = None) -> None:
        if correction is not None and (correction.dtype, correction.shape) != (np.uint8, (gate.correction_bytes,)):
            raise ValueError("the correction has another size than the gate needs")
        self.gate = gate
        self._stream, self._correction = stream, correction

    @cached_property
    def drawn(self) -> Drawn:
        """This party's own masks: the beginning of its stream."""
        return draw(self.gate, self._stream)

    @cached_property
    def corrected(self) -> Corrected:
        """This party's shares of all else: at C the rest of its stream."""
        _ = self.drawn  # comes first in the stream
        if self._correction is None:
            return corrected_from(self.gate, self._stream.words(self.gate.correction_bytes, np.uint8))
        return corrected_from(self.gate, self._correction)


def draw(gate: ComparisonGate, stream: Stream) -> Drawn:
    """A party's own masks from the start of its stream."""
    masks = stream.words(gate.count, np.uint32)
    masks &= np.uint32((1 << gate.bits) - 1)
    planes = stream.words((gate.masks + 1) * gate.words, np.uint64).reshape(gate.masks + 1, gate.words)
    return Drawn(masks, planes[:-1], planes[-1])


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


def product_rows(digits: int) -> tuple[list[int], list[slice]]:
    """Where products lie: the subsets of "equal" masks that are corrected (two members or more), ascending, as bit sets
    over the digits 1 .. L-1; then for each digit j < L-1 the rows of its products with the subsets of digits above j."""
    subsets = [subset for subset in range(1 << digits - 1) if subset.bit_count() >= 2]
    slices, start = [], len(subsets)
    for digit in range(digits - 1):
        slices.append(slice(start, start + (1 << digits - 1 - digit) - 1))
        start = slices[-1].stop
    return subsets, slices
