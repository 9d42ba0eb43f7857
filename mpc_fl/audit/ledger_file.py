"""A party's own copy of the reveal ledger, on its disk.

Two files only grow. `openings.jsonl` gets an opening before a share of it leaves; `reveal_ledger.jsonl` gets a block
when all its parties have signed it. Both are on the disk when the call returns. A party that is killed at any moment finds
there what it has recorded and not yet signed. A last line that a crash cut off is removed when the ledger is opened again:
such an opening was never followed by a share, and such a block is with the leader (`co_signing`).

A third, `unconfirmed_block.json`, holds the block that this party has signed and not yet seen signed by all, from before its
signature leaves. Who is killed in between can show why its copy lacks a block that bears its signature (`ledger_audit`).

An opening that this party recorded is never dropped. It is signed, or it stays pending; a block that does neither is
refused (`RevealLedger.add`), whoever signed it. `co_signing` says why no honest run comes to that.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from cryptography import x509

from mpc_fl.audit.ledger_audit import Finding, check_openings, extend, parse_line, read_ledger
from mpc_fl.audit.ledger_versions import VERSION
from mpc_fl.audit.opening_record import OPENINGS_FILE, Opening
from mpc_fl.audit.reveal_ledger import (
    LEDGER_FILE,
    UNCONFIRMED_FILE,
    Block,
    Chain,
    ChainedOpening,
    Members,
    chain_opening,
    encode_block,
    moment_of,
    opening_from,
    to_json,
)
from mpc_fl.crypto.certificates import CLOCK_SKEW, Identity, load_root
from mpc_fl.crypto.memory_layout import bytes_of
from mpc_fl.errors import MpcFlError, ProtocolError
from mpc_fl.exhaustion import unwritable
from mpc_fl.files import to_disk
from mpc_fl.parsing import parse_json

log = logging.getLogger(__name__)

EARLIER_FILE = "earlier_authorities.crt"  # beside the ledger of a run that goes on under another authority


class RevealLedger:
    """One party's ledger: `blocks` signed by all, and `pending`, the openings recorded since the last of them."""

    def __init__(self, directory: Path, identity: Identity) -> None:
        """Open the ledger in a party's directory, or start one.

        Raises `MpcFlError` when the one there, or what this party recorded besides, was changed or is of another version.
        """
        self.identity = identity
        self.authority = load_root(identity.authority, "the authority's certificate")
        self.path, self.openings_path = directory / LEDGER_FILE, directory / OPENINGS_FILE
        self._unconfirmed_path = directory / UNCONFIRMED_FILE
        directory.mkdir(parents=True, exist_ok=True)
        self.earlier = earlier_authorities(directory)
        reading = read_ledger(_whole_lines(self.path), self.authority, self.earlier)
        if reading.findings and reading.lines:
            raise MpcFlError(
                f"the reveal ledger {self.path} was changed: {reading.findings[0].line}", "restore it from a backup"
            )
        if reading.chain.version not in (None, VERSION):
            raise MpcFlError(
                f"{self.path} is a reveal ledger of version {reading.chain.version}, which cannot be continued",
                "start the run anew in another directory; `mpc-fl ledger verify` still checks this one",
            )
        self.chain = reading.chain
        self.blocks = [block for block in reading.blocks if block is not None]
        self.pending = self._recalled()

    def _recalled(self) -> list[ChainedOpening]:
        """What this party recorded and no block holds yet. Raises `MpcFlError` when it does not follow the blocks."""
        signed = {opening.digest for block in self.blocks for opening in block.openings}
        recorded = [self._recorded(line) for line in _whole_lines(self.openings_path).splitlines()]
        pending = [opening for opening in recorded if opening.digest not in signed]
        findings = _following(self.chain, pending)
        if findings:
            raise MpcFlError(
                f"{self.openings_path} does not fit the reveal ledger: {findings[0].line}", "restore both from a backup"
            )
        return pending

    def _recorded(self, line: bytes) -> ChainedOpening:
        try:
            fields = parse_json(line)
            opening = opening_from({name: fields[name] for name in ChainedOpening.__dataclass_fields__})
        except (ValueError, TypeError, KeyError):
            raise MpcFlError(
                f"{self.openings_path} is damaged or of another version", "restore it, or choose another directory"
            ) from None
        if opening.computed_digest() != opening.digest:
            raise MpcFlError(f"opening {opening.number} in {self.openings_path} was edited", "restore it from a backup")
        return opening

    def signed_before(self) -> tuple[str, ...]:
        """The parties of a block that this party has signed and not kept; nobody where there is none.

        To be asked when it starts: it does not know whether that block became complete, and what it said about it. For a file that
        cannot be read, which may stand where another block was, this party itself is named.
        """
        content = _whole_lines(self._unconfirmed_path) if self._unconfirmed_path.exists() else b""
        if not content and not self._unconfirmed_path.exists():
            return ()
        try:
            block = parse_line(content.removesuffix(b"\n"))
        except ValueError:
            return (self.identity.name,)
        return block.parties if block.number >= self.chain.blocks else ()

    def continues(self, openings: Sequence[ChainedOpening]) -> bool:
        """Whether these openings, not signed yet, follow the signed ones."""
        return not _following(self.chain, openings)

    def append(self, opening: Opening) -> ChainedOpening:
        """Record an opening; it is on the disk when this returns, and only then may a share of it leave.

        All parties of the opening describe it alike. Raises `ProtocolError` before the ledger has begun
        (`co_signing.CoSigners.begin`) and for text that cannot be printed.
        """
        if not self.blocks:
            raise ProtocolError("an opening came before the reveal ledger began", "this is a defect of the program")
        try:
            recorded = chain_opening(self.chain, self.pending, opening)
        except ValueError:
            raise ProtocolError("an opening cannot be described", "this is a defect of the program") from None
        self._record(recorded)
        return recorded

    def adopt(self, openings: Sequence[ChainedOpening]) -> None:
        """Record also what only other parties began, so that this one signs nothing that it did not write down.

        `openings` begin with the pending ones. Raises `ProtocolError` when they do not, or do not follow the signed ones.
        """
        mine = len(self.pending)
        if list(openings[:mine]) != self.pending or not self.continues(openings):
            raise ProtocolError("openings to settle do not continue the reveal ledger", "compare the reveal ledgers")
        for opening in openings[mine:]:
            log.warning("opening %d (%s) was begun by other parties and not here", opening.number, opening.why)
            self._record(opening)

    def _record(self, opening: ChainedOpening) -> None:
        line = {"time": round(now().timestamp(), 3), "party": self.identity.name, **to_json(opening)}
        _append(self.openings_path, json.dumps(line, allow_nan=False).encode() + b"\n")
        self.pending.append(opening)

    def draft(
        self,
        kind: str,
        about: str,
        parties: Sequence[str],
        values: Mapping[str, str] | None = None,
        members: Members | None = None,
    ) -> Block:
        """The next block without signatures, from what this party recorded itself. One with members holds no openings."""
        openings = () if members else tuple(self.pending)
        number, seal = self.chain.blocks, self.chain.seal
        return Block(number, kind, about, tuple(parties), openings, dict(values or {}), members, seal)

    def keep_unconfirmed(self, block: Block) -> None:
        """Write down a block that only this party has signed yet; it is on the disk when this returns, and only then may its
        signature leave. Raises `MpcFlError` when it cannot be written."""
        try:
            # A crash in the middle leaves what is no block, and nothing has left: it need not be whole or nothing.
            with self._unconfirmed_path.open("wb") as file:
                file.write(encode_block(block))
                to_disk(file)
        except OSError as error:
            raise unwritable(self._unconfirmed_path, error) from None

    def add(self, block: Block, sender: str = "somebody") -> None:
        """Check a signed block, which came from `sender`, and keep it.

        Raises `ProtocolError` when it does not continue this ledger, does not count (`ledger_audit.shortfalls`), is not
        signed by all its parties, or leaves out an opening that this party began: one that is neither in it nor can be in
        a later block.
        """
        chain, findings = extend(self.chain, block, self.authority, self.earlier)
        early = [item for item in block.signatures if moment_of(item) > now() + CLOCK_SKEW]
        if findings or early:
            what = findings[0].line if findings else f"the clock of {early[0].party} is ahead, {early[0].time}"
            raise ProtocolError(
                f"a block of the reveal ledger from {sender} was refused: {what}", "compare the reveal ledgers"
            )
        signed = {opening.digest for opening in block.openings}
        pending = [opening for opening in self.pending if opening.digest not in signed]
        if pending and (chain.ended or _following(chain, pending)):
            left_out = pending[0]
            raise ProtocolError(
                f"block {block.number} of the reveal ledger from {sender} leaves out opening {left_out.number}, which this "
                f"party began ({left_out.why})",
                f"nothing more is opened; compare {OPENINGS_FILE} at the parties",
            )
        _append(self.path, encode_block(block))
        self.chain, self.pending = chain, pending
        self.blocks.append(block)
        self._unconfirmed_path.unlink(missing_ok=True)

    def begun_among(self, why: str) -> tuple[str, ...] | None:
        """Among whom the first opening for this reason was, signed or not; `None` where there was none."""
        for opening in [*(opening for block in self.blocks for opening in block.openings), *self.pending]:
            if opening.why == why:
                return opening.among
        return None

    def signed_value(self, about: str, name: str) -> str | None:
        """The digest of a value in the last block about a step, also one of its later attempts; `None` without one."""
        for block in reversed(self.blocks):
            if name in block.values and (block.about == about or block.about.startswith(f"{about} (")):
                return block.values[name]
        return None


