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

Signatures are ECDSA on P-256 and not Ed25519, because the certificates are: gRPC's TLS accepts no Ed25519 (`certificates`).
What signatures cannot show: an opening that all parties of a block left out together, or a time that a party's clock had
wrong. This module makes blocks, `ledger_audit` checks them (both are pure), `ledger_file` keeps a party's copy,
`co_signing` has a block signed by all.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from mpc_fl.audit.opening_record import Opening, Scalar
from mpc_fl.crypto.certificates import Identity, sign, verify_signature
from mpc_fl.errors import IdentityError

FORMAT = "mpc-fl reveal ledger 1"
LEDGER_FILE = "reveal_ledger.jsonl"
KINDS = ("start", "resume", "openings", "abandoned", "end")
_NOTHING = "0" * 64
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"2[0-9]{3}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00")
_LONGEST_TEXT = 1000
# The order of the group of P-256 (SP 800-186, section 3.2.1.3).
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@dataclass(frozen=True, kw_only=True)
class ChainedOpening(Opening):
    """An opening in its place: the `number` of it in the run, `previous` the digest of the opening before."""

    number: int
    previous: str
    digest: str = ""

    def computed_digest(self) -> str:
        """SHA-256 of everything but `digest`."""
        return _sha256("opening", {name: value for name, value in vars(self).items() if name != "digest"})


@dataclass(frozen=True)
class Members:
    """Who the parties are from this block on: session, configuration digest, authority (SHA-256), certificates (PEM)."""

    session: str
    configuration: str
    authority: str
    certificates: Mapping[str, str]


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
    what was begun and may not have been completed because a party was lost; "end" is the last block of a run.
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

    def content_digest(self) -> str:
        """SHA-256 of everything but the signatures: what they sign."""
        return _sha256("block", {name: value for name, value in vars(self).items() if name != "signatures"})

    def seal(self) -> str:
        """SHA-256 of the whole block: what the next one refers to."""
        return _sha256("sealed block", vars(self))


# ---- canonical text ----------------------------------------------------------------------------------------------------


def _canonical(value: Any) -> bytes:
    """JSON in the one form that the ledger accepts; dataclasses are written as objects."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=vars).encode("ascii")


def _sha256(kind: str, value: Any) -> str:
    return hashlib.sha256(_canonical([FORMAT, kind, value])).hexdigest()


def encode_block(block: Block) -> bytes:
    """The line of a block, with its newline."""
    return _canonical(block) + b"\n"


def to_json(item: ChainedOpening | Block | Signature) -> dict[str, Any]:
    """A JSON object for a link or a file; `opening_from`, `block_from` and `signature_from` read it back."""
    value: dict[str, Any] = json.loads(_canonical(item))
    return value


def _object(value: Any, kind: type) -> Mapping[str, Any]:
    if not isinstance(value, dict) or set(value) != set(kind.__dataclass_fields__):  # type: ignore[attr-defined]
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


def opening_from(value: Any) -> ChainedOpening:
    """An opening from JSON. Raises `ValueError` when it is none; its digest is not checked."""
    item = _object(value, ChainedOpening)
    privacy = item["privacy"]
    return ChainedOpening(
        number=_count(item["number"]),
        what=_text(item["what"]),
        why=_text(item["why"]),
        shape=tuple(_count(size) for size in _list(item["shape"])),
        to=_texts(item["to"]),
        among=_texts(item["among"]),
        privacy=None if privacy is None else {name: _scalar(entry) for name, entry in _mapping(privacy).items()},
        previous=_digest(item["previous"]),
        digest=_digest(item["digest"]),
    )


def signature_from(value: Any) -> Signature:
    """A signature from JSON. Raises `ValueError` when it is none; it is not verified."""
    item = _object(value, Signature)
    signature = Signature(_text(item["party"]), _text(item["time"]), _text(item["signature"]))
    if not _TIME.fullmatch(signature.time):
        raise ValueError("no time")
    moment_of(signature)
    return signature


def _members_from(value: Any) -> Members:
    item = _object(value, Members)
    certificates = _mapping(item["certificates"])
    if not all(isinstance(certificate, str) for certificate in certificates.values()):
        raise ValueError("no certificate")
    return Members(_text(item["session"]), _text(item["configuration"]), _digest(item["authority"]), certificates)


def block_from(value: Any) -> Block:
    """A block from JSON. Raises `ValueError` when it is none; neither digests nor signatures are checked."""
    item = _object(value, Block)
    if item["kind"] not in KINDS:
        raise ValueError("no kind of block")
    return Block(
        _count(item["number"]),
        item["kind"],
        _text(item["about"]),
        _texts(item["parties"]),
        tuple(opening_from(opening) for opening in _list(item["openings"])),
        {name: _digest(digest) for name, digest in _mapping(item["values"]).items()},
        None if item["members"] is None else _members_from(item["members"]),
        _digest(item["previous"]),
        tuple(signature_from(signature) for signature in _list(item["signatures"])),
    )


def time_text(moment: datetime.datetime) -> str:
    """A moment as signatures hold it."""
    return moment.astimezone(datetime.timezone.utc).isoformat(timespec="seconds")


def moment_of(signature: Signature) -> datetime.datetime:
    """When it was made, by the clock of its party."""
    return datetime.datetime.fromisoformat(signature.time)


# ---- making blocks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """What the next block has to continue: the state of a ledger after its last block."""

    blocks: int = 0
    seal: str = _NOTHING
    openings: int = 0
    opening_digest: str = _NOTHING
    certificates: Mapping[str, x509.Certificate] = field(default_factory=dict)
    signed_until: datetime.datetime | None = None
    ended: bool = False
    sound: bool = True


def chain_opening(chain: Chain, pending: Sequence[ChainedOpening], opening: Opening) -> ChainedOpening:
    """Put an opening after `pending`, which follow `chain`. Raises `ValueError` for text that cannot be printed."""
    last = pending[-1].digest if pending else chain.opening_digest
    placed = ChainedOpening(**vars(opening), number=chain.openings + len(pending) + 1, previous=last)
    return opening_from(to_json(replace(placed, digest=placed.computed_digest())))


def sign_block(block: Block, identity: Identity, moment: datetime.datetime) -> Signature:
    """This party's signature. Raises `IdentityError` when the identity holds no usable key."""
    time = time_text(moment)
    signature = sign(identity, FORMAT, _signed_message(block.content_digest(), identity.name, time))
    return Signature(identity.name, time, _unique(signature).hex())


def _signed_message(content_digest: str, party: str, time: str) -> bytes:
    return _canonical([content_digest, party, time])


def _unique(signature: bytes) -> bytes:
    """Of (r, s) and (r, -s), which ECDSA both accepts, the smaller one: else a signature could be exchanged unseen."""
    r, s = decode_dss_signature(signature)
    return encode_dss_signature(r, min(s, _ORDER - s))


def is_genuine(content_digest: str, signature: Signature, certificate: x509.Certificate) -> bool:
    """Whether the holder of `certificate` made this signature over a block's content."""
    message = _signed_message(content_digest, signature.party, signature.time)
    try:
        der = bytes.fromhex(signature.signature)
        verify_signature(certificate, FORMAT, message, der)
        return _unique(der).hex() == signature.signature
    except (IdentityError, ValueError):
        return False


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate, as hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()
