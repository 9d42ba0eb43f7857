"""Files that only the holder of a key can read, and that nobody can change, exchange or cut off unnoticed.

AES-256-GCM in segments of 4 MiB, nonces a counter and a mark of the last one (STREAM: Hoang, Reyhanitabar, Rogaway, Vizar, CRYPTO
2015), a fresh salt and so a key of its own for each file. In the clear: a mark of the format, the salt, and a public tag; they
and the caller's `context` are authenticated. `pool` says what its files hold and what their context is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import PoolError
from mpc_fl.files import written_whole

TAG_BYTES = 16
MAGIC = b"mpc-fl pool 1\n"
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


def seal(path: Path, key: Seed, context: bytes, tag: bytes, content: np.ndarray) -> None:
    """Write a sealed file, to the disk, whole or not at all. `content` is uint8 of any size, `tag` has `TAG_BYTES`."""
    salt = os.urandom(SALT_BYTES)
    header = MAGIC + salt + tag
    cipher, buffer = _file_key(key, salt), np.ascontiguousarray(content).view(np.uint8).data
    with written_whole(path, durable=True) as temporary, temporary.open("wb") as file:
        file.write(header)
        for piece, nonce in _segments(len(buffer)):
            file.write(cipher.encrypt(nonce, buffer[piece], header + context))


def unseal(path: Path, key: Seed, context: bytes) -> tuple[bytes, np.ndarray]:
    """Tag and content (uint8) of a sealed file. Raises `PoolError` when it is not what was sealed with this key and context."""
    with readable(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - len(MAGIC) - SALT_BYTES - TAG_BYTES
        segments = max(1, -(-size // (SEGMENT_BYTES + MAC_BYTES)))
        size -= segments * MAC_BYTES
        header = file.read(len(MAGIC) + SALT_BYTES + TAG_BYTES)
        if size < 0 or not header.startswith(MAGIC):
            raise PoolError(f"{path} is no file of a pool, or was cut off", "remove it")
        salt, tag = header[len(MAGIC) : -TAG_BYTES], header[-TAG_BYTES:]
        cipher, content = _file_key(key, salt), np.empty(size, dtype=np.uint8)
        try:
            for piece, nonce in _segments(size):
                sealed = file.read(piece.stop - piece.start + MAC_BYTES)
                opened = cipher.decrypt(nonce, sealed, header + context)
                content[piece] = np.frombuffer(opened, dtype=np.uint8)
        except (InvalidTag, ValueError):
            raise PoolError(f"{path} was changed, cut off, or belongs to another pool", "remove it") from None
    return tag, content


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Inside, an `OSError` is a `PoolError` that names the file."""
    try:
        yield
    except OSError as error:
        raise PoolError(f"cannot read {path}: {error.strerror}", "check the pool's directory") from None
