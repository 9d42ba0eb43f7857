"""Arithmetic modulo the prime p = 2^127 - 1, for the proofs of a norm check (`norm_proof`). Pure.

A polynomial of degree d has at most d roots in a field, so an identity that holds at a random point holds everywhere but
for d chances in p. Z_2^k has zero divisors and no such bound. Elements are Python's whole numbers from 0 to p - 1 in numpy
arrays of objects: a proof has some ten thousand, and products of a few hundred nanoseconds are fast enough.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import torch

from mpc_fl.crypto.stream_cipher import Stream
from mpc_fl.errors import SAME_VERSION, ProtocolError

PRIME = (1 << 127) - 1
ELEMENT_BYTES = 16
_WORDS = 2  # of 64 bits per element, on the link
_LIMBS = 4  # of 32 bits, where a vector is multiplied by small integers

Vector = np.ndarray  # of objects: whole numbers


def vector(numbers: Iterable[int]) -> Vector:
    """Whole numbers as elements, shape (count,)."""
    return np.array([number % PRIME for number in numbers], dtype=object)


def zeros(count: int) -> Vector:
    """`count` elements that are zero."""
    return np.array([0] * count, dtype=object)


def uniform(stream: Stream, count: int) -> Vector:
    """The next `count` elements of a key stream, uniform but for a distance of 2^-126 each."""
    return _of_bytes(stream.words(ELEMENT_BYTES * count, np.uint8).tobytes(), mask=True)


def centred(element: int) -> int:
    """The integer of least magnitude that is equal modulo p."""
    return element if element <= PRIME // 2 else element - PRIME


def to_words(elements: Vector) -> torch.Tensor:
    """For a link: int64 of shape (count, 2), the low word first."""
    data = b"".join(element.to_bytes(ELEMENT_BYTES, "little") for element in elements.tolist())
    return torch.from_numpy(np.frombuffer(data, np.int64).reshape(-1, _WORDS).copy())


def from_words(words: torch.Tensor, sender: str) -> Vector:
    """What `to_words` made, shape (count,). Raises `ProtocolError`, which names the sender, for anything else."""
    elements = None
    if words.dtype == torch.int64 and words.dim() == 2 and words.shape[1] == _WORDS:
        elements = _of_bytes(words.contiguous().numpy().tobytes(), mask=False)
    if elements is None or any(element >= PRIME for element in elements.tolist()):
        what = f"{sender} sent something else than elements of the field of a norm check"
        raise ProtocolError(what, SAME_VERSION, sender)
    return elements


def _of_bytes(data: bytes, mask: bool) -> Vector:
    whole = [int.from_bytes(data[at : at + ELEMENT_BYTES], "little") for at in range(0, len(data), ELEMENT_BYTES)]
    return np.array([(number & PRIME) % PRIME for number in whole] if mask else whole, dtype=object)


def combination(coefficients: Vector, rows: Vector) -> Vector:
    """Sum of rows (n, columns), or of elements (n,), each times its coefficient (n,)."""
    return coefficients.dot(rows) % PRIME


def small_combinations(matrix: np.ndarray, elements: Vector) -> Vector:
    """`matrix` (rows, count) of int64 values -1, 0 and 1 times elements (count,): shape (rows,). Up to 2^30 elements."""
    limbs = np.frombuffer(to_words(elements).numpy().tobytes(), np.uint32).reshape(-1, _LIMBS).astype(np.int64)
    sums = (matrix @ limbs).tolist()
    return vector(sum(limb << (32 * place) for place, limb in enumerate(row)) for row in sums)


@functools.lru_cache(maxsize=64)
def _inverse_weights(count: int) -> tuple[int, ...]:
    """1 / product over m != l of (l - m), for the points l = 0 .. count - 1."""
    weights = []
    for point in range(count):
        product = 1
        for other in range(count):
            product = product * (point - other) % PRIME if other != point else product
        weights.append(pow(product, -1, PRIME))
    return tuple(weights)


def interpolation(count: int, at: int) -> Vector:
    """The coefficients that give a polynomial of degree below `count` at `at`, from its values at 0 .. count - 1.

    Raises `ValueError` when `at` is one of these points.
    """
    if 0 <= at < count:
        raise ValueError("a polynomial is known there already")
    product = 1
    for point in range(count):
        product = product * (at - point) % PRIME
    return vector(
        product * weight * pow((at - point) % PRIME, -1, PRIME) for point, weight in enumerate(_inverse_weights(count))
    )
