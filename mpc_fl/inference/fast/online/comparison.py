"""ReLU, ReLU6, maximum and sign extension of additively shared numbers, in three openings or one.

Protocol, for shares of x modulo 2^k, mask r shared by the dealer (`gate_correlation`), both parties alike:

  1. open c = x + r modulo 2^k. ReLU: x < 0 iff msb(c) ^ msb(r) ^ u = 1, with u = [c < r] on the low k - 1 bits.
     Look c's digits up in the tables of r: shares of less_j = [c_j < r_j] and equal_j = [c_j = r_j].
  2. open less_j ^ m_j and equal_j ^ m'_j. u = less_L-1 ^ equal_L-1 (less_L-2 ^ equal_L-2 (...)) is now a polynomial with
     public coefficients in products of masks, which are shared: a share of u without a message.
  3. open t = (msb(c) ^) u ^ q. What is left is linear in shared words.

ReLU. p = 1 - [x < 0] = 1 ^ t ^ w with w = q ^ msb(r), and y = p (c - r'), where r' = r - 2^k msb(r) if msb(c) = 0 and r' = r
otherwise: for x >= 0 the integer c - r wraps exactly when msb(c) = 0 and msb(r) = 1 (then u must be 1). As an integer
r = r_C + r_S - 2^k kappa, so the result modulo 2^32 needs shares of kappa and the like modulo 2^(32-k) only.
Sign extension, of |x| < 2^(k-2). Opened is c = x + 2^(k-2) + r, and nothing else: 0 <= x + 2^(k-2) < 2^(k-1), so by the same
argument that integer is c - r', with the highest bits of c, public, and of r: linear in kappa and msb(r).
ReLU with a ceiling h (ReLU6), which is public: min(relu(x), h), for x of which x - h fits k bits. One opening serves the comparison
of x with 0 and that with h, because c' = c - h modulo 2^k is x - h under the same mask r:

  2. look up c and c' in the same tables; open less_j ^ m_j and equal_j ^ m'_j of both, but only once for the lowest digits, in
     which c and c' do not differ (`ComparisonGate.common`); above these each comparison has masks of its own
  3. open t = msb(c) ^ u ^ q and t' = msb(c') ^ u' ^ q'

So [0 <= x < h] = t ^ t' ^ q ^ q', [x >= h] = 1 ^ t' ^ q' ^ msb(r), and y = [0 <= x < h] (c - r') + [x >= h] h, with r' as above.

Security (semi-honest, dealer apart). Everything opened is masked by a value that is uniform to either party and used once:
c by r, step 2 by the masks m, step 3 by q, all sums or exclusive ors of one part per party. A simulator draws c, the digit
bits and t at random; shares of the result are fresh because C's corrected words are uniform. Nothing depends on x but by
these openings. With a ceiling r hides one opened value, c; c' is a function of c and of what is public. That a table is read in
two places gives nobody more than one reading does: what is read are shares, each of which leaves under a mask of its own, and
q and q' are drawn independently.

The steps are specified here with numpy. Where there are compiled kernels, these do them (`compiled_steps`), after a test that they
do exactly the same; every message is equal, byte by byte.

Rounds and bytes. Three openings, both parties send at the same time: k + (2L - 1) + 1 bits per gate and direction, for k = 20
2.5 + 9/8 + 1/8 = 3.75 bytes. With a ceiling and g > 0 common digits k + (2L - 1) + 2 (L - g) + 2 bits: with k = 19 and the ceiling
6 * 2^12 3.75 bytes, where two gates of 20 bits take 7.5. Sign extension: one opening of k bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.inference.fast.kernels.bit_planes import Planes, bits_of, pack, plane_of, planes_of, unpack
from mpc_fl.inference.fast.kernels.compiled import by_kernels
from mpc_fl.inference.fast.online.compiled_steps import CompiledSteps
from mpc_fl.inference.fast.preprocessing.gate_correction import correct, correction_by
from mpc_fl.inference.fast.preprocessing.gate_correlation import (
    ComparisonGate,
    GateMaterial,
    Result,
    gates_to_try,
    monomials,
)


class Exchange(Protocol):
    """One opening with the other party."""

    def __call__(self, message: np.ndarray, meanwhile: Callable[[], object] | None = None) -> np.ndarray:
        """Send bytes, do `meanwhile`, return as many bytes of the other party for the same step."""


class Steps(Protocol):
    """What a party does by itself between two messages; `first` is true at C. Shapes as in `compare`, planes (..., words)."""

    def masked_input(self, material: GateMaterial, share: np.ndarray, first: bool) -> tuple[np.ndarray, np.ndarray]:
        """This party's part of c, uint32 (count,), and packed, uint8."""

    def masked_digits(
        self, material: GateMaterial, mine: np.ndarray, theirs: np.ndarray, first: bool
    ) -> tuple[np.ndarray, Planes]:
        """c, uint32 (count,), perhaps in the place of `mine`, and its shares of less_j and equal_j under its masks."""

    def masked_borrows(self, material: GateMaterial, opened: np.ndarray, masked: Planes, first: bool) -> Planes:
        """This party's shares of t, one plane for each threshold."""

    def result(self, material: GateMaterial, opened: np.ndarray, t: Planes, first: bool) -> np.ndarray:
        """This party's share of the result, uint32 (count,)."""


