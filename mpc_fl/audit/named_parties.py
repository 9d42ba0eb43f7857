"""What the parties of a ledger are called: by the certificates in it, so that no configuration is needed to read it."""

from __future__ import annotations

from collections.abc import Iterable

from cryptography import x509

from mpc_fl.audit.reveal_ledger import Block
from mpc_fl.chosen_names import ChosenNames
from mpc_fl.crypto.certificates import UNSOUND, chosen_name, is_of_party
from mpc_fl.errors import IdentityError


def names_in(blocks: Iterable[Block | None], authority: x509.Certificate | None = None) -> ChosenNames:
    """The chosen names that certificates in these blocks bind, the last of each party.

    With `authority` only certificates that it issued count; without it the ledger is believed as it is.
    """
    found: dict[str, str] = {}
    for block in blocks:
        if block is None or block.members is None:
            continue
        for party, certificate_pem in block.members.certificates.items():
            name = _bound(certificate_pem, party, authority)
            if name is not None:
                found[party] = name
    return ChosenNames.readable(found)


def _bound(certificate_pem: str, party: str, authority: x509.Certificate | None) -> str | None:
    """The chosen name in a certificate of this party; None where it has none, or is no such certificate."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
        if authority is not None:
            certificate.verify_directly_issued_by(authority)
        return chosen_name(certificate.subject) if is_of_party(certificate, party) else None
    except (*UNSOUND, IdentityError):
        return None
