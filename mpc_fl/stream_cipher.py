"""The only source of randomness for shares, masks, triples and noise: a stream cipher keyed from the system.

A `Seed` is a secret key. `seed.stream(*label)` gives the key stream of one use; the label says which (session, round,
tensor, purpose). A label can be used once per seed, so no value is ever drawn twice; a second use raises. Two parties
that hold the same seed and use the same label draw the same values.

Key derivation is HMAC-SHA256 over an injective encoding of the label (HKDF-Expand, RFC 5869, for one block); the stream
is AES-256 in counter mode (SP 800-38A) from the `cryptography` package, with a fresh key and counter zero per label.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import sys
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from mpc_fl.errors import SecrecyError

Label = str | int
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)

if sys.byteorder != "little":  # shares are exchanged as little-endian words
    raise ImportError("mpc-fl needs a little-endian machine")


def _encode_label(label: Sequence[Label]) -> bytes:
    parts = []
    for part in label:
        kind, text = (b"i", str(part).encode()) if isinstance(part, int) else (b"s", part.encode())
        parts.append(kind + len(text).to_bytes(4, "little") + text)
    return b"".join(parts)


class Stream:
    """The key stream of one label. Values come in order; nothing can be rewound."""

    __slots__ = ("_encryptor",)

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def __repr__(self) -> str:
        return "Stream(secret)"

    def fill(self, buffer: memoryview) -> None:
        """Overwrite a writable byte buffer with key stream."""
        for start in range(0, len(buffer), _CHUNK):
            piece = buffer[start : start + _CHUNK]
            self._encryptor.update_into(_ZEROS[: len(piece)] if len(piece) < _CHUNK else _ZEROS, piece)

    def words(self, count: int, dtype: type[np.generic]) -> np.ndarray:
        """`count` independent uniform words of an integer dtype, shape (count,)."""
        values = np.empty(count, dtype=dtype)
        if count:
            self.fill(values.view(np.uint8).data)
        return values

    def ring_elements(self, shape: Sequence[int], bits: int = 64) -> torch.Tensor:
        """Uniform elements of Z_2^bits as int64 (bits = 64: all values; below: 0 .. 2^bits - 1)."""
        values = torch.from_numpy(self.words(math.prod(shape), np.int64)).reshape(tuple(shape))
        if bits < 64:
            values &= (1 << bits) - 1
        return values

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


class Seed:
    """A 256-bit secret key from which labelled streams and child seeds are derived.

    Comparing, printing or pickling a seed is an error; `stream` and `derive` refuse a label they have seen.
    """

    __slots__ = ("_key", "_used")

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError("a seed has 32 bytes")
        self._key = key
        self._used: set[bytes] = set()

    @classmethod
    def from_system(cls) -> Seed:
        """A fresh seed from the operating system's generator."""
        return cls(secrets.token_bytes(32))

    def __repr__(self) -> str:
        return "Seed(secret)"

    def __reduce__(self) -> str:
        raise SecrecyError("a seed cannot be pickled")

    def _once(self, purpose: bytes, label: Sequence[Label]) -> bytes:
        encoded = purpose + _encode_label(label)
        mark = hashlib.sha256(encoded).digest()[:16]
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

    def reveal_for_transport(self) -> bytes:
        """The raw key, for the one message that hands this seed to another party over an encrypted link."""
        return self._key
