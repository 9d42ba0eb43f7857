"""A public random sketch of a hidden vector: linear over the ring, short, and its norm tells the norm of the vector.

x has P coordinates in Z_2^k, k = 32 or 64. It is cut into blocks of m consecutive coordinates (the last one is filled up with
zeros); the public seed, drawn when x is fixed, gives every block a cyclic shift and every coordinate a sign and one of two
sides. Bucket (side, position) adds up sign * coordinate over the coordinates that the shifts bring to this position:

    V[h, p] = sum over blocks b of s * x[b, p - shift_b], over those with side h        2 m buckets in all

Norm (Alon, Matias, Szegedy, STOC 1996; with buckets: Charikar, Chen, Farach-Colton, ICALP 2002; Thorup, Zhang, SODA 2004). Signs
are independent, two coordinates share a bucket with probability 1/(2m), or never within one block. So over the integers
F = sum of V^2 has mean |x|^2 and variance 4 sum over pairs of x_j^2 x_k^2 / (2m) <= |x|^4 / m. An attacker who knows the blocks
beforehand cannot bring his coordinates into one bucket: the shifts spread them.

Wrap-around. An attacker may choose x so that buckets wrap, and against elements near 2^(k-1) signs do nothing: they are
their own negatives. (Without sides, a vector that is 2^(k-1) in all coordinates of two blocks would vanish under every
seed.) Let q = 2^k, V and x be centred in (-q/2, q/2], G = sum over buckets of 2 - 2 cos(2 pi V / q) <= (2 pi / q)^2 F, and
u_j = 4 sin^2(pi x_j / q) >= 16 x_j^2 / q^2. Whatever x is, and with U the sum of all u_j and U_b that of block b:
  1. given the shifts, E cos(2 pi V / q) is the product of cos^2(pi x_j / q) over the coordinates at this position, because
     each is on either side, with either sign. The product is independent of the way in which sums wrap
  2. E G = 4m (1 - prod over blocks of (1 - U_b / 4m)) >= 4m (1 - exp(-U / 4m)), by the independence of the shifts
  3. given the shifts, Var G <= 2 sum of u_j u_k over ordered pairs at one position (Efron-Stein: changing one
     coordinate changes G by a term of at most 2 sqrt(u_j G')), in expectation over the shifts <= 2 U^2 / m
  4. given the shifts, E G >= U - D, D a quarter of the sum of u_j u_k over pairs at one position; E D <= U^2 / 8m and
     Var D <= U^3 / 16m, because any two blocks meet at a uniform distance, these distances are independent in pairs, and u_j <= 4
  5. so for U <= m/16: E (G - U)^2 <= (2/m + 1/250) U^2, and by Chebyshev P[G <= U/12] < 0.006 for m = 4096. For larger U
     (2) bounds the mean, and G is a sum of independent terms in [0, 8] given the shifts, in which at least U_b is expected
     for every block b
Hence, for B <= q sqrt(2m) / 10 and |x| >= 10 B, F stays below 1.8 B^2 with probability below 0.01: by (5) as long as
|x| <= q sqrt(m) / 26, where U <= m/16 in any case; beyond, (2) is what is proved, and tests measure structured attacks.

Cost. Work on pieces that fit the cache, a few operations per element; 2 bits of the key stream per coordinate.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from mpc_fl.crypto.stream_cipher import Seed, Stream
from mpc_fl.errors import SAME_VERSION, ProtocolError

BUCKETS = 8192
SEED_BYTES = 32
_LEAST_BUCKETS, _MOST_BUCKETS = 1 << 8, 1 << 16
_RINGS = {torch.int32: np.int32, torch.int64: np.int64}
_BLOCKS_PER_WORD = 16  # a word holds two bits of one position in so many blocks
_SCRATCH = 1 << 18  # bytes of one working array


class SignHash:
    """The sketch that a public 32-byte `seed` defines for vectors of `parameters` elements, into `buckets` buckets.

    The same function for int32 (Z_2^32) and int64 (Z_2^64). The seed must be drawn after the vectors are fixed. Holds 2 bits
    per coordinate. Raises `ProtocolError` for a seed of another length, no parameters, or buckets that are not a power of two.
    """

    def __init__(self, seed: bytes, parameters: int, buckets: int = BUCKETS) -> None:
        if len(seed) != SEED_BYTES or parameters < 1:
            raise ProtocolError("a sketch needs a seed of 32 bytes and at least one parameter", SAME_VERSION)
        if not _LEAST_BUCKETS <= buckets <= _MOST_BUCKETS or buckets & (buckets - 1):
            raise ProtocolError(f"a sketch cannot have {buckets} buckets", "use a power of two, for example 8192")
        self.parameters, self.buckets = parameters, buckets
        self.block = buckets // 2
        public = Seed(seed)  # known to all: it hides nothing, and needs no more than to be unpredictable
        blocks = -(-parameters // self.block)
        self._shifts: list[int] = (public.stream("shifts").words(blocks, np.uint32) & (self.block - 1)).tolist()
        rows = -(-blocks // _BLOCKS_PER_WORD)
        # Bits 2 k and 2 k + 1 of word [r, p], from the top: sign and side of coordinate p of block 16 r + k.
        self._words = public.stream("signs and sides").words(rows * self.block, np.int32).reshape(rows, self.block)

    def accumulator(self, dtype: torch.dtype) -> FoldAccumulator:
        """An empty fold of int32 or int64 elements. Raises `ValueError` for another dtype."""
        return FoldAccumulator(self, dtype)

    def fold(self, elements: torch.Tensor) -> torch.Tensor:
        """The sketch of `elements` (int32 or int64, `parameters` of them), of the same dtype, shape (buckets,)."""
        accumulator = self.accumulator(elements.dtype)
        accumulator.add(elements, 0)
        return accumulator.folded()

    def fold_part(self, elements: torch.Tensor, start: int) -> torch.Tensor:
        """The sketch of a vector that is `elements` (int32 or int64, contiguous) from `start` on and zero elsewhere: (buckets,).

        The part may begin and end within a block, unlike those of an accumulator.
        """
        accumulator, block, stop = self.accumulator(elements.dtype), self.block, start + elements.numel()
        first = min(-(-start // block) * block, stop)
        last = stop if stop == self.parameters else max(first, stop // block * block)
        accumulator.add(elements[first - start : last - start], first if first < last else 0)
        for begin, end in ((start, first), (last, stop)):
            if begin < end:  # within one block, of which the rest is zero
                at = begin // block * block
                filled = torch.zeros(min(block, self.parameters - at), dtype=elements.dtype)
                filled[begin - at : end - at] = elements[begin - start : end - start]
                accumulator.add(filled, at)
        return accumulator.folded()

    def fold_masks(self, masks: Iterable[tuple[Stream, bool]], dtype: torch.dtype) -> torch.Tensor:
        """The sketch of a sum of key streams, each added (True) or subtracted, without ever holding one: (buckets,).

        The streams give the elements that `Stream.add_to` and `Stream.subtract_from` would combine with a tensor of
        `parameters` elements. They are expanded piece by piece through the cache and used up.
        """
        accumulator = self.accumulator(dtype)
        number, streams = _RINGS[dtype], list(masks)
        length = min(self.parameters, accumulator.rows * self.block)
        total, mask = np.empty(length, number), np.empty(length, number)
        for start in range(0, self.parameters if streams else 0, length):
            stop = min(start + length, self.parameters)
            piece, drawn = total[: stop - start], mask[: stop - start]
            for index, (stream, added) in enumerate(streams):
                into = drawn if index else piece
                stream.fill(into.view(np.uint8).data)
                if index:
                    (np.add if added else np.subtract)(piece, drawn, out=piece)
                elif not added:
                    np.negative(piece, out=piece)
            accumulator.add(torch.from_numpy(piece), start)
        return accumulator.folded()


class FoldAccumulator:
    """The sketch of a vector that comes in pieces, in any order, and of sums of such vectors: folding is linear.

    `rows` blocks at a time fit the cache.
    """

    def __init__(self, sign_hash: SignHash, dtype: torch.dtype) -> None:
        if dtype not in _RINGS:
            raise ValueError("sketches fold int32 or int64 elements")
        self._hash, self._dtype = sign_hash, dtype
        number, block = _RINGS[dtype], sign_hash.block
        self._bits = 8 * np.dtype(number).itemsize
        self.rows = max(1, min(_BLOCKS_PER_WORD, _SCRATCH // (block * np.dtype(number).itemsize)))
        self._masks, self._signed = (np.empty((self.rows, block), number) for _ in range(2))
        # What lies on either side, and of it what lies on side one; a shift runs over the end and is folded back.
        self._both, self._one = np.zeros(2 * block, number), np.zeros(2 * block, number)

    def add(self, piece: torch.Tensor, start: int) -> None:
        """Add elements `start` to `start + len(piece)` of a vector.

        Pieces are of the accumulator's dtype; they begin at a multiple of the block length and end at one or at the
        end of the vector. Raises `ValueError` otherwise.
        """
        block, parameters = self._hash.block, self._hash.parameters
        stop = start + piece.numel()
        if piece.dtype != self._dtype or not piece.is_contiguous():
            raise ValueError(f"this sketch folds contiguous {self._dtype} tensors")
        if not 0 <= start <= stop <= parameters or start % block or (stop % block and stop != parameters):
            raise ValueError("a piece must consist of whole blocks of the vector")
        elements = piece.detach().numpy().reshape(-1)
        whole = len(elements) // block
        first, row = start // block, 0
        while row < whole:
            number = first + row
            count = min(whole - row, self.rows - number % self.rows)
            self._fold(elements[row * block : (row + count) * block].reshape(count, block), number)
            row += count
        if len(elements) > whole * block:
            filled = np.zeros((1, block), elements.dtype)
            filled[0, : len(elements) - whole * block] = elements[whole * block :]
            self._fold(filled, first + whole)

    def _fold(self, blocks: np.ndarray, first: int) -> None:
        """Add whole blocks, whose signs and sides are in one row of words."""
        block, bits = self._hash.block, self._bits
        masks, signed = self._masks[: len(blocks)], self._signed[: len(blocks)]
        words = self._hash._words[first // _BLOCKS_PER_WORD].astype(masks.dtype, copy=False)
        at = first % _BLOCKS_PER_WORD
        # 1. The bit of the sign to the top, and from there to all bits: 0 or -1. (x ^ -1) + 1 = -x.
        places = (bits - 32 + 2 * np.arange(at, at + len(blocks), dtype=masks.dtype))[:, None]
        np.left_shift(words, places, out=masks)
        np.right_shift(masks, bits - 1, out=masks)
        np.bitwise_xor(blocks, masks, out=signed)
        np.subtract(signed, masks, out=signed)
        # 2. The bit of the side likewise: what is on side one, or 0.
        np.left_shift(words, places + masks.dtype.type(1), out=masks)
        np.right_shift(masks, bits - 1, out=masks)
        np.bitwise_and(masks, signed, out=masks)
        # 3. Shift and add.
        for row in range(len(blocks)):
            shift = self._hash._shifts[first + row]
            for buckets, values in ((self._both, signed), (self._one, masks)):
                place = buckets[shift : shift + block]
                np.add(place, values[row], out=place)

    def folded(self) -> torch.Tensor:
        """The sketch of all that was added, (buckets,): first side zero, then side one."""
        block = self._hash.block
        both, one = (buckets[:block] + buckets[block:] for buckets in (self._both, self._one))
        return torch.from_numpy(np.concatenate([both - one, one]))
