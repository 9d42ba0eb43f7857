"""ReLU, maximum and sign extension of additively shared numbers, in three openings.

Protocol, for shares of x modulo 2^k, mask r shared by the dealer (`gate_correlation`), both parties alike:

  1. open c = x + r modulo 2^k. ReLU: x < 0 iff msb(c) ^ msb(r) ^ u = 1, with u = [c < r] on the low k - 1 bits.
     Sign extension: x + 2^(k-1) is opened instead, and u = [c < r] on all k bits.
     Look c's digits up in the tables of r: shares of less_j = [c_j < r_j] and equal_j = [c_j = r_j].
  2. open less_j ^ m_j and equal_j ^ m'_j. u = less_L-1 ^ equal_L-1 (less_L-2 ^ equal_L-2 (...)) is now a polynomial with
     public coefficients in products of masks, which are shared: a share of u without a message.
  3. open t = (msb(c) ^) u ^ q. What is left is linear in shared words.

ReLU. p = 1 - [x < 0] = 1 ^ t ^ w with w = q ^ msb(r), and y = p (c - r'), where r' = r - 2^k msb(r) if msb(c) = 0 and r' = r
otherwise: for x >= 0 the integer c - r wraps exactly when msb(c) = 0 and msb(r) = 1 (then u must be 1). As an integer
r = r_C + r_S - 2^k kappa, so the result modulo 2^32 needs shares of kappa and the like modulo 2^(32-k) only.
Sign extension. x + 2^(k-1) = c - r + 2^k u as integers, u = t ^ q.

Security (semi-honest, dealer apart). Everything opened is masked by a value that is uniform to either party and used once:
c by r, step 2 by the masks m, step 3 by q, all sums or exclusive ors of one part per party. A simulator draws c, the digit
bits and t at random; shares of the result are fresh because C's corrected words are uniform. Nothing depends on x but by
these openings.

The steps are specified here with numpy. Where there are compiled kernels, these do them (`compiled_steps`), after a test that they
do exactly the same; every message is equal, byte by byte.

Rounds and bytes. Three openings, both parties send at the same time. k = 20: 2.5 + 9/8 + 1/8 = 3.75 bytes per gate and
direction; sign extension the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.inference.fast.kernels.bit_planes import Planes, bits_of, pack, plane_of, planes_of, unpack
from mpc_fl.inference.fast.kernels.compiled import by_kernels
from mpc_fl.inference.fast.online.compiled_steps import CompiledSteps
from mpc_fl.inference.fast.preprocessing.gate_correction import correct, correction_by
from mpc_fl.inference.fast.preprocessing.gate_correlation import (
    DIGIT,
    ComparisonGate,
    GateMaterial,
    Result,
    product_rows,
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

    def masked_borrow(self, material: GateMaterial, opened: np.ndarray, masked: Planes, first: bool) -> Planes:
        """This party's share of t."""

    def result(self, material: GateMaterial, opened: np.ndarray, t_plane: Planes, first: bool) -> np.ndarray:
        """This party's share of the result, uint32 (count,)."""


_ONES = ~np.uint64(0)


def compare(material: GateMaterial, share: np.ndarray, first: bool, exchange: Exchange) -> np.ndarray:
    """This party's share of the gate's result, uint32 (count,), from its share of x, uint32 (count,) modulo 2^k.

    `first` is true at C alone: it adds public constants. The result is modulo 2^32 or 2^k, as `Result` says. Raises
    `ValueError` when the share does not fit the gate.
    """
    gate = material.gate
    if share.dtype != np.uint32 or share.shape != (gate.count,):
        raise ValueError("the share does not fit the gate")
    by = fastest_steps()
    mine, message = by.masked_input(material, share, first)
    # C draws the rest of its part while S still convolves.
    theirs = exchange(message, lambda: material.corrected)
    opened, masked = by.masked_digits(material, mine, theirs, first)
    masked ^= exchange(masked.view(np.uint8).reshape(-1)).view(np.uint64).reshape(masked.shape)
    borrow = by.masked_borrow(material, opened, masked, first)
    borrow ^= exchange(borrow.view(np.uint8)).view(np.uint64)
    return by.result(material, opened, borrow, first)


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

    def masked_borrow(self, material: GateMaterial, opened: np.ndarray, masked: Planes, first: bool) -> Planes:
        """Step 3."""
        return _masked_borrow(material, opened, masked, first)

    def result(self, material: GateMaterial, opened: np.ndarray, t_plane: Planes, first: bool) -> np.ndarray:
        """Step 4."""
        extended = material.gate.result is Result.EXTENDED
        return (_extended if extended else _rectified)(material, opened, t_plane, first)


_NUMPY = NumpySteps()


# ---- 1. the masked input -------------------------------------------------------------------------------------------


