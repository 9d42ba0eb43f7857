"""Who a party is: a certificate of the federation's own authority, bound to the party's name and role.

ECDSA on P-256 (gRPC's TLS library accepts no Ed25519 certificates). A local run makes an authority in memory, issues one
short-lived certificate per party and forgets the authority's key. Key files have mode 0600 and each party reads only
its own directory: `<name>.key`, `<name>.crt`, `federation.crt`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mpc_fl.errors import IdentityError

DOMAIN = "mpc-fl.invalid"  # RFC 2606: never resolves, so a certificate can serve no other purpose
_CLOCK_SKEW = datetime.timedelta(minutes=5)


def role_of(name: str) -> str:
    """The role a party name implies: 'hospital-2' -> 'hospital'."""
    return name.rsplit("-", 1)[0] if name.startswith("hospital-") else name


def host_name(name: str) -> str:
    """The DNS name in a party's certificate; peers verify it in the TLS hand-shake."""
    return f"{name}.{DOMAIN}"


@dataclass(frozen=True)
class Identity:
    """A party's key and certificates in PEM. The key is secret and never shown."""

    name: str
    certificate: bytes
    authority: bytes
    key: bytes = field(repr=False)


def _subject(name: str, role: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "mpc-fl federation"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


class Authority:
    """A federation authority held in memory; its key is never written."""

    def __init__(self, lifetime: datetime.timedelta) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._lifetime = lifetime
        now = datetime.datetime.now(datetime.timezone.utc)
        subject = _subject("federation authority", "authority")
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .add_extension(_key_usage(sign_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def issue(self, name: str, lifetime: datetime.timedelta | None = None) -> Identity:
        """A fresh key and a certificate for the party `name`. A negative lifetime makes an expired one, for tests."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.timezone.utc)
        lifetime = self._lifetime if lifetime is None else lifetime
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_subject(name, role_of(name)))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, now + lifetime) - _CLOCK_SKEW)
            .not_valid_after(now + lifetime)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host_name(name))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(sign_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Identity(name, _pem(certificate), _pem(self._certificate), private)


def _key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def write_identity(identity: Identity, directory: Path) -> None:
    """Write key (mode 0600) and certificates of one party; the directory is created with mode 0700."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, content, mode in (
        (f"{identity.name}.key", identity.key, 0o600),
        (f"{identity.name}.crt", identity.certificate, 0o644),
        ("federation.crt", identity.authority, 0o644),
    ):
        temporary = directory / f".{name}.partial"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, directory / name)


def make_local_identities(names: Iterable[str], directory_of: dict[str, Path], hours: float = 24.0) -> None:
    """Make an authority for one local run and write an identity into each party's own directory."""
    authority = Authority(datetime.timedelta(hours=hours))
    for name in names:
        write_identity(authority.issue(name), directory_of[name])


def load_identity(directory: Path, name: str) -> Identity:
    """Read and check a party's identity.

    Raises `IdentityError` when a file is missing, the key is readable by others, the key does not belong to the
    certificate, the certificate is expired, names another party, or is not signed by the federation's authority.
    """
    fix = "ask the federation's administrator for a certificate for this party"
    try:
        key_path = directory / f"{name}.key"
        key_pem = key_path.read_bytes()
        certificate_pem = (directory / f"{name}.crt").read_bytes()
        authority_pem = (directory / "federation.crt").read_bytes()
        mode = key_path.stat().st_mode & 0o077
    except OSError as error:
        raise IdentityError(f"cannot read the identity of {name} in {directory}: {error.strerror}", fix) from None
    if mode:
        raise IdentityError(f"the key file {key_path} can be read by other users", f"run: chmod 600 {key_path}")
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        authority = x509.load_pem_x509_certificate(authority_pem)
    except (ValueError, TypeError):
        raise IdentityError(f"the identity of {name} in {directory} is not valid PEM", fix) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise IdentityError(f"the key of {name} does not belong to its certificate", fix)
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise IdentityError(
            f"the certificate of {name} is not of this federation ({type(error).__name__})", fix
        ) from None
    if certificate.not_valid_after_utc <= datetime.datetime.now(datetime.timezone.utc):
        raise IdentityError(
            f"the certificate of {name} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M}", fix
        )
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if host_name(name) not in names.get_values_for_type(x509.DNSName):
        raise IdentityError(f"the certificate in {directory} does not name {name}", fix)
    return Identity(name, certificate_pem, authority_pem, key_pem)
