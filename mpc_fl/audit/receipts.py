"""Receipts of diagnoses by a model owner that stays up: what was asked and opened, signed by both sides before it goes on.

A `Receipt` counts what a session has come to when its next batch is ready: images charged and batches begun, that batch among
them, and the openings before it. So an image is on a receipt before anything about it is opened, and the end of a session is
never needed: one that is cut off leaves its last receipt. A closing receipt, with all openings, follows where both stay. Each
names the one before it, the certificates of both sides, what is revealed, the public network and a commitment to its weights.
The dealer signs a `DealerCount` of the batches that it made in the session.

Each party keeps a file of its own, one line (`Entry`) per receipt: the receipt, its signatures, the dealer's latest count, the
digest of the line before, and the seal, this party's signature over all of it. Who does not hold a party's key can neither
change a line nor take one out from between others. `receipt_audit` checks such files. This module is pure.

What a receipt proves. That the holders of both keys agreed on these counts. Not that the weights committed to are those that
were evaluated: an auditor to whom the model owner opens the commitment (its key and the weights) can compare.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from cryptography import x509

from mpc_fl.audit.opening_record import Opening
from mpc_fl.crypto.certificates import Identity
from mpc_fl.crypto.signatory import fingerprint, is_genuine, sign_statement
from mpc_fl.parsing import parse_json
from mpc_fl.roles import is_hospital

FORMAT, COUNT_FORMAT, LINE_FORMAT = "mpc-fl receipt 1", "mpc-fl dealer count 1", "mpc-fl line of receipts 1"
RECEIPTS_FILE = "receipts.jsonl"
NOTHING = "0" * 64
LONGEST_LINE = 1 << 14  # bytes; a line holds three certificates at most

_DIGEST, _NAME, _TIME = (
    re.compile(r"[0-9a-f]{64}"),
    re.compile(r"[a-z0-9/-]{1,128}"),
    re.compile(r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"),
)
_SIGNATURE, _LARGEST = re.compile(r"([0-9a-f]{2}){8,80}"), 1 << 48

T = TypeVar("T")


# ---- what is signed ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Receipt:
    """What a session has come to: `images` charged in `batches`, `stored` batches put into a pool, `openings` to the hospital.

    `dealt` of the batches are the dealer's, the others were in a pool. `opened` is the digest of the openings' descriptions
    (`opened_with`). Certificates are SHA-256; `commitment` is to the weights. `closing` is the last of a session.
    """

    session: str
    number: int
    hospital_certificate: str
    owner_certificate: str
    reveal: str
    network: str
    commitment: str
    images: int = 0
    batches: int = 0
    stored: int = 0
    dealt: int = 0
    openings: int = 0
    opened: str = NOTHING
    closing: bool = False
    time: str = ""
    previous: str = NOTHING

    @property
    def moment(self) -> datetime.datetime:
        """When it was proposed, by the model owner's clock."""
        return datetime.datetime.fromisoformat(self.time)

    @property
    def hospital(self) -> str:
        """Who asked: a session's name begins with it."""
        return self.session.partition("/")[0]

    def digest(self) -> str:
        """SHA-256 of its content."""
        return _digest_of(asdict(self))

    def after_batch(self, images: int, dealt: bool, opened: tuple[int, str]) -> Receipt:
        """The next one: a batch of `images` is ready, of the dealer or not; 0 images: one was stored. Its time is not set."""
        return replace(
            self._next(opened),
            images=self.images + images,
            batches=self.batches + (images > 0),
            stored=self.stored + (images == 0),
            dealt=self.dealt + dealt,
        )

    def closed(self, opened: tuple[int, str]) -> Receipt:
        """The closing one. Its time is not set."""
        return replace(self._next(opened), closing=True)

    def _next(self, opened: tuple[int, str]) -> Receipt:
        previous = self.digest() if self.number else NOTHING
        return replace(self, number=self.number + 1, previous=previous, openings=opened[0], opened=opened[1], time="")


@dataclass(frozen=True)
class DealerCount:
    """The dealer's word: so many `batches` of `records` together it has made in this session, for this network."""

    session: str
    batches: int
    records: int
    network: str
    certificate: str
    time: str


@dataclass(frozen=True)
class Entry:
    """A line of the file of `keeper`: a receipt signed by both, with the dealer's count; or that alone, of the dealer."""

    keeper: str
    receipt: Receipt | None
    count: DealerCount | None
    signatures: Mapping[str, str]
    certificates: Mapping[str, str] = field(default_factory=dict)  # PEM, where this file first needs them
    previous: str = NOTHING
    seal: str = ""

    def encoded(self) -> bytes:
        """The line, with its newline."""
        return _canonical(asdict(self)) + b"\n"

    def sealed(self, identity: Identity) -> Entry:
        """With the keeper's signature over all of it. Raises `IdentityError` when the identity holds no usable key."""
        return replace(self, seal=sign_statement(identity, LINE_FORMAT, _canonical({**asdict(self), "seal": ""})))


