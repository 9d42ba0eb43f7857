"""Bits of many values side by side: one bit of 64 gates in each word, so that one operation serves 64 gates.

A plane holds one bit of each of n values: ceil(n / 64) words of uint64, bit j % 64 of word j // 64 belongs to value j. The
spare bits of the last word are of no meaning and may be anything.
"""

from __future__ import annotations

import numpy as np

Planes = np.ndarray  # uint64, shape (..., words)


def words_for(count: int) -> int:
    """Words of one plane of `count` bits."""
    return -(-count // 64)


def planes_of(values: np.ndarray, bits: int) -> Planes:
    """The `bits` low bits of uint32 `values` (n,), as planes (bits, words); spare bits are zero."""
    planes = np.zeros((bits, words_for(len(values)) * 8), dtype=np.uint8)
    octets = values.view(np.uint8).reshape(-1, 4)
    size = -(-len(values) // 8)
    for position in range(bits):
        if position % 8 == 0:
            octet = np.ascontiguousarray(octets[:, position // 8])
        chosen = octet & np.uint8(1 << position % 8)
        planes[position, :size] = np.packbits(chosen, bitorder="little")
    return planes.view(np.uint64)


def plane_of(bits: np.ndarray) -> Planes:
    """One plane (words,) of `bits` (n,), uint8 or bool, non-zero meaning one."""
    plane = np.zeros(words_for(len(bits)) * 8, dtype=np.uint8)
    plane[: -(-len(bits) // 8)] = np.packbits(bits, bitorder="little")
    return plane.view(np.uint64)


def bits_of(plane: Planes, count: int) -> np.ndarray:
    """The first `count` bits of one plane as uint8 (count,), each 0 or 1."""
    return np.unpackbits(plane.view(np.uint8), count=count, bitorder="little")


def packed_bytes(bits: int, count: int) -> int:
    """Length of `pack`'s result."""
    return count * (bits // 8) + -(-count // 8) * (bits % 8)


def _split(packed: np.ndarray, bits: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where `pack` puts the low word of 8 or 16 bits, the third octet if it is whole, and the planes of the rest."""
    low: type[np.generic] = np.uint16 if bits >= 16 else np.uint8
    first = count * np.dtype(low).itemsize
    second = count * (bits // 8)
    planes = packed[second:].reshape(bits % 8, -(-count // 8))
    return packed[:first].view(low), packed[first:second], planes


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint32 values (n,) below 2^bits, bits in 8 .. 24, as uint8: the whole octets, then a plane for each bit above."""
    result = np.empty(packed_bytes(bits, len(values)), dtype=np.uint8)
    low, third, planes = _split(result, bits, len(values))
    np.copyto(low, values, casting="unsafe")  # the conversion keeps the low bits
    if len(third):
        np.copyto(third, values >> np.uint32(16), casting="unsafe")
    if len(planes):
        high = (values >> np.uint32(bits // 8 * 8)).astype(np.uint8)
        for position, plane in enumerate(planes):
            plane[:] = np.packbits(high & np.uint8(1 << position), bitorder="little")
    return result


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The values that `pack` packed, uint32 (count,)."""
    low, third, planes = _split(packed, bits, count)
    values = low.astype(np.uint32)
    if len(third):
        values |= third.astype(np.uint32) << np.uint32(16)
    if len(planes):
        high = np.unpackbits(planes[0], count=count, bitorder="little")
        for position, plane in enumerate(planes[1:], start=1):
            bit = np.unpackbits(plane, count=count, bitorder="little")
            bit <<= np.uint8(position)
            high |= bit
        words = high.astype(np.uint32)
        words <<= np.uint32(bits // 8 * 8)
        values |= words
    return values