_ONES = ~np.uint64(0)


def compare(material: GateMaterial, share: np.ndarray, first: bool, exchange: Exchange) -> np.ndarray:
    """This party's share of the gate's result, uint32 (count,), from its share of x, uint32 (count,) modulo 2^k.

    `first` is true at C alone: it adds public constants. The result is modulo 2^32 or 2^k, as `Result` says. Raises
    `ValueError` when the share does not fit the gate.
    """
    return _compared(material, share, first, exchange)[0]


def extend(material: GateMaterial, share: np.ndarray, first: bool, exchange: Exchange) -> tuple[np.ndarray, np.ndarray]:
    """The same for a sign extension; and x + r modulo 2^k, uint32 (count,), which both parties know then."""
    result, opened = _compared(material, share, first, exchange)
    gate = material.gate
    return result, (opened - np.uint32(1 << gate.bits - 2)) & np.uint32((1 << gate.bits) - 1)


def _compared(
    material: GateMaterial, share: np.ndarray, first: bool, exchange: Exchange
) -> tuple[np.ndarray, np.ndarray]:
    """This party's share of the result, and c."""
    gate = material.gate
    if share.dtype != np.uint32 or share.shape != (gate.count,):
        raise ValueError("the share does not fit the gate")
    by = fastest_steps()
    mine, message = by.masked_input(material, share, first)
    # C draws the rest of its part while S still convolves.
    theirs = exchange(message, lambda: material.corrected)
    opened, masked = by.masked_digits(material, mine, theirs, first)
    if not gate.thresholds:
        return by.result(material, opened, masked, first), opened
    masked ^= exchange(masked.view(np.uint8).reshape(-1)).view(np.uint64).reshape(masked.shape)
    t = by.masked_borrows(material, opened, masked, first)
    t ^= exchange(t.view(np.uint8).reshape(-1)).view(np.uint64).reshape(t.shape)
    return by.result(material, opened, t, first), opened


class NumpySteps:
    """The specification."""

    def masked_input(self, material: GateMaterial, share: np.ndarray, first: bool) -> tuple[np.ndarray, np.ndarray]:
        """Step 1."""
        return _masked_input(material, share, first)

    def masked_digits(
        self, material: GateMaterial, mine: np.ndarray, theirs: np.ndarray, first: bool
    ) -> tuple[np.ndarray, Planes]:
        """Step 2."""
        gate = material.gate
        opened = unpack(theirs, gate.bits, gate.count)
        opened += mine
        opened &= np.uint32((1 << gate.bits) - 1)
        return opened, _masked_digits(material, opened, first)

    def masked_borrows(self, material: GateMaterial, opened: np.ndarray, masked: Planes, first: bool) -> Planes:
        """Step 3."""
        every = range(len(material.gate.thresholds))
        return np.stack([_masked_borrow(material, opened, masked, number, first) for number in every])

    def result(self, material: GateMaterial, opened: np.ndarray, t: Planes, first: bool) -> np.ndarray:
        """Step 4."""
        if material.gate.result is Result.EXTENDED:
            return _extended(material, opened, first)
        return _rectified(material, opened, t, first)


_NUMPY = NumpySteps()


# ---- 1. the masked input -------------------------------------------------------------------------------------------


def _masked_input(material: GateMaterial, share: np.ndarray, first: bool) -> tuple[np.ndarray, np.ndarray]:
    gate = material.gate
    mask = np.uint32((1 << gate.bits) - 1)
    mine = share + material.drawn.input_mask
    if first and gate.result is Result.EXTENDED:
        mine += np.uint32(1 << gate.bits - 2)
    mine &= mask
    return mine, pack(mine, gate.bits)


# ---- 2. the digits -------------------------------------------------------------------------------------------------


def _less_ceiling(gate: ComparisonGate, opened: np.ndarray, threshold: int) -> np.ndarray:
    """c, or c less the ceiling, modulo 2^k."""
    return (opened - np.uint32(threshold)) & np.uint32((1 << gate.bits) - 1) if threshold else opened


