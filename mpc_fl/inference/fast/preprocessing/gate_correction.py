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
    gates_to_try,
    monomials,
)

Correction = Callable[[ComparisonGate, Drawn, Drawn, Corrected], None]


def correction_of(
    gate: ComparisonGate, hospital: Stream, owner: Stream, value_mask: np.ndarray | None = None
) -> np.ndarray:
    """S's correction, uint8 (correction_bytes,): made by the dealer from the two streams, without any data.

    The true values, less C's share of them. `value_mask` as in `draw`, for C.
    """
    c, s = draw(gate, hospital, value_mask), draw(gate, owner)
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
        if gate.thresholds:
            result.tables[:, words] ^= _tables(gate, planes)
        masks, made = c.masks[:, words] ^ s.masks[:, words], 0
        for mask_rows, product_rows in zip(gate.mask_rows, gate.product_rows, strict=True):
            fresh = [place for place, row in enumerate(product_rows) if row >= made]  # the others are made already
            result.products[made : made + len(fresh), words] ^= _products(gate, masks[list(mask_rows)])[fresh]
            made += len(fresh)
        q = [bits_of(plane, len(r)) for plane in c.result_masks[:, words] ^ s.result_masks[:, words]]
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
    """The products of one threshold's masks, in the order of `monomials`."""
    digits, every = len(gate.digits), monomials(len(gate.digits))
    less, equal = masks[:digits], masks[digits:]
    products = np.full((1 << digits - 1, masks.shape[1]), ~np.uint64(0), dtype=np.uint64)
    for index in range(digits - 1):
        products[1 << index : 2 << index] = products[: 1 << index] & equal[index]
    result = products[[subset for _, subset in every]]
    start = sum(factor is None for factor, _ in every)
    for digit in range(digits - 1):
        stop = start + (1 << digits - 1 - digit) - 1
        result[start:stop] &= less[digit]
        start = stop
    return result


def _words(gate: ComparisonGate, r: np.ndarray, wrap: np.ndarray, q: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    high = (r >> np.uint32(gate.bits - 1)).astype(np.uint8)
    if gate.result is Result.EXTENDED:
        return wrap + high, wrap
    w = q[0] ^ (high if gate.ceiling is None else q[1])
    products = (w, r * w) if gate.ceiling is None else (w, r * w, q[1] ^ high)
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
        for gate in gates_to_try(result)
    )


def correction_by(by: Correction, gate: ComparisonGate, key: bytes = bytes(32)) -> np.ndarray:
    """The correction of a gate that never takes part in a diagnosis: what parties drew, and C's share, are of this key."""
    seed = Seed(key)
    hospital = seed.stream("C")
    c, s = draw(gate, hospital), draw(gate, seed.stream("S"))
    share = hospital.words(gate.correction_bytes, np.uint8)
    by(gate, c, s, corrected_from(gate, share))
    return share
