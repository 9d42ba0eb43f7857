"""A party's own file of receipts, on its disk: `receipts.jsonl`, which only grows, mode 0600.

A line is on the disk when `ReceiptFile.keep` returns, and only then does the session go on. A last line that a crash cut off is
removed when the next one is kept: the session that it belonged to has ended, and its receipt is with the other side. Threads and
processes of one party may share a file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from mpc_fl.audit.receipts import (
    LONGEST_LINE,
    NOTHING,
    RECEIPTS_FILE,
    DealerCount,
    Entry,
    Receipt,
    entry_from,
    fingerprint_of,
)
from mpc_fl.crypto.certificates import ROOT_FILE, UNSOUND, Identity
from mpc_fl.errors import MpcFlError
from mpc_fl.exhaustion import unwritable
from mpc_fl.files import to_disk, written_whole


class ReceiptFile:
    """The file in `directory` of the party that `identity` names; the authority's certificate is put beside it.

    Raises `MpcFlError` when a file is there whose lines do not follow each other, or another party's.
    """

    def __init__(self, directory: Path, identity: Identity) -> None:
        self.path, self._identity, self._guard = directory / RECEIPTS_FILE, identity, threading.Lock()
        self._introduced: set[str] = set()
        directory.mkdir(parents=True, exist_ok=True)
        root = directory / ROOT_FILE
        if not root.exists():
            with written_whole(root) as temporary:
                temporary.write_bytes(identity.authority)
        previous = NOTHING
        for number, line in enumerate(self._lines(), 1):
            try:
                entry = entry_from(line)
                self._introduced |= {fingerprint_of(text.encode("ascii")) for text in entry.certificates.values()}
            except UNSOUND:
                raise self._changed(number) from None
            if entry.previous != previous or entry.keeper != identity.name:
                raise self._changed(number)
            previous = hashlib.sha256(line + b"\n").hexdigest()

    def _changed(self, number: int) -> MpcFlError:
        return MpcFlError(
            f"line {number} of {self.path} is damaged or was edited",
            "see what with: mpc-fl ledger verify; keep it elsewhere",
        )

    def _lines(self) -> list[bytes]:
        try:
            return self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        except OSError as error:
            raise MpcFlError(f"cannot read {self.path}: {error.strerror}", "check the path") from None

    def keep(
        self,
        receipt: Receipt | None,
        count: DealerCount | None,
        signatures: Mapping[str, str],
        certificates: Mapping[str, bytes],
    ) -> None:
        """Append one line, on the disk when this returns: `certificates`, PEM, are those of all who signed it.

        Raises `MpcFlError` when it cannot be written, `IdentityError` when the identity holds no usable key.
        """
        with self._guard:
            new = {name: text for name, text in certificates.items() if fingerprint_of(text) not in self._introduced}
            introduced = {name: text.decode("ascii") for name, text in new.items()}
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
                with os.fdopen(descriptor, "r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                    end, previous = _last(file.seek(0, os.SEEK_END), descriptor)
                    entry = Entry(self._identity.name, receipt, count, dict(signatures), introduced, previous)
                    file.seek(end)
                    file.truncate()
                    file.write(entry.sealed(self._identity).encoded())
                    to_disk(file)
            except OSError as error:
                raise unwritable(self.path, error) from None
            self._introduced |= {fingerprint_of(text) for text in new.values()}


def _last(size: int, descriptor: int) -> tuple[int, str]:
    """Where the last whole line ends, and its digest; what a crash cut off comes after it."""
    start = max(0, size - 2 * LONGEST_LINE)
    tail = os.pread(descriptor, size - start, start)
    end = tail.rfind(b"\n") + 1
    if end == 0:
        return 0, NOTHING
    begin = tail.rfind(b"\n", 0, end - 1) + 1
    return start + end, hashlib.sha256(tail[begin:end]).hexdigest()
