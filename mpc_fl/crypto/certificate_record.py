"""The authority's record of its certificates: one JSON line per certificate issued or revoked, lines are only ever added.

Every line holds the certificate itself, so its signature and its other fields must agree. Reading needs no key.
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from mpc_fl.crypto.certificates import UNSOUND, chosen_name
from mpc_fl.errors import IdentityError
from mpc_fl.parsing import parse_json
from mpc_fl.roles import role_of


@dataclass(frozen=True)
class Issued:
    """A certificate that the authority issued, and whether it was revoked; `at` is the time of the last of the two."""

    certificate: x509.Certificate
    revoked: bool
    at: datetime.datetime

    @property
    def name(self) -> str:
        """The party's name."""
        return str(self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)

    @property
    def chosen_name(self) -> str | None:
        """The name that the party's site chose, None where it chose none."""
        return chosen_name(self.certificate.subject)

    @property
    def serial(self) -> str:
        """The serial number in hexadecimal."""
        return f"{self.certificate.serial_number:x}"

    @property
    def public_key(self) -> bytes:
        """The certified key in DER, to compare."""
        return self.certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def state(self) -> str:
        """'live', 'expired' or 'revoked'."""
        if self.revoked:
            return "revoked"
        return "live" if self.certificate.not_valid_after_utc > now() else "expired"

    def summary(self) -> dict[str, str]:
        """What can be shown: serial, name, role, validity (ISO 8601, UTC), SHA-256 fingerprint, state."""
        return {
            "serial": self.serial,
            "name": self.name,
            "role": role_of(self.name),
            "not_before": self.certificate.not_valid_before_utc.isoformat(),
            "not_after": self.certificate.not_valid_after_utc.isoformat(),
            "sha256": self.certificate.fingerprint(hashes.SHA256()).hex(),
            "state": self.state,
        }

    def line(self) -> str:
        """The line of the record."""
        encoded = base64.b64encode(self.certificate.public_bytes(serialization.Encoding.DER)).decode("ascii")
        state = {"state": "revoked" if self.revoked else "issued", "at": self.at.isoformat()}
        return json.dumps({**self.summary(), **state, "certificate": encoded}) + "\n"


def now() -> datetime.datetime:
    """The time in UTC, to the second, as certificates have it."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def lines_of(items: Sequence[Issued]) -> str:
    """The lines to add to the record."""
    return "".join(item.line() for item in items)


def parse_record(content: bytes, root: x509.Certificate) -> list[Issued]:
    """Every certificate in a record, oldest first, with its last state.

    Raises `IdentityError` naming the line that is cut off, damaged, not certified by `root`, issues a certificate twice
    or revokes one that was never issued.
    """
    fix = "restore the record from a backup of the authority's directory"
    issued: dict[int, Issued] = {}
    *lines, rest = content.split(b"\n")
    if rest:
        raise IdentityError("the last line of the record of certificates is cut off", fix)
    for number, line in enumerate(lines, 1):
        try:
            item = _parse_line(line, root)
        except (*UNSOUND, KeyError, IndexError):
            raise IdentityError(f"line {number} of the record of certificates is damaged", fix) from None
        if item.revoked != (item.certificate.serial_number in issued):
            raise IdentityError(f"line {number} of the record of certificates is out of order", fix)
        issued[item.certificate.serial_number] = item
    return list(issued.values())


def _parse_line(line: bytes, root: x509.Certificate) -> Issued:
    """Raises one of `UNSOUND`, `KeyError` or `IndexError` when the line is not exactly what `Issued.line` writes."""
    fields = parse_json(line)
    certificate = x509.load_der_x509_certificate(base64.b64decode(fields["certificate"], validate=True))
    certificate.verify_directly_issued_by(root)
    item = Issued(certificate, fields["state"] == "revoked", datetime.datetime.fromisoformat(fields["at"]))
    if json.loads(item.line()) != fields:
        raise ValueError
    return item
