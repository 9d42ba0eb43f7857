"""The federation authority: one key that certifies the parties and revokes their certificates (X.509, RFC 5280).

A local run makes an `Authority` in memory, issues one short-lived certificate per party and forgets the authority's
key. A federation keeps its authority in a directory (`authority_directory`), the key sealed under a passphrase.
"""

from __future__ import annotations

import base64
import datetime
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mpc_fl.chosen_names import NO_NAMES, ChosenNames
from mpc_fl.crypto.certificates import CLOCK_SKEW, UNSOUND, Identity, host_name, load_root, party_subject, pem
from mpc_fl.crypto.identity_files import private_pem, write_identity
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import IdentityError
from mpc_fl.roles import role_of

SHORTEST_PASSPHRASE = 12
_SEALED = re.compile(rb"-----BEGIN MPC-FL SEALED KEY-----\n(.+)\n-----END MPC-FL SEALED KEY-----\n", re.DOTALL)
_SEAL_CONTEXT = b"mpc-fl authority key 1: scrypt n=2^17 r=8 p=1, AES-256-GCM"


class Authority:
    """A signing key and its self-signed certificate. The key leaves only through `sealed_key`."""

    def __init__(self, lifetime: datetime.timedelta, federation: str = "mpc-fl federation") -> None:
        """Make a fresh key and its certificate for a federation of this name."""
        self._key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        subject = party_subject("federation authority", "authority", federation)
        self._federation = federation
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .add_extension(_key_usage(sign_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @classmethod
    def restore(cls, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Authority:
        """The authority that made this certificate with this key. Raises `IdentityError` when they do not fit."""
        fix = "restore both files of the authority from a backup"
        load_root(pem(certificate), "the root certificate", fix)
        if key.public_key() != certificate.public_key():
            raise IdentityError("the authority's key does not belong to its root certificate", fix)
        authority = cls.__new__(cls)
        authority._key, authority.certificate = key, certificate
        authority._federation = federation_of(certificate)
        return authority

    def certify(
        self,
        name: str,
        public_key: ec.EllipticCurvePublicKey,
        lifetime: datetime.timedelta,
        chosen: str | None = None,
    ) -> x509.Certificate:
        """A certificate that binds a public key to a party's name and role, and to the name that its site chose.

        It never outlives the authority's own.
        """
        now = datetime.datetime.now(datetime.UTC)
        key_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(party_subject(name, role_of(name), self._federation, chosen))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, now + lifetime) - CLOCK_SKEW)
            .not_valid_after(min(now + lifetime, self.certificate.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host_name(name))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(sign_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(key_identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def issue(self, name: str, lifetime: datetime.timedelta | None = None, chosen: str | None = None) -> Identity:
        """A fresh key and its certificate, valid as long as the authority's own unless `lifetime` is shorter.

        A negative lifetime makes an expired certificate, for tests.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        rest = self.certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        certificate = self.certify(name, key.public_key(), rest if lifetime is None else lifetime, chosen)
        return Identity(name, pem(certificate), pem(self.certificate), private_pem(key))

    def revocation_list(self, revoked: Mapping[int, datetime.datetime], number: int, until: datetime.datetime) -> bytes:
        """A signed list (PEM) of the revoked serial numbers and when, current until a newer one is due.

        `number` grows from one list to the next.
        """
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(min(now, until) - CLOCK_SKEW)
            .next_update(until)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        for serial, moment in revoked.items():
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def sealed_key(self, passphrase: Private[bytes] | None) -> bytes:
        """The key for a file of mode 0600: plain PEM, or sealed when there is a passphrase (`open_key` reads both).

        scrypt (RFC 7914; 128 MiB, because a stolen file can be tried offline) and AES-256-GCM. The encryption that PKCS 8
        and PKCS 12 files get from `cryptography` rests on 2048 rounds of a plain hash. Raises `IdentityError` for a
        passphrase under 12 bytes.
        """
        if passphrase is None:
            return private_pem(self._key)
        if len(passphrase.inside_protocol()) < SHORTEST_PASSPHRASE:
            raise IdentityError(
                f"the passphrase has fewer than {SHORTEST_PASSPHRASE} characters", "use several words nobody can guess"
            )
        salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
        sealed = AESGCM(_sealing_key(passphrase, salt)).encrypt(nonce, private_pem(self._key), _SEAL_CONTEXT)
        text = base64.encodebytes(salt + nonce + sealed).strip()
        return b"-----BEGIN MPC-FL SEALED KEY-----\n" + text + b"\n-----END MPC-FL SEALED KEY-----\n"


def _sealing_key(passphrase: Private[bytes], salt: bytes) -> bytes:
    return Scrypt(salt=salt, length=32, n=1 << 17, r=8, p=1).derive(passphrase.inside_protocol())


def is_sealed(key_file: bytes) -> bool:
    """Whether a key file needs a passphrase."""
    return _SEALED.fullmatch(key_file) is not None


def open_key(key_file: bytes, passphrase: Private[bytes] | None) -> ec.EllipticCurvePrivateKey:
    """The key in the bytes that `Authority.sealed_key` made.

    Raises `IdentityError` when they are damaged, or when the passphrase is missing or wrong.
    """
    damaged = IdentityError("the authority's key is damaged", "restore it from a backup")
    sealed = _SEALED.fullmatch(key_file)
    if sealed is not None:
        if passphrase is None:
            raise IdentityError("the authority's key is sealed", "give its passphrase")
        try:
            content = base64.b64decode(sealed[1].replace(b"\n", b""), validate=True)
            cipher = AESGCM(_sealing_key(passphrase, content[:16]))
            key_file = cipher.decrypt(content[16:28], content[28:], _SEAL_CONTEXT)
        except InvalidTag:
            raise IdentityError(
                "the passphrase does not open the authority's key", "try again, or restore the key from a backup"
            ) from None
        except ValueError:
            raise damaged from None
    try:
        key = serialization.load_pem_private_key(key_file, password=None)
    except UNSOUND:
        raise damaged from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise damaged
    return key


def federation_of(certificate: x509.Certificate) -> str:
    """The federation's name (O) in a certificate, or an empty string."""
    names = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return str(names[0].value) if names else ""


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


def make_local_identities(
    names: Iterable[str], directory_of: dict[str, Path], hours: float = 24.0, chosen: ChosenNames = NO_NAMES
) -> None:
    """Make an authority for one local run and write an identity into each party's own directory, with its chosen name."""
    authority = Authority(datetime.timedelta(hours=hours))
    for name in names:
        write_identity(authority.issue(name, chosen=chosen.get(name)), directory_of[name])