def earlier_authorities(directory: Path) -> tuple[x509.Certificate, ...]:
    """The authorities that certified the parties of a ledger before the present one, oldest first; none without a file of them.

    Who is trusted now signed on top of what was signed under them. Raises `IdentityError` for a damaged file.
    """
    content, mark = _whole_lines(directory / EARLIER_FILE), b"-----END CERTIFICATE-----\n"
    *each, rest = content.split(mark)
    if rest.strip():
        each.append(rest)  # no certificate, and named as such
    return tuple(load_root(one + mark, f"a certificate in {directory / EARLIER_FILE}") for one in each)


def _following(chain: Chain, openings: Sequence[ChainedOpening]) -> list[Finding]:
    """What keeps openings that are not signed yet from following the signed ones; nothing if they do."""
    block = Block(chain.blocks, "abandoned", "", (), tuple(openings), {}, None, chain.seal)
    return check_openings(chain, block)[2]


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor that all parties have: its dtype, its shape, its bytes in row order."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(bytes_of(tensor).numpy().data)
    return digest.hexdigest()


def now() -> datetime.datetime:
    """The time in UTC."""
    return datetime.datetime.now(datetime.UTC)


def _whole_lines(path: Path) -> bytes:
    """The content of a file; a last line that a crash cut off is removed from it, and the log says so. Raises `MpcFlError`."""
    try:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            log.warning("%s: the last line was cut off by a crash; it is removed", path)
            os.truncate(path, whole)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise MpcFlError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None
    return content[:whole]


def _append(path: Path, line: bytes) -> None:
    """Append one line, to the disk. Raises `MpcFlError` when it cannot be written."""
    try:
        new = not path.exists()
        with path.open("ab", buffering=0) as file:
            rest = memoryview(line)
            while rest:
                rest = rest[file.write(rest) :]
            to_disk(file)
        if new:
            to_disk(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None
