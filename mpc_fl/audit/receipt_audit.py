"""Checking files of receipts: what was edited, removed, added or signed by somebody else, and in which line.

`check_lines` checks one party's file with the authority's certificate alone, `compare` the files of several parties against each
other. Certificates may have expired since: each must have been valid when its holder signed. This module is pure.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from cryptography import x509

from mpc_fl.audit.receipts import NOTHING, DealerCount, Entry, Receipt, entry_from, is_sealed, is_signed
from mpc_fl.crypto.certificates import CLOCK_SKEW, UNSOUND, is_of_party
from mpc_fl.crypto.signatory import fingerprint
from mpc_fl.roles import DEALER, MODEL_OWNER

# ---- one file ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a file of receipts, and at which of its lines, from 1; 0 where it is none of them."""

    line: int
    what: str


@dataclass(frozen=True)
class Checked:
    """A file of receipts: its entries as far as they can be read, and what is wrong."""

    entries: tuple[Entry, ...]
    troubles: tuple[Trouble, ...]


def are_receipts(content: bytes) -> bool:
    """Whether a file looks like one of receipts (an edited one, too), and not like a reveal ledger."""
    return b'"keeper":' in content.partition(b"\n")[0]


def check_lines(content: bytes, authority: x509.Certificate) -> Checked:
    """Check a file from its first line to its last. A line that cannot be read is named, and so is what no longer fits it."""
    *lines, rest = content.split(b"\n")
    check, entries, troubles = _Check(authority), list[Entry](), list[Trouble]()
    previous = NOTHING
    for number, line in enumerate(lines, 1):
        try:
            entry = entry_from(line)
        except ValueError:
            troubles.append(Trouble(number, "is damaged or was edited: it is no receipt"))
        else:
            entries.append(entry)
            troubles += [Trouble(number, what) for what in check.add(entry, previous)]
        previous = hashlib.sha256(line + b"\n").hexdigest()
    if rest:
        troubles.append(Trouble(len(lines) + 1, "is cut off"))
    return Checked(tuple(entries), tuple(troubles))


class _Check:
    """What the next line of a file has to follow."""

    def __init__(self, authority: x509.Certificate) -> None:
        self._authority, self._certificates = authority, dict[str, tuple[str, x509.Certificate]]()
        self._keeper: str | None = None
        self._last: dict[str, Receipt] = {}
        self._counts: dict[str, DealerCount] = {}

    def add(self, entry: Entry, previous: str) -> list[str]:
        """All that is wrong with the next entry."""
        self._keeper = self._keeper or entry.keeper
        found = [*self._introduced(entry)]
        if entry.keeper != self._keeper:
            found.append(f"is of {entry.keeper}, and the file of {self._keeper}")
        if entry.previous != previous:
            found.append(
                "does not follow the line before it: one of the two was exchanged, or lines between were removed"
            )
        found += self._signatures(entry)
        if entry.count is not None:
            found += self._counted(entry.count)
        if entry.receipt is not None:
            found += self._followed(entry.receipt, entry.count)
        return found

    def _introduced(self, entry: Entry) -> Iterator[str]:
        for name, certificate_pem in entry.certificates.items():
            try:
                certificate = x509.load_pem_x509_certificate(certificate_pem.encode("ascii"))
                certificate.verify_directly_issued_by(self._authority)
                if not is_of_party(certificate, name):
                    yield f"the certificate of {name} is another party's"
                    continue
                self._certificates[fingerprint(certificate)] = (name, certificate)
            except UNSOUND:
                yield f"the certificate of {name} is not one of this authority's"

    def _signatures(self, entry: Entry) -> Iterator[str]:
        receipt, count = entry.receipt, entry.count
        signed: dict[str, tuple[Receipt | DealerCount, str]] = {}
        if receipt is not None:
            signed[receipt.hospital] = (receipt, receipt.hospital_certificate)
            signed[MODEL_OWNER] = (receipt, receipt.owner_certificate)
        if count is not None:
            signed[DEALER] = (count, count.certificate)
        if not signed:
            yield "holds neither a receipt nor a count"
        for name in signed.keys() - entry.signatures.keys():
            yield f"{name} did not sign it"
        for name in entry.signatures.keys() - signed.keys():
            yield f"{name} signed it and is no party of it"
        for name, (what, printed) in signed.items():
            certificate = self._certificate(name, printed)
            if certificate is None:
                yield f"there is no certificate of {name}, so its signature proves nothing"
            elif name in entry.signatures and not is_signed(what, entry.signatures[name], certificate):
                yield f"the signature of {name} is false: over something else, or somebody else's"
            elif (
                not certificate.not_valid_before_utc
                <= datetime.datetime.fromisoformat(what.time)
                <= certificate.not_valid_after_utc
            ):
                yield f"the certificate of {name} was not valid when it signed, {what.time}"
        keeper = None if entry.keeper not in signed else self._certificate(entry.keeper, signed[entry.keeper][1])
        if keeper is None or not is_sealed(entry, keeper):
            yield f"is not what {entry.keeper} wrote: its seal is false"

    def _certificate(self, name: str, fingerprint: str) -> x509.Certificate | None:
        known = self._certificates.get(fingerprint)
        return known[1] if known is not None and known[0] == name else None

    def _counted(self, count: DealerCount) -> Iterator[str]:
        last = self._counts.get(count.session)
        if last is not None and (count.batches < last.batches or count.records < last.records):
            yield "the dealer counted fewer batches than before"
        self._counts[count.session] = count

    def _followed(self, receipt: Receipt, count: DealerCount | None) -> Iterator[str]:
        last = self._last.get(receipt.session)
        yield from (f"does not follow the receipt before it: {what}" for what in _steps(last, receipt))
        if count is None and receipt.dealt:
            yield f"the dealer did not sign that it made {receipt.dealt} batches"
        if count is not None and (count.session, count.batches, count.network) != (
            receipt.session,
            receipt.dealt,
            receipt.network,
        ):
            yield f"the dealer signed something else than {receipt.dealt} batches of this session and network"
        self._last[receipt.session] = receipt


