"""Files that only the holder of a key can read, and that nobody can change, exchange or cut off unnoticed.

AES-256-GCM in segments of 4 MiB, nonces a counter and a mark of the last one (STREAM: Hoang, Reyhanitabar, Rogaway, Vizar, CRYPTO
2015), a fresh salt and so a key of its own for each file. In the clear: a mark of the format, the salt, and a public tag; they
and the caller's `context` are authenticated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import BrokenSealError

TAG_BYTES = 16
SALT_BYTES = 16
SEGMENT_BYTES = 1 << 22
MAC_BYTES = 16  # what sealing adds to a segment


def _segments(size: int) -> Iterator[tuple[slice, bytes]]:
    """Where each segment of a content lies, and its nonce."""
    count = max(1, -(-size // SEGMENT_BYTES))
    for index in range(count):
        last = index == count - 1
        yield (
            slice(index * SEGMENT_BYTES, min(size, (index + 1) * SEGMENT_BYTES)),
            index.to_bytes(11, "little") + bytes([last]),
        )


def _file_key(key: Seed, salt: bytes) -> AESGCM:
    return AESGCM(key.derive("file", salt.hex()).reveal_for_transport())


def sealed_size(magic: bytes, size: int) -> int:
    """Bytes of the file that a content of `size` bytes makes."""
    return len(magic) + SALT_BYTES + TAG_BYTES + size + MAC_BYTES * max(1, -(-size // SEGMENT_BYTES))


def seal(file: BinaryIO, magic: bytes, key: Seed, context: bytes, tag: bytes, content: np.ndarray) -> None:
    """Write a content, uint8 of any size, to an open file. `magic` marks its kind, `tag` is public and has `TAG_BYTES`."""
    salt = os.urandom(SALT_BYTES)
    header = magic + salt + tag
    cipher, buffer = _file_key(key, salt), np.ascontiguousarray(content).view(np.uint8).data
    file.write(header)
    for piece, nonce in _segments(len(buffer)):
        file.write(cipher.encrypt(nonce, buffer[piece], header + context))


def unseal(file: BinaryIO, magic: bytes, key: Seed, context: bytes) -> tuple[bytes, np.ndarray]:
    """Tag and content (uint8) of an open file. Raises `BrokenSealError` when it was not sealed with this key and context."""
    size = os.fstat(file.fileno()).st_size - len(magic) - SALT_BYTES - TAG_BYTES
    segments = max(1, -(-size // (SEGMENT_BYTES + MAC_BYTES)))
    size -= segments * MAC_BYTES
    header = file.read(len(magic) + SALT_BYTES + TAG_BYTES)
    if size < 0 or not header.startswith(magic):
        raise BrokenSealError("it is no sealed file of this kind, or was cut off")
    salt, tag = header[len(magic) : -TAG_BYTES], header[-TAG_BYTES:]
    cipher, content = _file_key(key, salt), np.empty(size, dtype=np.uint8)
    try:
        for piece, nonce in _segments(size):
            sealed = file.read(piece.stop - piece.start + MAC_BYTES)
            opened = cipher.decrypt(nonce, sealed, header + context)
            content[piece] = np.frombuffer(opened, dtype=np.uint8)
    except (InvalidTag, ValueError):
        raise BrokenSealError("it was changed, cut off, or sealed for something else") from None
    return tag, content
