"""The hand-shake: who a peer is, that it runs the same thing, and the secret two parties share from then on.

Each side of a pair sends one signed greeting. It names sender and receiver, what the sender runs (version, session,
configuration digest, task) and an X25519 key made for this start, and carries the sender's certificate; the answer also
holds the digest of the greeting it answers. Both directions are checked end to end, so they mean the same on a direct
link and through a relay that the two do not trust (authenticated Diffie-Hellman, SIGMA without identity protection:
Krawczyk, CRYPTO 2003). This module is pure: it neither sends nor waits.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mpc_fl import __version__
from mpc_fl.crypto.certificates import Identity, received_pem, sign, verify_certificate, verify_signature
from mpc_fl.errors import SAME_VERSION, DisagreementError, HandshakeError, IdentityError, printable

# What parties say to each other, all protocols together. 2: sums are bound to a transcript that all in them confirm.
# 3: parties give signs of life. 4: the linear check has another map; peers say who joins, leaves and admits. 5: peers know each
# other's starts with their certificates, and show votes to whom they ask for the state; what is relayed is numbered, and may
# come through several relays. 6: who gives up a view of a round says so once, for all of it; relays say which start is lost.
PROTOCOL_VERSION = 7
_VERSION = f"{__version__}, protocol {PROTOCOL_VERSION}"
_LONGEST_VERSION = 40
_LONGEST_CODE = 200
_WITH = " with "
_PURPOSE = "mpc-fl greeting"
_FIELDS = {"name", "to", "version", "session", "digest", "task", "public_key", "answers", "certificate", "signature"}


@dataclass(frozen=True)
class Agreement:
    """What all parties of a run must agree on before anything else is sent.

    `code` says which code of others a party runs (a network of an installed package, and its version), where it runs any.
    """

    session: str
    digest: str
    task: str
    code: str = ""

    @property
    def stated_task(self) -> str:
        """The task as a greeting has it: with the code of others behind it."""
        return f"{self.task}{_WITH}{self.code}" if self.code else self.task


def _canonical(greeting: dict[str, Any]) -> bytes:
    signed = {name: value for name, value in greeting.items() if name != "signature"}
    return json.dumps(signed, sort_keys=True, separators=(",", ":")).encode()


def greeting_digest(greeting: dict[str, Any]) -> str:
    """SHA-256 of a greeting, as hex: what an answer refers to."""
    return hashlib.sha256(_canonical(greeting)).hexdigest()


def make_greeting(
    identity: Identity, agreement: Agreement, receiver: str, public_key: bytes, answers: str = ""
) -> dict[str, Any]:
    """A signed greeting for `receiver`; `answers` is the digest of the greeting it answers, empty in a first one.

    A nonce beside that makes it another one each time, also of the same start: what was said before is told from what is new.
    """
    greeting: dict[str, Any] = {
        "name": identity.name,
        "to": receiver,
        "version": _VERSION,
        "session": agreement.session,
        "digest": agreement.digest,
        "task": agreement.stated_task,
        "public_key": public_key.hex(),
        "answers": f"{answers}:{secrets.token_hex(16)}",
        "certificate": identity.certificate.decode("ascii"),
    }
    return {**greeting, "signature": sign(identity, _PURPOSE, _canonical(greeting)).hex()}


def check_greeting(greeting: Any, sender: str, trusted: Identity, agreement: Agreement, answers: str = "") -> bytes:
    """Check a greeting of `sender` to the party of `trusted`; return the sender's X25519 public key (32 bytes).

    Raises `HandshakeError` when it is malformed, was made for somebody else, or certificate or signature do not prove
    that it is the sender's; `DisagreementError` when it is genuine but the sender runs something else.
    """
    if not isinstance(greeting, dict) or set(greeting) != _FIELDS:
        raise HandshakeError("the first frame is not a greeting")
    if not all(isinstance(value, str) for value in greeting.values()):
        raise HandshakeError("the first frame is not a greeting")
    if greeting["name"] != sender or greeting["to"] != trusted.name:
        raise HandshakeError("the greeting was made for another link")
    try:
        certificate = verify_certificate(received_pem(greeting["certificate"], sender), sender, trusted)
        verify_signature(certificate, _PURPOSE, _canonical(greeting), bytes.fromhex(greeting["signature"]))
    except IdentityError as error:
        raise HandshakeError(error.what, error.fix) from None
    except ValueError:
        raise HandshakeError("the greeting is not signed by its sender") from None
    if greeting["version"] != _VERSION:
        raise DisagreementError(
            f"{sender} runs version {_spelled_out(greeting['version'])} and {trusted.name} version {_VERSION}",
            SAME_VERSION,
        )
    task, _, code = greeting["task"].partition(_WITH)
    if (greeting["session"], task) == (agreement.session, agreement.task) and code != agreement.code:
        theirs, own = (printable(each, _LONGEST_CODE) or "no code of others" for each in (code, agreement.code))
        raise DisagreementError(
            f"{sender} runs a network of {theirs} and {trusted.name} of {own}",
            "install the same version at every party",
        )
    mine = {"session": agreement.session, "digest": agreement.digest, "task": agreement.stated_task}
    for key, value in mine.items():
        if greeting[key] != value:
            words = {"digest": "configuration"}.get(key, key)
            raise DisagreementError(
                f"{sender} and {trusted.name} do not have the same {words}",
                "give all parties the same file and version",
            )
    if greeting["answers"].partition(":")[0] != answers:
        raise HandshakeError("the greeting answers another one")
    try:
        public_key = bytes.fromhex(greeting["public_key"])
        X25519PublicKey.from_public_bytes(public_key)
    except ValueError:
        raise HandshakeError("the greeting holds no valid public key") from None
    return public_key


def _spelled_out(version: str) -> str:
    """The version in a greeting, for an error. Before protocols had a number, it was that of the program alone."""
    return printable(version if "protocol" in version else f"{version}, protocol 1", _LONGEST_VERSION)


def pairwise_key(
    own: X25519PrivateKey, public_key: bytes, names: tuple[str, str], agreement: Agreement, purpose: str
) -> bytes:
    """32 secret bytes that only the two parties `names` know, the same at both; another purpose gives others.

    X25519, then HKDF-SHA256 (RFC 5869) with both public keys as salt and names, session, configuration and purpose as
    context. The X25519 keys are fresh per start, so nothing repeats after a retry or a restart. Raises
    `HandshakeError` for a public key of small order.
    """
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError:
        raise HandshakeError("the greeting holds no valid public key") from None
    mine = own.public_key().public_bytes_raw()
    context = [*sorted(names), agreement.session, agreement.digest, purpose]
    info = b"".join(len(part.encode()).to_bytes(2, "little") + part.encode() for part in context)
    transcript = hashlib.sha256(b"".join(sorted([mine, public_key]))).digest()
    return HKDF(SHA256(), 32, salt=transcript, info=b"mpc-fl pairwise seed" + info).derive(secret)