def _masked_digits(material: GateMaterial, opened: np.ndarray, first: bool) -> Planes:
    """This party's shares of less_j and equal_j of every threshold under its masks: (masks, words)."""
    gate = material.gate
    result = material.drawn.masks.copy()
    for gates, words in gate.chunks():
        tables = material.corrected.tables[:, words]
        for threshold, rows in zip(gate.thresholds, gate.mask_rows, strict=True):
            planes = planes_of(_less_ceiling(gate, opened[gates], threshold), gate.bits)
            for begin, end in _alike(gate.digits, gate.common if threshold else 0):
                size = gate.digits[begin]
                bit, entry = sum(gate.digits[:begin]), sum((1 << each) - 1 for each in gate.digits[:begin])
                less, equal = _look_up(
                    tables[entry : entry + (end - begin) * ((1 << size) - 1)].reshape(end - begin, (1 << size) - 1, -1),
                    planes[bit : bit + (end - begin) * size].reshape(end - begin, size, -1),
                    first,
                )
                result[list(rows[begin:end]), words] ^= less
                skip = 1 if begin == 0 else 0  # equality of the lowest digit is not needed
                above = len(gate.digits) - 1
                result[list(rows[above + begin + skip : above + end]), words] ^= equal[skip:]
    return result


def _alike(digits: tuple[int, ...], begin: int) -> Iterator[tuple[int, int]]:
    """Runs of digits of one size, from `begin` on: (first, one after the last)."""
    while begin < len(digits):
        end = begin
        while end < len(digits) and digits[end] == digits[begin]:
            end += 1
        yield begin, end
        begin = end


def _look_up(tables: Planes, digits: Planes, first: bool) -> tuple[Planes, Planes]:
    """Entry c and entry c - 1 of each table: less = T[c], equal = T[c - 1] ^ T[c], with T[-1] = 1 and T[2^s - 1] = 0.

    `tables` (D, 2^s - 1, words) shared, `digits` (D, s, words) public, lowest bit first; results (D, words) shared.
    A tree of multiplexers over the public bits for both entries at once.
    """
    count, size, width = digits.shape
    padded = np.empty((count, (1 << size) + 1, width), dtype=np.uint64)
    padded[:, 0] = _ONES if first else 0
    padded[:, 1:-1] = tables
    padded[:, -1] = 0
    table, entry, word = padded.strides
    chosen = as_strided(padded, (2, count, 1 << size, width), (entry, table, entry, word), writeable=False)
    for level in range(size):
        even = chosen[:, :, 0::2]
        following = chosen[:, :, 1::2] ^ even
        following &= digits[np.newaxis, :, level, np.newaxis]
        following ^= even
        chosen = following
    before, at = chosen[0, :, 0], chosen[1, :, 0]
    return at, before ^ at


# ---- 3. the borrow -------------------------------------------------------------------------------------------------


def _masked_borrow(material: GateMaterial, opened: np.ndarray, masked: Planes, number: int, first: bool) -> Planes:
    """This party's share of t of threshold `number`, one plane: Horner's rule over the digits, on the products of masks.

    Entry S of `value` belongs to the product of the "equal" masks in S, a subset of the digits not yet taken up.
    """
    gate, digits = material.gate, len(material.gate.digits)
    mask_rows, threshold = list(gate.mask_rows[number]), gate.thresholds[number]
    every = dict(zip(monomials(digits), gate.product_rows[number], strict=True))
    alone = [subset for less, subset in every if less is None]
    by_digit = [[row for (less, _), row in every.items() if less == digit] for digit in range(digits)]
    result = material.drawn.result_masks[number].copy()
    for gates, words in gate.chunks():
        corrected, masks = material.corrected.products[:, words], material.drawn.masks[mask_rows, words]
        opened_bits = masked[mask_rows, words]
        products = np.empty((1 << digits - 1, corrected.shape[1]), dtype=np.uint64)
        products[0] = _ONES if first else 0
        for index in range(digits - 1):
            products[1 << index] = masks[digits + index]
        products[alone] = corrected[[every[None, subset] for subset in alone]]
        value = np.empty(0)
        for digit in range(digits):
            term = products[:: 1 << digit] & opened_bits[digit]
            term[0] ^= masks[digit]
            if digit < digits - 1:
                term[1:] ^= corrected[by_digit[digit]]
            if digit:
                folded = value[0::2] & opened_bits[digits + digit - 1]
                folded ^= value[1::2]
                term ^= folded
            value = term
        result[words] ^= value[0]
        if first:
            high = _less_ceiling(gate, opened[gates], threshold) >> np.uint32(gate.bits - 1)
            result[words] ^= plane_of(high != 0)
    return result


