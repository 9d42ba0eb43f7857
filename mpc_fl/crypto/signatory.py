"""Statements that parties sign with the keys of their certificates: made, checked, and by whom in a run.

A signature stands in a record as hex and in one form: of (r, s) and (r, -s), which ECDSA both accepts, the one with the smaller
s, else it could be exchanged unseen.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from mpc_fl.crypto.certificates import Identity, sign, verify_signature
from mpc_fl.errors import IdentityError

_LONGEST = 512  # hex digits of a DER signature on P-256 are at most 144
# The order of the group of P-256 (SP 800-186, section 3.2.1.3).
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def sign_statement(identity: Identity, purpose: str, statement: bytes) -> str:
    """A party's signature (DER, as hex) for one purpose. Raises `IdentityError` when the identity holds no usable key."""
    return _unique(sign(identity, purpose, statement)).hex()


def is_genuine(certificate: x509.Certificate, purpose: str, statement: bytes, signature: object) -> bool:
    """Whether the holder of `certificate` signed this statement for this purpose; False for anything that is no signature."""
    if not isinstance(signature, str) or len(signature) > _LONGEST:
        return False
    try:
        der = bytes.fromhex(signature)
        verify_signature(certificate, purpose, statement, der)
        return _unique(der).hex() == signature
    except (IdentityError, ValueError):
        return False


def _unique(signature: bytes) -> bytes:
    r, s = decode_dss_signature(signature)
    return encode_dss_signature(r, min(s, _ORDER - s))


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate, as hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def time_text(moment: datetime.datetime) -> str:
    """A moment as signed records hold it: ISO 8601, UTC, seconds."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="seconds")


class Signatory:
    """Who signs at this party, with the certificates of all; `certificate_of` says a party's, or that there is none (`None`).

    The certificates are those that all parties of a run exchanged and checked against the authority when it began
    (`audit.co_signing`), so a signature means the same to everybody, whoever passed it on.
    """

    def __init__(self, identity: Identity, certificate_of: Callable[[str], x509.Certificate | None]) -> None:
        self._identity = identity
        self._certificate_of = certificate_of

    def sign(self, purpose: str, statement: bytes) -> str:
        """This party's signature (`sign_statement`). Raises `IdentityError` when the identity holds no usable key."""
        return sign_statement(self._identity, purpose, statement)

    def knows(self, party: str) -> bool:
        """Whether there is a certificate of this party."""
        return self._certificate_of(party) is not None

    def fingerprint_of(self, party: str) -> str:
        """SHA-256 of the certificate of this party, as hex; "" where there is none."""
        certificate = self._certificate_of(party)
        return "" if certificate is None else fingerprint(certificate)

    def is_genuine(self, party: str, purpose: str, statement: bytes, signature: object) -> bool:
        """Whether `party` signed this statement for this purpose (`is_genuine`)."""
        certificate = self._certificate_of(party)
        return certificate is not None and is_genuine(certificate, purpose, statement, signature)