def opened_with(opened: tuple[int, str], opening: Opening) -> tuple[int, str]:
    """Number and digest of the openings so far with one more; both sides describe an opening alike."""
    described = {**vars(opening), "privacy": dict(opening.privacy or {})}
    return opened[0] + 1, _digest_of([opened[1], described])


def fingerprint_of(certificate_pem: bytes) -> str:
    """SHA-256 of a certificate, as hex. Raises one of `UNSOUND` when it is none."""
    return fingerprint(x509.load_pem_x509_certificate(certificate_pem))


def sign_receipt(receipt: Receipt, identity: Identity) -> str:
    """A side's signature, as hex. Raises `IdentityError` when the identity holds no usable key."""
    return sign_statement(identity, FORMAT, _canonical(asdict(receipt)))


def sign_count(count: DealerCount, identity: Identity) -> str:
    """The dealer's signature, as hex. Raises `IdentityError` when the identity holds no usable key."""
    return sign_statement(identity, COUNT_FORMAT, _canonical(asdict(count)))


def is_sealed(entry: Entry, certificate: x509.Certificate) -> bool:
    """Whether the holder of `certificate` wrote this line."""
    return is_genuine(certificate, LINE_FORMAT, _canonical({**asdict(entry), "seal": ""}), entry.seal)


def is_signed(what: Receipt | DealerCount, signature: object, certificate: x509.Certificate) -> bool:
    """Whether the holder of `certificate` signed this."""
    purpose = FORMAT if isinstance(what, Receipt) else COUNT_FORMAT
    return is_genuine(certificate, purpose, _canonical(asdict(what)), signature)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest_of(value: object) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()


# ---- from JSON ---------------------------------------------------------------------------------------------------------

_TEXTS = {"session": _NAME, "time": _TIME, "reveal": re.compile("logits|label"), "keeper": _NAME}


def _plain(kind: type[T], value: Any) -> T:
    """A `Receipt` or `DealerCount`. Raises `ValueError` unless all fields are there and each has its form."""
    names = {item.name: item.type for item in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError("other fields")
    for name, form in names.items():
        item = value[name]
        if form == "bool":
            right = isinstance(item, bool)
        elif form == "int":
            right = type(item) is int and 0 <= item < _LARGEST
        else:
            right = isinstance(item, str) and _TEXTS.get(name, _DIGEST).fullmatch(item) is not None
        if not right:
            raise ValueError(name)
        if name == "time":
            datetime.datetime.fromisoformat(item)
    return kind(**value)


def receipt_from(value: Any) -> Receipt:
    """A receipt from JSON. Raises `ValueError` when it is none; it is not checked."""
    receipt = _plain(Receipt, value)
    if not is_hospital(receipt.hospital):
        raise ValueError("no hospital's session")
    return receipt


def count_from(value: Any) -> DealerCount:
    """A dealer's count from JSON. Raises `ValueError` when it is none; it is not checked."""
    return _plain(DealerCount, value)


def _texts_by_name(value: Any, longest: int) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > 3:
        raise ValueError("other parties")
    if not all(
        isinstance(text, str) and len(text) <= longest and _NAME.fullmatch(name) for name, text in value.items()
    ):
        raise ValueError("other texts")
    return value


def entry_from(line: bytes) -> Entry:
    """The entry of a line without its newline. Raises `ValueError` unless it is exactly what `Entry.encoded` writes."""
    if len(line) >= LONGEST_LINE:
        raise ValueError("too long")
    value = parse_json(line)
    if not isinstance(value, dict) or set(value) != {item.name for item in fields(Entry)}:
        raise ValueError("other fields")
    keeper, previous, seal = value["keeper"], value["previous"], value["seal"]
    if not all(isinstance(text, str) for text in (keeper, previous, seal)):
        raise ValueError("no text")
    if not (_NAME.fullmatch(keeper) and _DIGEST.fullmatch(previous) and _SIGNATURE.fullmatch(seal)):
        raise ValueError("other texts")
    entry = Entry(
        keeper,
        None if value["receipt"] is None else receipt_from(value["receipt"]),
        None if value["count"] is None else count_from(value["count"]),
        _texts_by_name(value["signatures"], 160),
        _texts_by_name(value["certificates"], 4096),
        previous,
        seal,
    )
    if entry.encoded() != line + b"\n":
        raise ValueError("not in canonical form")
    return entry
