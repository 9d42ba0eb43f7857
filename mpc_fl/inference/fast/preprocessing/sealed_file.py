"""The sealed files of a pool (`crypto.sealed_file`). `pool` says what they hold and what their context is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mpc_fl.crypto import sealed_file
from mpc_fl.crypto.sealed_file import MAC_BYTES, SALT_BYTES, SEGMENT_BYTES, TAG_BYTES
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import BrokenSealError, PoolError
from mpc_fl.files import written_whole

__all__ = ["MAC_BYTES", "MAGIC", "SALT_BYTES", "SEGMENT_BYTES", "TAG_BYTES", "readable", "seal", "unseal"]

MAGIC = b"mpc-fl pool 1\n"


def seal(path: Path, key: Seed, context: bytes, tag: bytes, content: np.ndarray) -> None:
    """Write a sealed file, to the disk, whole or not at all. `content` is uint8 of any size, `tag` has `TAG_BYTES`."""
    with written_whole(path, durable=True) as temporary, temporary.open("wb") as file:
        sealed_file.seal(file, MAGIC, key, context, tag, content)


def unseal(path: Path, key: Seed, context: bytes) -> tuple[bytes, np.ndarray]:
    """Tag and content (uint8) of a sealed file. Raises `PoolError` when it is not what was sealed with this key and context."""
    try:
        with readable(path), path.open("rb") as file:
            return sealed_file.unseal(file, MAGIC, key, context)
    except BrokenSealError:
        raise PoolError(f"{path} was changed, cut off, or belongs to another pool", "remove it") from None


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Inside, an `OSError` is a `PoolError` that names the file."""
    try:
        yield
    except OSError as error:
        raise PoolError(f"cannot read {path}: {error.strerror}", "check the pool's directory") from None
