"""A party's identity on its disk: key, certificate, the authority's certificate and its revocation list, made and read.

A site makes its key with `make_request` and never gives it away; a run on one machine writes whole identities with
`write_identity`. `load_identity` trusts nothing that it reads: it checks modes, signatures, names and dates
(`certificates`). Every file is written whole and to the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mpc_fl.chosen_names import NO_NAMES, ChosenNames, check_chosen_name
from mpc_fl.crypto.certificates import (
    ASK_ADMINISTRATOR,
    REVOCATION_FILE,
    ROOT_FILE,
    UNSOUND,
    Identity,
    load_root,
    party_subject,
    plain_pem,
    private_key,
    revoked_serials,
    verify_certificate,
)
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import IdentityError
from mpc_fl.files import written_whole
from mpc_fl.roles import check_party_name, role_of


def make_key(directory: Path, name: str) -> ec.EllipticCurvePrivateKey:
    """Make a party's key and write it (mode 0600) to its directory; a new directory gets mode 0700.

    Raises `IdentityError` when the directory already holds a key of this party: a key in use is never overwritten.
    """
    path = directory / f"{name}.key"
    make_directory(directory)
    if os.path.lexists(path):
        raise IdentityError(f"{path} exists already", "choose another directory, or renew the certificate of this key")
    key = ec.generate_private_key(ec.SECP256R1())
    write_file(path, private_pem(key), 0o600)
    return key


def make_request(directory: Path, name: str, chosen: str | None = None) -> Path:
    """Make a party's key and a request (PKCS 10) for its certificate in its own directory; return the request's path.

    `chosen` is the name that the site wants to be known by.

    The key never leaves the directory: the request holds the public key, signed with the private one. Raises
    `IdentityError` for a name no party has or no site may choose, or when there is a key already.
    """
    if chosen is not None:
        check_chosen_name(chosen)
    key = make_key(directory, check_party_name(name))
    request = x509.CertificateSigningRequestBuilder().subject_name(party_subject(name, role_of(name), chosen=chosen))
    path = directory / f"{name}.csr"
    signed = request.sign(key, hashes.SHA256())
    write_file(path, signed.public_bytes(serialization.Encoding.PEM))
    return path


def make_directory(directory: Path) -> None:
    """Create a directory that only its owner can enter, unless it exists. Raises `IdentityError` when that fails."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise IdentityError(f"cannot create {directory}: {error.strerror}", "choose another directory") from None


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file whole or not at all, and to the disk. Raises `MpcFlError` when it cannot be written."""
    try:
        with written_whole(path, mode, durable=True) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise IdentityError(f"cannot write {path}: {error.strerror}", "check that you may write there") from None


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key in PEM (PKCS 8), not encrypted: for files of mode 0600 only."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write_identity(identity: Identity, directory: Path) -> None:
    """Write key (mode 0600) and certificates of one party; a new directory gets mode 0700."""
    make_directory(directory)
    write_file(directory / f"{identity.name}.key", identity.key, 0o600)
    write_certificates(directory, identity.name, identity.certificate, identity.authority, None)


def write_certificates(
    directory: Path, name: str, certificate: bytes, authority: bytes, revocations: bytes | None
) -> None:
    """Write the public part of an identity, all in PEM: what a site receives when it made its key itself."""
    make_directory(directory)
    if revocations is not None:
        write_file(directory / REVOCATION_FILE, revocations)
    write_file(directory / ROOT_FILE, authority)
    write_file(directory / f"{name}.crt", certificate)


def read_private(path: Path) -> bytes:
    """The content of a file that only its owner may read.

    Raises `IdentityError` when it is readable by others, and `OSError` when it cannot be read.
    """
    if path.stat().st_mode & 0o077:
        raise IdentityError(f"the file {path} can be read by other users", f"run: chmod 600 {path}")
    return path.read_bytes()


def sealing_key(directory: Path, name: str, purpose: str) -> Seed:
    """A key for what this party keeps on its disk for itself, from its private key: another for each purpose.

    Raises `IdentityError` when the private key can be read by others, or not at all.
    """
    path = directory / f"{name}.key"
    try:
        private = read_private(path)
    except OSError as error:
        raise IdentityError(f"cannot read {path}: {error.strerror}", ASK_ADMINISTRATOR) from None
    return Seed(hmac.new(private, b"mpc-fl seals " + purpose.encode(), hashlib.sha256).digest())


def load_identity(directory: Path, name: str, names: ChosenNames = NO_NAMES) -> Identity:
    """Read and check a party's identity. `names` are what parties are called: its own certificate must say so, too.

    Raises `IdentityError` when a file is missing, the key is readable by others, the key does not belong to the
    certificate, the revocation list is out of date or not of this authority, and for whatever `verify_certificate`
    refuses.
    """
    try:
        key_pem = read_private(directory / f"{name}.key")
        certificate_pem = (directory / f"{name}.crt").read_bytes()
        authority_pem = (directory / ROOT_FILE).read_bytes()
        revocations = directory / REVOCATION_FILE
        # A dangling link exists in this sense: it must fail, not count as "nothing revoked".
        list_pem = revocations.read_bytes() if os.path.lexists(revocations) else None
    except OSError as error:
        raise IdentityError(
            f"cannot read the identity of {name} in {directory}: {error.strerror}", ASK_ADMINISTRATOR
        ) from None
    authority = load_root(authority_pem, str(directory / ROOT_FILE))
    with contextlib.suppress(*UNSOUND):  # what it is instead, `verify_certificate` says
        certificate_pem = plain_pem(certificate_pem)
    revoked = frozenset[int]() if list_pem is None else revoked_serials(list_pem, authority)
    identity = Identity(name, certificate_pem, authority_pem, key_pem, revoked, names)
    certificate = verify_certificate(certificate_pem, name, identity)
    if private_key(key_pem, name).public_key() != certificate.public_key():
        raise IdentityError(f"the key of {name} does not belong to its certificate", ASK_ADMINISTRATOR)
    return identity
