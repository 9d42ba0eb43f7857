"""Signing statements with a party's certificate key, and checking what other parties of a run signed.

The certificates are those that all parties of a run exchanged and checked against the authority when it began
(`audit.co_signing`), so a signature means the same to everybody, whoever passed it on.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography import x509

from mpc_fl.crypto.certificates import Identity, sign, verify_signature
from mpc_fl.errors import IdentityError

_LONGEST = 512  # hex digits of a DER signature on P-256 are at most 144


class Signatory:
    """This party's key, and the certificates of all; `certificate_of` says a party's, or that there is none (`None`)."""

    def __init__(self, identity: Identity, certificate_of: Callable[[str], x509.Certificate | None]) -> None:
        self._identity = identity
        self._certificate_of = certificate_of

    def sign(self, purpose: str, statement: bytes) -> str:
        """This party's signature (DER, as hex). Raises `IdentityError` when the identity holds no usable key."""
        return sign(self._identity, purpose, statement).hex()

    def is_genuine(self, party: str, purpose: str, statement: bytes, signature: object) -> bool:
        """Whether `party` signed this statement for this purpose; False for anything that is no signature."""
        certificate = self._certificate_of(party)
        if certificate is None or not isinstance(signature, str) or len(signature) > _LONGEST:
            return False
        try:
            verify_signature(certificate, purpose, statement, bytes.fromhex(signature))
        except (IdentityError, ValueError):
            return False
        return True
