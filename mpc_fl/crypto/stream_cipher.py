"""The only source of randomness for shares, masks, triples and noise: a stream cipher keyed from the system.

A `Seed` is a secret key. `seed.stream(*label)` gives the key stream of one use; the label says which (session, round,
tensor, purpose). A label can be used once per seed, so no value is ever drawn twice; a second use raises, and so does
the use of a seed in a forked copy of its process. Two parties that hold the same seed and use the same label draw the
same values.

Key derivation is HMAC-SHA256 over an injective encoding of the label (HKDF-Expand, RFC 5869, for one block); the stream
is AES-256 in counter mode (SP 800-38A) from the `cryptography` package, with a fresh key and counter zero per label.
AES-128 is a sixth faster, but many labels under 128-bit keys and one counter are open to a multi-target search.

The cipher is faster than fresh memory: the kernel clears every page of a new tensor. So a mask that is only added to
something goes there piece by piece through the cache (`add_to`, `subtract_from`, `exclusive_or_into`).
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from mpc_fl.crypto.memory_layout import elements_overlap
from mpc_fl.errors import SecrecyError

Label = str | int
_CHUNK = 1 << 20  # bytes: large enough to hide the call, small enough for the second-level cache
_ZEROS = memoryview(bytes(_CHUNK))
_FROM_ZERO = modes.CTR(bytes(16))
_ACCUMULATED = (torch.int32, torch.int64)

# Counts the forks between the first process and this one: a forked copy would draw its parent's values again.
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)

if sys.byteorder != "little":  # shares are exchanged as little-endian words
    raise ImportError("mpc-fl needs a little-endian machine")


def _encode_label(label: Sequence[Label]) -> bytes:
    parts = []
    for part in label:
        kind, text = (b"i", str(part).encode()) if isinstance(part, int) else (b"s", part.encode())
        parts.append(kind + len(text).to_bytes(4, "little") + text)
    return b"".join(parts)


def _narrowest_word(bits: int) -> type[np.generic]:
    """The smallest word that holds `bits` bits: less key stream for the same elements."""
    for width, dtype in ((8, np.uint8), (16, np.uint16), (32, np.uint32)):
        if bits <= width:
            return dtype
    return np.int64


class Stream:
    """The key stream of one label. Values come in order; nothing can be rewound."""

    __slots__ = ("_encryptor", "_forks")

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES256(key), _FROM_ZERO).encryptor()
        self._forks = _forks

    def __repr__(self) -> str:
        return "Stream(secret)"

    def fill(self, buffer: memoryview) -> None:
        """Overwrite a writable byte buffer with key stream. Raises `SecrecyError` in a forked process."""
        _refuse_fork(self._forks)
        for start in range(0, len(buffer), _CHUNK):
            piece = buffer[start : start + _CHUNK]
            self._encryptor.update_into(_ZEROS[: len(piece)], piece)

    def words(self, count: int, dtype: type[np.generic]) -> np.ndarray:
        """`count` independent uniform words of an integer dtype, shape (count,)."""
        values = np.empty(count, dtype=dtype)
        if count:
            self.fill(values.view(np.uint8).data)
        return values

    def _pieces(self, count: int, dtype: type[np.generic]) -> Iterator[tuple[slice, np.ndarray]]:
        """`count` words in cache-sized pieces of one buffer: where each piece belongs, and its words until the next."""
        per_piece = _CHUNK // np.dtype(dtype).itemsize
        buffer = np.empty(min(count, per_piece), dtype=dtype)
        for start in range(0, count, per_piece):
            piece = buffer[: min(per_piece, count - start)]
            self.fill(piece.view(np.uint8).data)
            yield slice(start, start + len(piece)), piece

    def ring_elements(self, shape: Sequence[int], bits: int = 64) -> torch.Tensor:
        """Uniform elements of Z_2^bits as int64 (bits = 64: all values; below: 0 .. 2^bits - 1), bits in 1 .. 64."""
        if not 1 <= bits <= 64:
            raise ValueError("bits must lie in 1 .. 64")
        shape, count = tuple(shape), math.prod(shape)
        if bits == 64:
            return torch.from_numpy(self.words(count, np.int64).reshape(shape))
        values = np.empty(count, dtype=np.int64)
        word = _narrowest_word(bits)
        mask = np.array((1 << bits) - 1, dtype=word)
        for where, piece in self._pieces(count, word):
            np.bitwise_and(piece, mask, out=piece)
            values[where] = piece
        return torch.from_numpy(values.reshape(shape))

    def add_to(self, total: torch.Tensor) -> None:
        """Add a uniform ring element to each element of `total` in place (int64 or int32, any shape, also a view).

        The elements are those `ring_elements` (int64) or `words` (int32) would draw, in row order however `total` lies in
        memory; one that is not contiguous costs a copy. Raises `ValueError` for another dtype, or when elements of `total`
        lie in one place (`expand`): they would all get the last one's mask.
        """
        self._combine_into(total, np.add)

    def subtract_from(self, total: torch.Tensor) -> None:
        """Subtract a uniform ring element from each element of `total` in place; see `add_to`."""
        self._combine_into(total, np.subtract)

    def exclusive_or_into(self, total: torch.Tensor) -> None:
        """Exclusive or of each element of `total` and a uniform ring element, in place; see `add_to`."""
        self._combine_into(total, np.bitwise_xor)

    def _combine_into(self, total: torch.Tensor, operation: Callable[..., object]) -> None:
        if total.dtype not in _ACCUMULATED or elements_overlap(total):
            raise ValueError("masks go into int64 or int32 tensors only, each element in a place of its own")
        elements = total.detach().numpy()
        in_row_order = elements.reshape(-1)  # a view where the layout allows, else a copy
        for where, mask in self._pieces(elements.size, elements.dtype.type):
            operation(in_row_order[where], mask, out=in_row_order[where])
        if not np.may_share_memory(in_row_order, elements):
            elements[...] = in_row_order.reshape(elements.shape)

    def below(self, bound: int, count: int) -> np.ndarray:
        """`count` integers uniform in 0 .. bound-1 as int64, by rejection (no modulo bias)."""
        if not 1 <= bound <= 1 << 62:
            raise ValueError("bound must lie in 1 .. 2^62")
        mask = np.int64((1 << (bound - 1).bit_length()) - 1)
        kept: list[np.ndarray] = []
        missing = count
        while missing > 0:
            candidates = self.words(2 * missing + 8, np.int64) & mask
            accepted = candidates[candidates < bound][:missing]
            kept.append(accepted)
            missing -= len(accepted)
        return np.concatenate(kept) if kept else np.empty(0, dtype=np.int64)

    def uniform(self, count: int) -> np.ndarray:
        """`count` float64 values uniform on the grid of 2^-53 in (0, 1]."""
        words = self.words(count, np.uint64) >> np.uint64(11)
        return (words.astype(np.float64) + 1.0) * 2.0**-53

    def gaussian(self, shape: Sequence[int]) -> torch.Tensor:
        """Independent standard normal float64 values (Box-Muller on 53-bit uniforms)."""
        count = math.prod(shape)
        half = (count + 1) // 2
        result = np.empty((2, half), dtype=np.float64)
        for start in range(0, half, 1 << 16):  # stay inside the cache
            stop = min(half, start + (1 << 16))
            radius = np.sqrt(-2.0 * np.log(self.uniform(stop - start)))
            angle = 2.0 * np.pi * self.uniform(stop - start)
            np.multiply(radius, np.cos(angle), out=result[0, start:stop])
            np.multiply(radius, np.sin(angle), out=result[1, start:stop])
        return torch.from_numpy(result.reshape(-1)[:count]).reshape(tuple(shape))


def _refuse_fork(forks: int) -> None:
    if forks != _forks:
        raise SecrecyError("a seed was used in a forked process, which would draw its parent's values again")


class Seed:
    """A 256-bit secret key from which labelled streams and child seeds are derived.

    Printing a seed shows nothing; pickling, copying, and using it in a forked process are errors; `stream` and
    `derive` refuse a label they have seen, also from another thread. A process that starts again must make its seeds
    anew, from the system or by a key exchange, and never keep one on disk (`fast.pool` keeps chains of keys instead).
    """

    __slots__ = ("_forks", "_key", "_lock", "_used")

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError("a seed has 32 bytes")
        self._key = key
        self._used: set[bytes] = set()
        self._lock = threading.Lock()
        self._forks = _forks

    @classmethod
    def from_system(cls) -> Seed:
        """A fresh seed from the operating system's generator."""
        return cls(secrets.token_bytes(32))

    def __repr__(self) -> str:
        return "Seed(secret)"

    def __reduce__(self) -> str:
        raise SecrecyError("a seed cannot be pickled")

    def _once(self, purpose: bytes, label: Sequence[Label]) -> bytes:
        _refuse_fork(self._forks)
        encoded = purpose + _encode_label(label)
        mark = hashlib.sha256(encoded).digest()[:16]
        with self._lock:
            if mark in self._used:
                raise SecrecyError(f"the random label {label!r} was used twice")
            self._used.add(mark)
        return hmac.new(self._key, encoded + b"\x01", hashlib.sha256).digest()

    def stream(self, *label: Label) -> Stream:
        """The key stream of this label. Raises `SecrecyError` if the label was used before."""
        return Stream(self._once(b"mpc-fl stream", label))

    def derive(self, *label: Label) -> Seed:
        """A child seed, independent of all streams and of other children. Raises `SecrecyError` on a second use."""
        return Seed(self._once(b"mpc-fl seed", label))

    def again(self) -> Seed:
        """The same seed as new, to compute with a mask that was drawn before. Never to mask anything with it again."""
        return Seed(self._key)

    def reveal_for_transport(self) -> bytes:
        """The raw key, for the one message that hands this seed to another party over an encrypted link."""
        return self._key