# ---- 4. the result -------------------------------------------------------------------------------------------------


def _rectified(material: GateMaterial, opened: np.ndarray, t_planes: Planes, first: bool) -> np.ndarray:
    """y = p (c - r'), p = w if t else 1 - w; with a ceiling h p = w if t = t' else 1 - w, and w' h or (1 - w') h is added."""
    gate, r = material.gate, material.drawn.input_mask
    wide, ceiling = gate.result is Result.WIDE, gate.ceiling
    w, wr, *high = material.corrected.arrays
    t_plane = t_planes[0] if ceiling is None else ~(t_planes[0] ^ t_planes[1])
    if ceiling is not None:
        reached = high.pop(0)
    result = np.empty(gate.count, dtype=np.uint32)
    for gates, words in gate.chunks():
        c, y = opened[gates], result[gates]
        t = bits_of(t_plane[words], len(c))
        zero = t.astype(np.uint32) - np.uint32(1)  # all ones where t = 0
        np.multiply(w[gates], c, out=y)
        y -= wr[gates]
        y ^= zero  # -v = (v ^ ones) - ones: w (c - r) where t = 1, its negative where t = 0
        y -= zero
        rest = c - r[gates] if first else np.negative(r[gates])
        rest &= zero
        y += rest
        if ceiling is not None:
            below = bits_of(t_planes[1, words], len(c)).astype(np.uint32) - np.uint32(1)  # all ones where t' = 0
            p = (reached[gates] ^ below) - below  # w' where t' = 1, -w' where t' = 0
            if first:
                p += below & np.uint32(1)
            y += p * np.uint32(ceiling)
        if wide:
            kappa, both, other = (array[gates] for array in high)
            dtype = kappa.dtype
            t_zero = zero.astype(dtype)
            wraps = both ^ other
            wraps &= t_zero
            wraps ^= both
            wraps &= (c >> np.uint32(gate.bits - 1)).astype(dtype) - dtype.type(1)
            kappa = kappa & t_zero
            kappa += wraps
            y += kappa.astype(np.uint32) << np.uint32(gate.bits)
    if not wide:
        result &= np.uint32((1 << gate.bits) - 1)
    return result


def _extended(material: GateMaterial, opened: np.ndarray, first: bool) -> np.ndarray:
    """c - r + 2^k (kappa + (1 - msb(c)) msb(r)) - 2^(k-2)."""
    gate = material.gate
    at_zero, at_one = material.corrected.arrays
    result = np.negative(material.drawn.input_mask)
    if first:
        result += opened
        result -= np.uint32(1 << gate.bits - 2)
    wraps = np.where(opened >> np.uint32(gate.bits - 1) != 0, at_one, at_zero)
    result += wraps.astype(np.uint32) << np.uint32(gate.bits)
    return result


# ---- by what the steps are done ----------------------------------------------------------------------------------------


@functools.cache
def fastest_steps() -> Steps:
    """The compiled kernels, where there are some and they do what numpy does; tested once, within some 20 ms."""
    slower: Steps = _NUMPY
    return by_kernels("gates", slower, CompiledSteps, same_steps)


def same_steps(steps: Steps) -> bool:
    """Whether these steps give what the specification does, byte for byte: for both parties, every result, many widths."""
    for result in Result:
        for gate in gates_to_try(result):
            for first in (True, False):
                runs = [everything_computed(by, gate, first) for by in (_NUMPY, steps)]
                if any(not np.array_equal(*pair) for pair in zip(*runs, strict=True)):
                    return False
    return True


def everything_computed(by: Steps, gate: ComparisonGate, first: bool, key: bytes = bytes(32)) -> list[np.ndarray]:
    """All that one party computes of a gate that never took part in a diagnosis: what it has and receives is of this key."""
    seed = Seed(key)
    stream, others = seed.stream("C" if first else "S"), seed.stream("others")
    material = GateMaterial(gate, stream, None if first else correction_by(correct, gate, key))
    share = others.words(gate.count, np.uint32)
    share &= np.uint32((1 << gate.bits) - 1)
    mine, message = by.masked_input(material, share, first)
    kept = mine.copy()
    opened, masked = by.masked_digits(material, mine, others.words(len(message), np.uint8), first)
    if not gate.thresholds:
        return [kept, message, opened, by.result(material, opened, masked, first)]
    sent = masked.copy()
    masked ^= others.words(masked.size, np.uint64).reshape(masked.shape)
    borrows = by.masked_borrows(material, opened, masked, first)
    t = borrows ^ others.words(borrows.size, np.uint64).reshape(borrows.shape)
    return [kept, message, opened, sent, borrows, by.result(material, opened, t, first)]
