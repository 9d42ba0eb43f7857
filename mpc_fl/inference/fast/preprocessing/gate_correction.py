"""S's corrections of comparison gates, which the dealer makes: what they are is said in `gate_correlation`.

They are specified here with numpy. Where there are compiled kernels these make them (`compiled_gates`), after a test that they do
exactly the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from mpc_fl.crypto.stream_cipher import Seed, Stream
from mpc_fl.inference.fast.kernels.bit_planes import Planes, bits_of, planes_of
from mpc_fl.inference.fast.kernels.compiled import by_kernels
from mpc_fl.inference.fast.preprocessing.compiled_gates import compiled_correction
from mpc_fl.inference.fast.preprocessing.gate_correlation import (
    ComparisonGate,
    Corrected,
    Drawn,
    Result,
    corrected_from,
    draw,
    product_rows,
)

Correction = Callable[[ComparisonGate, Drawn, Drawn, Corrected], None]


def correction_of(gate: ComparisonGate, hospital: Stream, owner: Stream) -> np.ndarray:
    """S's correction, uint8 (correction_bytes,): made by the dealer from the two streams, without any data.

    The true values, less C's share of them.
    """
    c, s = draw(gate, hospital), draw(gate, owner)
    share = hospital.words(gate.correction_bytes, np.uint8)
    fastest_correction()(gate, c, s, corrected_from(gate, share))
    return share


def correct(gate: ComparisonGate, c: Drawn, s: Drawn, result: Corrected) -> None:
    """The specification: C's share of what is corrected, from what both parties drew, becomes S's in its place."""
    mask = np.uint32((1 << gate.bits) - 1)
    for gates, words in gate.chunks():
        total = c.input_mask[gates] + s.input_mask[gates]
        r = total & mask
        planes = planes_of(r, gate.bits)
        result.tables[:, words] ^= _tables(gate, planes)
        result.products[:, words] ^= _products(gate, c.masks[:, words] ^ s.masks[:, words])
        q = bits_of(c.result_mask[words] ^ s.result_mask[words], len(r))
        for array, true in zip(result.arrays, _words(gate, r, total >> np.uint32(gate.bits), q), strict=True):
            # array - true is C's share less the true value: negate it.
            piece = array[gates]
            np.subtract(true.astype(piece.dtype), piece, out=piece)


def _tables(gate: ComparisonGate, planes: Planes) -> Planes:
    """[v < digit of r] for each digit, v = 0 .. 2^s - 2, from the planes of r."""
    tables, start = [], 0
    for size in gate.digits:
        table = planes[start : start + 1]  # one bit: r > 0
        for bit in planes[start + 1 : start + size]:
            table = np.concatenate([table | bit, bit[np.newaxis], table & bit])
        tables.append(table)
        start += size
    return np.concatenate(tables)


def _products(gate: ComparisonGate, masks: Planes) -> Planes:
    digits = len(gate.digits)
    less, equal = masks[:digits], masks[digits:]
    subsets, slices = product_rows(digits)
    products = np.full((1 << digits - 1, masks.shape[1]), ~np.uint64(0), dtype=np.uint64)
    for index in range(digits - 1):
        products[1 << index : 2 << index] = products[: 1 << index] & equal[index]
    result = np.empty((gate.product_planes, masks.shape[1]), dtype=np.uint64)
    result[: len(subsets)] = products[subsets]
    for digit, rows in enumerate(slices):
        # Subsets of the digits above: every 2^digit-th, without the empty one.
        np.bitwise_and(products[1 << digit :: 1 << digit], less[digit], out=result[rows])
    return result


def _words(gate: ComparisonGate, r: np.ndarray, wrap: np.ndarray, q: np.ndarray) -> Sequence[np.ndarray]:
    if gate.result is Result.EXTENDED:
        return wrap + q, wrap + 1 - q
    high = (r >> np.uint32(gate.bits - 1)).astype(np.uint8)
    w = q ^ high
    products = (w, r * w)
    return products if gate.result is Result.NARROW else (*products, wrap, w & high, high & (w ^ 1))


# ---- by what they are made ---------------------------------------------------------------------------------------------


@functools.cache
def fastest_correction() -> Correction:
    """The compiled kernels, where there are some and they do what numpy does; tested once, within some 10 ms."""
    slower: Correction = correct
    return by_kernels("corrections", slower, compiled_correction, same_correction)


def same_correction(by: Correction) -> bool:
    """Whether this gives what the specification does, byte for byte: for every result and many widths."""
    return all(
        np.array_equal(correction_by(by, gate), correction_by(correct, gate))
        for result in Result
        for bits, count in ((8, 65), (13, 600), (16, 520), (17, 9), (19, 700), (20, 1029), (23, 64), (24, 130))
        for gate in (ComparisonGate(bits, count, result),)
    )


def correction_by(by: Correction, gate: ComparisonGate, key: bytes = bytes(32)) -> np.ndarray:
    """The correction of a gate that never takes part in a diagnosis: what parties drew, and C's share, are of this key."""
    seed = Seed(key)
    hospital = seed.stream("C")
    c, s = draw(gate, hospital), draw(gate, seed.stream("S"))
    share = hospital.words(gate.correction_bytes, np.uint8)
    by(gate, c, s, corrected_from(gate, share))
    return share