def _steps(last: Receipt | None, receipt: Receipt) -> Iterator[str]:
    """What does not lead from the receipt before (None: the session begins) to this one."""
    if last is None:
        alike = ("session", "hospital_certificate", "owner_certificate", "reveal", "network", "commitment")
        last = Receipt(**{name: getattr(receipt, name) for name in alike}, number=0)
    if receipt.number != last.number + 1:
        yield f"it is number {receipt.number}, due is {last.number + 1}"
        return
    if last.closing:
        yield "the session was closed"
    opened = receipt.openings, receipt.opened
    images, dealt = receipt.images - last.images, receipt.dealt - last.dealt == 1
    due = last.closed(opened) if receipt.closing else last.after_batch(max(0, images), dealt, opened)
    wrong = [item.name for item in fields(due) if getattr(due, item.name) != getattr(receipt, item.name)]
    wrong = [name for name in wrong if name != "time"]
    if wrong:
        yield f"{', '.join(wrong)} cannot be"
    elif not last.openings <= receipt.openings <= last.batches:
        yield f"{receipt.openings} openings after {last.batches} batches, {last.openings} before"
    elif last.time and receipt.moment < last.moment - CLOCK_SKEW:
        yield f"it was signed before it, {receipt.time}"


# ---- several parties' files --------------------------------------------------------------------------------------------


def compare(files: Mapping[str, Sequence[Entry]]) -> list[str]:
    """What the files of several parties, by where they lie, contradict each other in: what is in two files is the same in both.

    The model owner keeps a receipt last, so where a session was cut off its file may lack the very last one.
    """
    found = list[str]()
    owners = {where: entries for where, entries in files.items() if entries and entries[0].keeper == MODEL_OWNER}
    dealers = {where: entries for where, entries in files.items() if entries and entries[0].keeper == DEALER}
    for where, entries in files.items():
        for session, mine in _by_session(entries).items():
            for other, kept in owners.items():
                if other != where:
                    found += _differences(session, (where, mine), (other, _by_session(kept).get(session, {})))
            for other, kept in dealers.items():
                made = max((entry.count.batches for entry in kept if _is_of(entry, session) and entry.count), default=0)
                if made < max(receipt.dealt for receipt in mine.values()):
                    found.append(f"{other} lacks batches of {session} that are in {where}")
    return found


def _is_of(entry: Entry, session: str) -> bool:
    return entry.count is not None and entry.count.session == session


def _differences(
    session: str, mine: tuple[str, Mapping[int, Receipt]], owners: tuple[str, Mapping[int, Receipt]]
) -> Iterator[str]:
    """Between a party's file and the model owner's."""
    (where, first), (other, second) = mine, owners
    for number in sorted(first.keys() & second.keys()):
        if first[number].digest() != second[number].digest():
            yield f"receipt {number} of {session} is not the same in {where} and {other}"
            return
    for short, count in ((where, len(second) - len(first)), (other, len(first) - len(second) - 1)):
        if count > 0:
            yield f"{short} lacks receipts of {session}"


def _by_session(entries: Sequence[Entry]) -> dict[str, dict[int, Receipt]]:
    sessions: dict[str, dict[int, Receipt]] = {}
    for entry in entries:
        if entry.receipt is not None:
            sessions.setdefault(entry.receipt.session, {})[entry.receipt.number] = entry.receipt
    return sessions
