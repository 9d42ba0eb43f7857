"""The reveal ledger: every opening of a run in a hash chain that all parties of a round sign.

One line of the file is one block: the openings since the block before, the SHA-256 of what they made public, the digest
of the block before with its signatures, and a signature of every party of the round. The first block holds the
certificates of all parties, so that the file and the authority's certificate are all that an audit needs. The block
"end" is signed by all as the last one, so a ledger that was cut short lacks it.

What a digest covers. Shares travel only to the openers, and the digest of an unpublished value could be inverted by
trial (a count of patients has few bits). So an opening's digest covers what all parties know alike: the digest of the
opening before it, through the first one the session, the configuration and the certificates, and the public description:
what, why, shape, to whom, among whom, and the privacy spent as far as all may know it (a hospital's own epsilon is a line
of its own privacy ledger). `values` of a block holds digests of values that every party of the round has itself, such as
the new global model: a signature then also says that the party holds the same one.

Signatures are ECDSA on P-256 and not Ed25519, because the certificates are (`certificates`).
A block counts only with the signatures of all its parties, among them everybody who learned what it opened and a quorum of
hospitals, so nobody signs a history alone (version 2; `ledger_versions`). Of hospitals that opened a sum to themselves, who was
lost or refused since is no party of a block "abandoned". A sum's `transcript` is the digest of what all its parties agreed on.

What signatures cannot show: an opening that all parties of a block left out together, or a time that a party's clock had
wrong. This module makes blocks, `ledger_audit` checks them (both are pure), `ledger_file` keeps a party's copy,
`co_signing` has a block signed by all.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cryptography import x509

from mpc_fl.audit.ledger_versions import FORMATS, VERSION, canonical, content_of, fields_of, sha256, version_of
from mpc_fl.audit.opening_record import Opening, Scalar
from mpc_fl.crypto.certificates import Identity
from mpc_fl.crypto.signatory import is_genuine, sign_statement, time_text

LEDGER_FILE = "reveal_ledger.jsonl"
UNCONFIRMED_FILE = "unconfirmed_block.json"
KINDS = ("start", "resume", "openings", "abandoned", "end")
_NOTHING = "0" * 64
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"2[0-9]{3}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00")
_LONGEST_TEXT = 1000


@dataclass(frozen=True, kw_only=True)
class ChainedOpening(Opening):
    """An opening in its place: the `number` of it in the run, `previous` the digest of the opening before."""

    number: int
    previous: str
    digest: str = ""

    def computed_digest(self, version: int = VERSION) -> str:
        """SHA-256 of everything but `digest`, in a version of the ledger."""
        return sha256("opening", content_of(self, version, without=("digest",)), version)


@dataclass(frozen=True)
class Members:
    """Who the parties are from this block on: session, configuration digest, authority (SHA-256), certificates (PEM).

    `quorum` is the fewest hospitals whose signatures make a block count, the same throughout a run. A ledger of version 1
    has none: it is 0 there.
    """

    session: str
    configuration: str
    authority: str
    certificates: Mapping[str, str]
    quorum: int = 0


@dataclass(frozen=True)
class Signature:
    """A party's signature (DER, as hex) over a block's content, its name and its clock (ISO 8601, UTC, seconds)."""

    party: str
    time: str
    signature: str


@dataclass(frozen=True)
class Block:
    """One line of the ledger, signed by `parties`.

    "start" and "resume" say who the parties are; "openings" holds what was opened since the block before; "abandoned"
    what was begun and may not have been completed because a party was lost; "end" is the last block of a run. Where a run that
    was complete is given more rounds, a block "resume" follows it, and another "end" is the last one.
    """

    number: int
    kind: str
    about: str
    parties: tuple[str, ...]
    openings: tuple[ChainedOpening, ...]
    values: Mapping[str, str]
    members: Members | None
    previous: str
    signatures: tuple[Signature, ...] = ()
    version: int = VERSION

    def content_digest(self) -> str:
        """SHA-256 of everything but the signatures: what they sign."""
        return sha256("block", content_of(self, self.version, without=("signatures",)), self.version)

    def seal(self) -> str:
        """SHA-256 of the whole block: what the next one refers to."""
        return sha256("sealed block", content_of(self, self.version), self.version)


# ---- text -----------------------------------------------------------------------------------------------------------------


def encode_block(block: Block) -> bytes:
    """The line of a block, with its newline."""
    return canonical(block, block.version) + b"\n"


def to_json(item: ChainedOpening | Block | Signature) -> dict[str, Any]:
    """A JSON object for a link or a file; `opening_from`, `block_from` and `signature_from` read it back.

    A block is written in its own version, all else in this one.
    """
    version = item.version if isinstance(item, Block) else VERSION
    value: dict[str, Any] = json.loads(canonical(item, version))
    return value


def _object(value: Any, kind: type, version: int) -> Mapping[str, Any]:
    if not isinstance(value, dict) or set(value) != fields_of(kind, version):
        raise ValueError(f"no {kind.__name__}")
    return value


def _text(value: Any) -> str:
    # Printable, so that nobody can write to the terminal of whoever reads the ledger.
    if not isinstance(value, str) or not value.isprintable() or len(value) > _LONGEST_TEXT:
        raise ValueError("no text")
    return value


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError("no digest")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("no count")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("no list")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    texts = tuple(_text(item) for item in _list(value))
    if len(set(texts)) != len(texts):
        raise ValueError("a name comes twice")
    return texts


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("no object")
    return {_text(name): item for name, item in value.items()}


def _scalar(value: Any) -> Scalar:
    return value if value is None or isinstance(value, (bool, int, float)) else _text(value)


def opening_from(value: Any, version: int = VERSION) -> ChainedOpening:
    """An opening from JSON. Raises `ValueError` when it is none; its digest is not checked."""
    item = _object(value, ChainedOpening, version)
    privacy, transcript = item["privacy"], item.get("transcript")
    return ChainedOpening(
        number=_count(item["number"]),
        what=_text(item["what"]),
        why=_text(item["why"]),
        shape=tuple(_count(size) for size in _list(item["shape"])),
        to=_texts(item["to"]),
        among=_texts(item["among"]),
        privacy=None if privacy is None else {name: _scalar(entry) for name, entry in _mapping(privacy).items()},
        transcript=None if transcript is None else _digest(transcript),
        previous=_digest(item["previous"]),
        digest=_digest(item["digest"]),
    )


def signature_from(value: Any) -> Signature:
    """A signature from JSON. Raises `ValueError` when it is none; it is not verified."""
    item = _object(value, Signature, VERSION)
    signature = Signature(_text(item["party"]), _text(item["time"]), _text(item["signature"]))
    if not _TIME.fullmatch(signature.time):
        raise ValueError("no time")
    moment_of(signature)
    return signature


def _members_from(value: Any, version: int) -> Members:
    item = _object(value, Members, version)
    certificates = _mapping(item["certificates"])
    if not all(isinstance(certificate, str) for certificate in certificates.values()):
        raise ValueError("no certificate")
    quorum = _count(item["quorum"]) if "quorum" in item else 0
    return Members(
        _text(item["session"]), _text(item["configuration"]), _digest(item["authority"]), certificates, quorum
    )


def block_from(value: Any) -> Block:
    """A block from JSON. Raises `ValueError` when it is none; neither digests nor signatures are checked."""
    version = version_of(value)
    item = _object(value, Block, version)
    if item["kind"] not in KINDS:
        raise ValueError("no kind of block")
    return Block(
        _count(item["number"]),
        item["kind"],
        _text(item["about"]),
        _texts(item["parties"]),
        tuple(opening_from(opening, version) for opening in _list(item["openings"])),
        {name: _digest(digest) for name, digest in _mapping(item["values"]).items()},
        None if item["members"] is None else _members_from(item["members"], version),
        _digest(item["previous"]),
        tuple(signature_from(signature) for signature in _list(item["signatures"])),
        version,
    )


def moment_of(signature: Signature) -> datetime.datetime:
    """When it was made, by the clock of its party."""
    return datetime.datetime.fromisoformat(signature.time)


# ---- making blocks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """What the next block has to continue: the state of a ledger after its last block.

    `version` is that of all its blocks, `None` before the first; `quorum` the one they all count by, 0 as long as none is known;
    `authority` the SHA-256 of the one whose certificates the last of them count by. `ended`: the run is complete, unless it is
    given more rounds.
    """

    blocks: int = 0
    seal: str = _NOTHING
    openings: int = 0
    opening_digest: str = _NOTHING
    certificates: Mapping[str, x509.Certificate] = field(default_factory=dict)
    signed_until: datetime.datetime | None = None
    ended: bool = False
    sound: bool = True
    version: int | None = None
    quorum: int = 0
    authority: str = ""


def chain_opening(chain: Chain, pending: Sequence[ChainedOpening], opening: Opening) -> ChainedOpening:
    """Put an opening after `pending`, which follow `chain`. Raises `ValueError` for text that cannot be printed."""
    last = pending[-1].digest if pending else chain.opening_digest
    placed = ChainedOpening(**vars(opening), number=chain.openings + len(pending) + 1, previous=last)
    return opening_from(to_json(replace(placed, digest=placed.computed_digest())))


def sign_block(block: Block, identity: Identity, moment: datetime.datetime) -> Signature:
    """This party's signature. Raises `IdentityError` when the identity holds no usable key."""
    time = time_text(moment)
    message = _signed_message(block.content_digest(), identity.name, time)
    return Signature(identity.name, time, sign_statement(identity, FORMATS[block.version], message))


def _signed_message(content_digest: str, party: str, time: str) -> bytes:
    return canonical([content_digest, party, time], VERSION)


def is_signed(content_digest: str, signature: Signature, certificate: x509.Certificate, version: int) -> bool:
    """Whether the holder of `certificate` made this signature over the content of a block of this version."""
    message = _signed_message(content_digest, signature.party, signature.time)
    return is_genuine(certificate, FORMATS[version], message, signature.signature)
