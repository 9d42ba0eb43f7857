"""Who signs for the parties of a test: identities of one authority, in a directory of the test."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509

from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.signatory import Signatory


def signatory_in(directory: Path, name: str, names: list[str]) -> Signatory:
    """Who signs for `name`, from identities that are there already, one directory for each of `names`."""
    identities = {each: load_identity(directory / each, each) for each in names}
    certificates = {each: x509.load_pem_x509_certificate(identities[each].certificate) for each in names}
    return Signatory(identities[name], certificates.get)


def signatories(names: list[str], directory: Path) -> dict[str, Signatory]:
    """A signatory for each party, who knows the certificates of all; their identities are made here."""
    make_local_identities(names, {name: directory / name for name in names})
    return {name: signatory_in(directory, name, names) for name in names}