def _masked_input(material: GateMaterial, share: np.ndarray, first: bool) -> tuple[np.ndarray, np.ndarray]:
    gate = material.gate
    mask = np.uint32((1 << gate.bits) - 1)
    mine = share + material.drawn.input_mask
    if first and gate.result is Result.EXTENDED:
        mine += np.uint32(1 << gate.bits - 1)
    mine &= mask
    return mine, pack(mine, gate.bits)


# ---- 2. the digits -------------------------------------------------------------------------------------------------


def _masked_digits(material: GateMaterial, opened: np.ndarray, first: bool) -> Planes:
    """This party's shares of all less_j, then of equal_1 .. equal_L-1, under its masks: (2L - 1, words)."""
    gate, digits = material.gate, len(material.gate.digits)
    full = sum(size == DIGIT for size in gate.digits)
    result = material.drawn.masks.copy()
    for gates, words in gate.chunks():
        c = planes_of(opened[gates], gate.bits)
        tables = material.corrected.tables[:, words]
        width = tables.shape[1]
        groups = [(0, full, DIGIT), (full, digits, gate.digits[-1])]
        for begin, end, size in groups:
            if begin == end:
                continue
            start, entries = begin * ((1 << DIGIT) - 1), (1 << size) - 1
            less, equal = _look_up(
                tables[start : start + (end - begin) * entries].reshape(end - begin, entries, width),
                c[begin * DIGIT : begin * DIGIT + (end - begin) * size].reshape(end - begin, size, width),
                first,
            )
            result[begin:end, words] ^= less
            skip = 1 if begin == 0 else 0  # equality of the lowest digit is not needed
            result[digits + begin + skip - 1 : digits + end - 1, words] ^= equal[skip:]
    return result


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


def _masked_borrow(material: GateMaterial, opened: np.ndarray, masked: Planes, first: bool) -> Planes:
    """This party's share of t, one plane: Horner's rule over the digits, on the products of masks.

    Entry S of `value` belongs to the product of the "equal" masks in S, a subset of the digits not yet taken up.
    """
    gate, digits = material.gate, len(material.gate.digits)
    subsets, slices = product_rows(digits)
    less_masks, equal_masks = material.drawn.masks[:digits], material.drawn.masks[digits:]
    result = material.drawn.result_mask.copy()
    for gates, words in gate.chunks():
        corrected = material.corrected.products[:, words]
        products = np.empty((1 << digits - 1, corrected.shape[1]), dtype=np.uint64)
        products[0] = _ONES if first else 0
        for index in range(digits - 1):
            products[1 << index] = equal_masks[index, words]
        products[subsets] = corrected[: len(subsets)]
        value = np.empty(0)
        for digit in range(digits):
            term = products[:: 1 << digit] & masked[digit, words]
            term[0] ^= less_masks[digit, words]
            if digit < digits - 1:
                term[1:] ^= corrected[slices[digit]]
            if digit:
                folded = value[0::2] & masked[digits + digit - 1, words]
                folded ^= value[1::2]
                term ^= folded
            value = term
        result[words] ^= value[0]
        if first and gate.result is not Result.EXTENDED:
            result[words] ^= plane_of(opened[gates] >> np.uint32(gate.bits - 1) != 0)
    return result


# ---- 4. the result -------------------------------------------------------------------------------------------------


def _rectified(material: GateMaterial, opened: np.ndarray, t_plane: Planes, first: bool) -> np.ndarray:
    """y = p (c - r'), p = w if t else 1 - w."""
    gate, r = material.gate, material.drawn.input_mask
    wide = gate.result is Result.WIDE
    w, wr, *high = material.corrected.arrays
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


def _extended(material: GateMaterial, opened: np.ndarray, t_plane: Planes, first: bool) -> np.ndarray:
    """c - r + 2^k (kappa + u) - 2^(k-1), u = q if t = 0 and 1 - q otherwise."""
    gate = material.gate
    at_zero, at_one = material.corrected.arrays
    result = np.negative(material.drawn.input_mask)
    if first:
        result += opened
        result -= np.uint32(1 << gate.bits - 1)
    t = bits_of(t_plane, gate.count)
    wraps = np.where(t, at_one, at_zero)
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
        for bits, count in ((8, 65), (13, 600), (16, 520), (17, 9), (19, 700), (20, 1029), (23, 64), (24, 130)):
            for first in (True, False):
                runs = [everything_computed(by, ComparisonGate(bits, count, result), first) for by in (_NUMPY, steps)]
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
    sent = masked.copy()
    masked ^= others.words(masked.size, np.uint64).reshape(masked.shape)
    borrow = by.masked_borrow(material, opened, masked, first)
    t_plane = borrow ^ others.words(len(borrow), np.uint64)
    return [kept, message, opened, sent, borrow, by.result(material, opened, t_plane, first)]
