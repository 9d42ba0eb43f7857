"""sealed_file"""

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


_MAGIC = b"mpc-fl pool 1\n"


_SALT_BYTES = 16


_SEGMENT = 1 << 22


_MAC_BYTES = 16


def _segments(size: int) -> Iterator[tuple[slice, bytes]]:
    """Where each segment of a content lies, and its nonce."""
    count = max(1, -(-size // _SEGMENT))
    for index in range(count):
        last = index == count - 1
        yield slice(index * _SEGMENT, min(size, (index + 1) * _SEGMENT)), index.to_bytes(11, "little") + bytes([last])


def _file_key(key: Seed, salt: bytes) -> AESGCM:
    return AESGCM(key.derive("file", salt.hex()).reveal_for_transport())


def _seal(path: Path, key: Seed, context: bytes, tag: bytes, content: np.ndarray) -> None:
    """Write a sealed file, to the disk, whole or not at all."""
    salt = os.urandom(_SALT_BYTES)
    header = _MAGIC + salt + tag
    cipher, buffer = _file_key(key, salt), np.ascontiguousarray(content).view(np.uint8).data
    with written_whole(path, 0o600, durable=True) as temporary, temporary.open("wb") as file:
        file.write(header)
        for piece, nonce in _segments(len(buffer)):
            file.write(cipher.encrypt(nonce, buffer[piece], header + context))


def _unseal(path: Path, key: Seed, context: bytes) -> tuple[bytes, np.ndarray]:
    """Tag and content of a sealed file."""
    with _readable(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - len(_MAGIC) - _SALT_BYTES - TAG_BYTES
        segments = max(1, -(-size // (_SEGMENT + _MAC_BYTES)))
        size -= segments * _MAC_BYTES
        header = file.read(len(_MAGIC) + _SALT_BYTES + TAG_BYTES)
        if size < 0 or not header.startswith(_MAGIC):
            raise PoolError(f"{path} is no file of a pool, or was cut off", "remove it")
        salt, tag = header[len(_MAGIC) : -TAG_BYTES], header[-TAG_BYTES:]
        cipher, content = _file_key(key, salt), np.empty(size, dtype=np.uint8)
        try:
            for piece, nonce in _segments(size):
                sealed = file.read(piece.stop - piece.start + _MAC_BYTES)
                opened = cipher.decrypt(nonce, sealed, header + context)
                content[piece] = np.frombuffer(opened, dtype=np.uint8)
        except (InvalidTag, ValueError):
            raise PoolError(f"{path} was changed, cut off, or belongs to another pool", "remove it") from None
    return tag, content


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PoolError(f"cannot read {path}: {error.strerror}", "check the pool's directory") from None
