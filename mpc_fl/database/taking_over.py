"""A file that an earlier version kept is taken over into a database, once.

What it holds is committed, and so is a note of its digest; then the file gets another name, and under its own name a line is
left that no earlier version reads: one that were started again would begin with nothing used. A crash in between, or another
process at the same time, adds nothing twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mpc_fl.database.chained_rows import ChainedRows
from mpc_fl.database.database import Database, Transaction
from mpc_fl.database.schema import ChainedTable
from mpc_fl.errors import StorageError
from mpc_fl.files import written_whole

TAKEN_OVER = ChainedTable("taken_over", (("file", str), ("sha256", str)))
SUFFIX = ".taken-over-"  # of the file's new name, and the first digits of its digest

_MARK = '{"moved to": '
_PATIENCE, _LOOK = 2.0, 0.05  # seconds that an earlier version's lock is waited for, and between looks


def earlier_content(path: Path) -> bytes | None:
    """What the file holds that an earlier version kept at `path`; None where there is none, or it was taken over.

    Raises `StorageError` when it cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from None
    return None if content.startswith(_MARK.encode()) else content


def take_over(database: Database, path: Path, enter: Callable[[Transaction, bytes], None]) -> None:
    """Have `enter` add what the file at `path` holds, if it is there and was not taken over.

    Raises what `enter` raises, and `StorageError` when the file cannot be read or renamed, or when a process of the earlier
    version keeps `path`.lock; then nothing was added.
    """
    if earlier_content(path) is None:
        return
    taken = ChainedRows(database, TAKEN_OVER)
    with database.writing() as transaction, _locked(path):
        content = earlier_content(path)
        if content is None:
            return  # another process came first
        digest = hashlib.sha256(content).hexdigest()
        if (path.name, digest) not in [row.values for row in taken.read(transaction)]:
            enter(transaction, content)
            taken.append(transaction, path.name, digest)
    try:
        with contextlib.suppress(FileExistsError):  # a crash came between the two
            os.link(path, path.with_name(path.name + SUFFIX + digest[:8]))
    except OSError as error:
        raise StorageError(f"{path} cannot get another name: {error.strerror}", "check the directory") from None
    with written_whole(path, durable=True) as temporary:
        temporary.write_text(f"{_MARK}{json.dumps(database.path.name)}}}\n", encoding="utf-8")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """As earlier versions locked the file while they wrote it, or for as long as they served."""
    deadline = time.monotonic() + _PATIENCE
    try:
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StorageError(
                            f"a process of an earlier version uses {path}", "end it, or choose another directory"
                        ) from None
                    time.sleep(_LOOK)
            yield
    except OSError as error:
        raise StorageError(f"{path}.lock cannot be used: {error.strerror}", "check the directory") from None
