"""A party's own file of receipts, on its disk: `receipts.jsonl`, which only grows, mode 0600.

A line is on the disk when `ReceiptFile.keep` returns, and only then does the session go on. A last line that a crash cut off is
removed when the next one is kept: the session that it belonged to has ended, and its receipt is with the other side. Threads and
processes of one party may share a file. A session is kept once under its name, which a hospital chooses: two of one name would look
like one that was edited.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from mpc_fl.audit.receipts import (
    NOTHING,
    RECEIPTS_FILE,
    DealerCount,
    Entry,
    Receipt,
    entry_from,
    fingerprint_of,
)
from mpc_fl.crypto.certificates import ROOT_FILE, UNSOUND, Identity
from mpc_fl.errors import MpcFlError, ProtocolError
from mpc_fl.exhaustion import unwritable
from mpc_fl.files import to_disk, written_whole


class ReceiptFile:
    """The file in `directory` of the party that `identity` names; the authority's certificate is put beside it.

    Raises `MpcFlError` when a file is there whose lines do not follow each other, or another party's.
    """

    def __init__(self, directory: Path, identity: Identity) -> None:
        self.path, self._identity, self._guard = directory / RECEIPTS_FILE, identity, threading.Lock()
        self._begin()
        directory.mkdir(parents=True, exist_ok=True)
        root = directory / ROOT_FILE
        if not root.exists():
            with written_whole(root) as temporary:
                temporary.write_bytes(identity.authority)
        try:
            if self.path.exists():
                with self.path.open("rb") as file:
                    self._read_on(file)
        except OSError as error:
            raise MpcFlError(f"cannot read {self.path}: {error.strerror}", "check the path") from None

    def _begin(self) -> None:
        """Nothing is read yet."""
        self._end, self._number, self._previous = 0, 0, NOTHING
        self._introduced: set[str] = set()
        self._receipts: dict[str, str] = {}  # of each session the digest of its last receipt
        self._counted: dict[str, int] = {}  # and the batches that the dealer had counted, in lines of its own

    def _read_on(self, file: BinaryIO) -> None:
        """The whole lines that this object does not know: all at first, later those of other processes."""
        if file.seek(0, os.SEEK_END) < self._end:  # somebody put another file in its place
            self._begin()
        file.seek(self._end)
        for line in file.read().split(b"\n")[:-1]:
            self._number += 1
            try:
                entry = entry_from(line)
                self._introduced |= {fingerprint_of(text.encode("ascii")) for text in entry.certificates.values()}
            except UNSOUND:
                raise self._changed(self._number) from None
            if entry.previous != self._previous or entry.keeper != self._identity.name:
                raise self._changed(self._number)
            self._went_on(entry, line + b"\n")

    def _went_on(self, entry: Entry, line: bytes) -> None:
        if entry.receipt is not None:
            self._receipts[entry.receipt.session] = entry.receipt.digest()
        elif entry.count is not None:
            self._counted[entry.count.session] = entry.count.batches
        self._end, self._previous = self._end + len(line), hashlib.sha256(line).hexdigest()

    def _require_next(self, receipt: Receipt | None, count: DealerCount | None) -> None:
        """Raise `ProtocolError` for what does not follow its session here: its name was used before, by whoever chose it."""
        if receipt is not None:
            session, follows = receipt.session, receipt.previous == self._receipts.get(receipt.session, NOTHING)
        else:
            assert count is not None
            session, follows = count.session, count.batches == self._counted.get(count.session, 0) + 1
        if not follows:
            hospital = session.partition("/")[0]
            raise ProtocolError(
                f"{hospital} began a session under a name that was used before ({session})", "begin another session"
            )

    def _changed(self, number: int) -> MpcFlError:
        return MpcFlError(
            f"line {number} of {self.path} is damaged or was edited",
            "see what with: mpc-fl ledger verify; keep it elsewhere",
        )

    def keep(
        self,
        receipt: Receipt | None,
        count: DealerCount | None,
        signatures: Mapping[str, str],
        certificates: Mapping[str, bytes],
    ) -> None:
        """Append one line, on the disk when this returns: `certificates`, PEM, are those of all who signed it.

        Raises `MpcFlError` when it cannot be written, `IdentityError` when the identity holds no usable key,
        `ProtocolError` when the file holds another session of this name.
        """
        with self._guard:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
                with os.fdopen(descriptor, "r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                    self._read_on(file)
                    self._require_next(receipt, count)
                    new = {name: text for name, text in certificates.items() if self._is_new(text)}
                    introduced = {name: text.decode("ascii") for name, text in new.items()}
                    entry = Entry(self._identity.name, receipt, count, dict(signatures), introduced, self._previous)
                    entry = entry.sealed(self._identity)
                    file.seek(self._end)
                    file.truncate()
                    file.write(entry.encoded())
                    to_disk(file)
            except OSError as error:
                raise unwritable(self.path, error) from None
            self._number += 1
            self._introduced |= {fingerprint_of(text) for text in new.values()}
            self._went_on(entry, entry.encoded())

    def _is_new(self, certificate_pem: bytes) -> bool:
        return fingerprint_of(certificate_pem) not in self._introduced
