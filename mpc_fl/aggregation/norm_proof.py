"""A hospital's proof, to verifiers who hold shares of its sketch, that the squares of its buckets add up to at most A.

Pure: what is proven and how, without a link (`norm_check` sends it). The hospital knows its sketch, so nothing has to be
multiplied on shares: it shares all that a check needs, and the verifiers test linear equations and one point of polynomials
(fully linear proofs: Boneh, Boyle, Corrigan-Gibbs, Gilboa, Ishai, CRYPTO 2019; Prio: Corrigan-Gibbs and Boneh, NSDI 2017).

Verifier j has V_j, its share of the sketch V over Z_2^k (M buckets), as whole numbers from 0 to 2^k - 1. All else is shared
over the field of p = 2^127 - 1 elements. Numbers in brackets are steps of `norm_check`.
  - [2] the hospital shares *carries* c: sum of all V_j = V + 2^k c with V centred, so c is a whole number from 0 to
    the number of verifiers. A verifier's share of V in the field is V_j - 2^k c_j
  - [3] K = 40 public vectors q over {-1, 0, 1} (1/4, 1/2, 1/4) are drawn
  - [4] it shares the bits of 2^t + <q, c> and of 2^u + <q, V> for every q, which are t + 1 and u + 1 bits each, and the
    bits of A - |V|^2. V and bits are written into L = 16 rows of columns; a random row 0 is drawn with them. f_i is
    the polynomial of degree L with the values of column i at 0 .. L
  - [5] a random coefficient b_i is drawn for every column of bits
  - [6] it shares two polynomials of degree 2 L by their values at 0 .. 2 L: g, the sum of f_i^2 over columns of V, and h, the
    sum of b_i f_i^2 over columns of bits
  - [7] a random point r > 2 L, and random coefficients, are drawn
  - [8] each verifier answers with its shares of all f_i(r), g(r), h(r) (sums of its shares), and of one random combination of
    what must be zero: that bits add up to what they are the bits of; that the sum of g(1) .. g(L), which is
    |V|^2, and its bits add up to A; and for rows l that h(l) = sum of b_i f_i(l), as bits are their own squares
  - [9] accepted if the combination is zero, g(r) = sum of f_i(r)^2 and h(r) = sum of b_i f_i(r)^2

Soundness, against a hospital that shares whatever it likes, every step fixed before the next is drawn. If a carry is not
within 2^(t+1) of zero modulo p, or a bucket V not within 2^(u+1), each q finds it with probability 1/2, because q without this
bucket cannot be in range together with q plus it or q minus it: both pass with probability below 2^-39. Within these ranges
nothing wraps modulo p (`NormTest` proves it when it is made): V is what the shares of the sketch hold modulo 2^k, |V|^2 is the
sum of squares over the integers, and at most A. The other identities fail to be found with probability (4 L + 4) / p.

An honest hospital with |V|^2 <= A is accepted always: |<q, V>| <= sqrt(M) |V| <= sqrt(M A) < 2^u, |<q, c>| <= M verifiers < 2^t.

Secrecy, of an honest hospital that is accepted, against all verifiers but one, whatever these do: their shares are key
streams; the answers of the last one are determined by theirs and by f_i(r), uniform because of row 0 and as r is no
row, g(r) and h(r), which follow from these, and zero. A verifier that answers falsely changes what is opened by what it chose,
and learns nothing of what it does not know.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.aggregation.prime_field import (
    PRIME,
    Vector,
    centred,
    combination,
    interpolation,
    small_combinations,
    uniform,
    vector,
)
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SAME_VERSION, ProtocolError

PROJECTIONS = 40
ROWS = 16  # L: the more, the fewer answers, and the more work for the hospital that proves


@dataclass(frozen=True)
class ProofSize:
    """How long each part of a proof is: for a test, and so many verifiers."""

    test: NormTest
    verifiers: int

    @property
    def carry_exponent(self) -> int:
        """t: |<q, c>| < 2^t."""
        return (self.test.buckets * self.verifiers).bit_length()

    @property
    def value_exponent(self) -> int:
        """u: |<q, V>| < 2^u."""
        return (math.isqrt(self.test.buckets * self.test.largest_square_sum) + 1).bit_length()

    @property
    def slack_bits(self) -> int:
        """Bits of A - |V|^2."""
        return self.test.largest_square_sum.bit_length()

    @property
    def sketch_columns(self) -> int:
        """Columns that V is written into."""
        return self.test.buckets // ROWS

    @property
    def bit_columns(self) -> int:
        """Columns that bits are written into; the last is filled up with zeros."""
        return -(-(PROJECTIONS * (self.carry_exponent + self.value_exponent + 2) + self.slack_bits) // ROWS)

    @property
    def columns(self) -> int:
        """All columns, those of V first."""
        return self.sketch_columns + self.bit_columns

    @property
    def bits(self) -> int:
        """Elements of step 4, but for row 0."""
        return ROWS * self.bit_columns

    @property
    def products(self) -> int:
        """Elements of step 6."""
        return 2 * (2 * ROWS + 1)

    @property
    def of_parts(self) -> tuple[int, int, int]:
        """Elements of steps 2, 4 (but for row 0) and 6."""
        return self.test.buckets, self.bits, self.products

    @property
    def answers(self) -> int:
        """Elements of step 8."""
        return self.columns + 3


@dataclass(frozen=True)
class Point:
    """What step 7 draws: r, and coefficients of rows and of what must be zero."""

    at: int
    of_rows: Vector
    of_zeros: Vector


def draw_projections(seed: bytes, buckets: int) -> np.ndarray:
    """Step 3: the vectors q, int64 of shape (K, buckets)."""
    words = Seed(seed).stream("projections").words(PROJECTIONS * buckets, np.uint8)
    return ((words & 1).astype(np.int64) - (words >> 1 & 1)).reshape(PROJECTIONS, buckets)


def draw_weights(seed: bytes, size: ProofSize) -> Vector:
    """Step 5: b_i."""
    return uniform(Seed(seed).stream("weights"), size.bit_columns)


def draw_point(seed: bytes) -> Point:
    """Step 7. Raises `ProtocolError` for a seed whose point would open a row; none is found by chance."""
    public = Seed(seed)
    at = int(uniform(public.stream("point"), 1)[0])
    if at <= 2 * ROWS:
        raise ProtocolError("a norm check was asked to open a row of a proof", SAME_VERSION)
    return Point(at, uniform(public.stream("rows"), ROWS), uniform(public.stream("zeros"), 2 * PROJECTIONS + 2))


def whole_numbers(sketch: torch.Tensor) -> Vector:
    """A share over Z_2^k (int32 or int64, shape (buckets,)) as whole numbers from 0 to 2^k - 1."""
    unsigned = np.uint32 if sketch.dtype == torch.int32 else np.uint64
    return sketch.contiguous().numpy().view(unsigned).astype(object)


# -- shares


class Transcript:
    """What the opener has told of one check: shares of proofs are expanded under a hash of it."""

    def __init__(self, candidates: Sequence[str]) -> None:
        self._hash = hashlib.sha256("\n".join(candidates).encode())

    def add(self, seed: bytes, rows: Sequence[str] = ()) -> str:
        """Enter what was told next, of a fixed length or ended by it; returns the hash until then, as hex."""
        self._hash.update("\n".join(rows).encode() + b"\n" + seed)
        return self._hash.hexdigest()


class Witness:
    """The shares of one hospital's proof at each of its verifiers, part by part.

    A verifier holds one key stream, the hospital those of all verifiers but the opener.
    """

    def __init__(self, size: ProofSize, seeds: Mapping[str, Seed]) -> None:
        self.size, self._seeds = size, dict(seeds)
        self.shares: dict[str, list[Vector]] = {name: [] for name in seeds}

    def expand(self, part: str, told: str) -> None:
        """The next part: row 0 comes with the bits."""
        size = self.size
        counts = {
            "carries": {"carries": size.test.buckets},
            "bits": {"bits": size.bits, "row 0": size.columns},
            "products": {"products": size.products},
        }[part]
        for name, seed in self._seeds.items():
            self.shares[name] += [uniform(seed.stream(piece, told), count) for piece, count in counts.items()]

    def total(self, place: int) -> Vector:
        """What the shares of all verifiers known here add up to, of the piece at this place."""
        pieces = [shares[place] for shares in self.shares.values()]
        return sum(pieces[1:], pieces[0]) % PRIME


# -- at the hospital that proves


def centred_sketch(test: NormTest, shares: Sequence[Vector]) -> tuple[Vector, Vector]:
    """V, centred, and the carries c, both over the integers, from the verifiers' shares as whole numbers."""
    total, modulus = sum(shares[1:], shares[0]), 1 << test.ring_bits
    sketch = (total + modulus // 2) % modulus - modulus // 2
    return sketch, (total - sketch) // modulus


def square_sum(sketch: Vector) -> int:
    """|V|^2."""
    return int((sketch * sketch).sum())


def bits_of(size: ProofSize, projections: np.ndarray, sketch: Vector, carries: Vector) -> Vector:
    """Step 4: the bits, shape (L columns,), from V and c over the integers."""

    def ranges(values: Vector, exponent: int) -> list[int]:
        sums = [centred(value) + (1 << exponent) for value in small_combinations(projections, values % PRIME).tolist()]
        return [number >> place & 1 for number in sums for place in range(exponent + 1)]

    slack = size.test.largest_square_sum - square_sum(sketch)
    bits = [
        *ranges(carries, size.carry_exponent),
        *ranges(sketch, size.value_exponent),
        *(slack >> place & 1 for place in range(size.slack_bits)),
    ]
    return vector([*bits, *[0] * (size.bits - len(bits))])


def products_of(size: ProofSize, weights: Vector, sketch: Vector, bits: Vector, first_row: Vector) -> Vector:
    """Step 6: g(0) .. g(2 L), then h(0) .. h(2 L); row 0 has an element for every column."""
    further = np.stack([interpolation(ROWS + 1, at) for at in range(ROWS + 1, 2 * ROWS + 1)])

    def squares(row_0: Vector, rows: Vector) -> Vector:
        known = np.concatenate([row_0[None, :], rows])
        return np.concatenate([known, further.dot(known) % PRIME]) ** 2 % PRIME

    of_sketch = squares(first_row[: size.sketch_columns], sketch.reshape(ROWS, -1) % PRIME).sum(axis=1)
    of_bits = squares(first_row[size.sketch_columns :], bits.reshape(ROWS, -1)).dot(weights)
    return np.concatenate([of_sketch, of_bits]) % PRIME


# -- at a verifier


@dataclass(frozen=True, repr=False)
class VerifierShare:
    """One verifier's share of a proof: of V and c, bits, row 0, and products, all in the field."""

    sketch: Vector
    carries: Vector
    bits: Vector
    first_row: Vector
    products: Vector

    @classmethod
    def of(cls, test: NormTest, share: Vector, witness: Sequence[Vector]) -> VerifierShare:
        """From a share of the sketch as whole numbers, and shares of carries, bits, row 0, products."""
        carries, bits, first_row, products = witness
        return cls((share - (carries << test.ring_bits)) % PRIME, carries, bits, first_row, products)


def answers_of(
    size: ProofSize, projections: np.ndarray, weights: Vector, point: Point, share: VerifierShare, first: bool
) -> Vector:
    """Step 8, shape (answers,): f_i(r), g(r), h(r), zero. One verifier is the `first`: it adds what is public."""
    one = int(first)
    rows = np.concatenate([share.sketch.reshape(ROWS, -1), share.bits.reshape(ROWS, -1)], axis=1)
    at_point = combination(interpolation(ROWS + 1, point.at), np.concatenate([share.first_row[None, :], rows]))
    of_sketch, of_bits = share.products.reshape(2, -1)
    product_at_point = interpolation(2 * ROWS + 1, point.at)
    # What must be zero: ranges of c and V, the sum of squares, and bits that are their own squares.
    place, must_be_zero = 0, []
    for values, exponent in ((share.carries, size.carry_exponent), (share.sketch, size.value_exponent)):
        stop = place + PROJECTIONS * (exponent + 1)
        sums = _numbers(share.bits[place:stop].reshape(PROJECTIONS, -1))
        must_be_zero.append(small_combinations(projections, values) + (one << exponent) - sums)
        place = stop
    slack = _numbers(share.bits[place : place + size.slack_bits].reshape(1, -1))
    must_be_zero.append(of_sketch[1 : ROWS + 1].sum() + slack - one * size.test.largest_square_sum)
    squares_less_bits = of_bits[1 : ROWS + 1] - share.bits.reshape(ROWS, -1).dot(weights)
    must_be_zero.append(vector([point.of_rows.dot(squares_less_bits)]))
    return np.concatenate(
        [
            at_point,
            vector([product_at_point.dot(of_sketch), product_at_point.dot(of_bits)]),
            vector([point.of_zeros.dot(np.concatenate(must_be_zero))]),
        ]
    )


def _numbers(bits: Vector) -> Vector:
    """What shares of bits (rows, count), the lowest first, add up to: shape (rows,)."""
    return bits.dot(np.array([1 << place for place in range(bits.shape[1])], dtype=object)) % PRIME


def accepted(size: ProofSize, weights: Vector, answers: Sequence[Vector]) -> bool:
    """Step 9, from the answers of all verifiers."""
    total = sum(answers[1:], answers[0]) % PRIME
    at_point, (of_sketch, of_bits, zero) = total[: size.columns], total[size.columns :]
    squares = at_point**2 % PRIME
    return bool(
        zero == 0
        and of_sketch == squares[: size.sketch_columns].sum() % PRIME
        and of_bits == squares[size.sketch_columns :].dot(weights) % PRIME
    )
