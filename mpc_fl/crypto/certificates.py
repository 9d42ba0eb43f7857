"""Who a party is: a certificate of the federation's own authority, bound to the party's name and role.

ECDSA on P-256, which every TLS library and hardware token knows. Each party reads only its own directory: `<name>.key`
(mode 0600), `<name>.crt`, `federation.crt` (the authority's certificate) and, once there is one, `federation.crl` (the
serial numbers the authority has revoked, RFC 5280 section 5). `authority` makes the certificates, `identity_files` writes and
reads these files; this module checks them.
"""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mpc_fl.chosen_names import NO_NAMES, ChosenNames, check_chosen_name
from mpc_fl.errors import SAME_VERSION, IdentityError
from mpc_fl.roles import role_of

_DOMAIN = "mpc-fl.invalid"  # RFC 2606: never resolves, so a certificate can serve no other purpose
_LONGEST_PEM = 4096  # characters; those of this authority have about 900
CLOCK_SKEW = datetime.timedelta(minutes=5)
ROOT_FILE = "federation.crt"
REVOCATION_FILE = "federation.crl"
ASK_ADMINISTRATOR = "ask the federation's administrator for a certificate of this party"
# What parsing and checking X.509 raises on bytes that are no sound certificate, request or revocation list.
UNSOUND = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)


def host_name(name: str) -> str:
    """The DNS name in a party's certificate; peers verify it in the TLS hand-shake."""
    return f"{name}.{_DOMAIN}"


def party_subject(name: str, role: str, federation: str | None = None, chosen: str | None = None) -> x509.Name:
    """The subject of a certificate or request: federation (O; a request leaves it out), role (OU), party name (CN), and the
    name that its site chose, if it did (pseudonym, X.520; programs that know none read past it)."""
    fields = [
        (NameOID.ORGANIZATION_NAME, federation),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, role),
        (NameOID.COMMON_NAME, name),
        (NameOID.PSEUDONYM, chosen),
    ]
    return x509.Name([x509.NameAttribute(field, value) for field, value in fields if value is not None])


@dataclass(frozen=True)
class Identity:
    """A party's key and certificates in PEM. The key is secret and never shown.

    `revoked` holds the serial numbers of certificates that this party no longer accepts, `names` what the configuration calls
    parties: their certificates must say the same.
    """

    name: str
    certificate: bytes
    authority: bytes
    key: bytes = field(repr=False)
    revoked: frozenset[int] = frozenset()
    names: ChosenNames = NO_NAMES


# ---- checking a certificate --------------------------------------------------------------------------------------------


def load_root(root_pem: bytes, where: str, fix: str = ASK_ADMINISTRATOR) -> x509.Certificate:
    """The certificate of a federation's authority from its PEM; whoever reads one comes here, and says `where` it was.

    Raises `IdentityError` when it is not PEM, not signed with the key that it holds itself (so a changed bit is found, not who
    made it: only its fingerprint tells that), or not an authority's.
    """
    try:
        root = x509.load_pem_x509_certificate(root_pem)
    except UNSOUND:
        raise IdentityError(f"{where} is not a certificate in PEM", fix) from None
    try:
        root.verify_directly_issued_by(root)
        is_authority = root.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except UNSOUND:
        is_authority = False
    if not is_authority:
        raise IdentityError(f"{where} is damaged or not an authority's: its own signature does not verify", fix)
    return root


def verify_certificate(certificate_pem: bytes, name: str, trusted: Identity) -> x509.Certificate:
    """Check that the federation of `trusted` certified the party `name`; return the certificate.

    Pure, so that it means the same for a certificate from a TLS hand-shake and for one that came through a relay. Only
    a signature (`verify_signature`) shows that whoever sent the certificate also holds its key.

    Raises `IdentityError` when the certificate is not PEM, or PEM with something beside it, is not signed by the
    federation's authority, is expired, not yet valid or revoked, names another party or another role than the name implies,
    binds another chosen name than `trusted.names` has for the party, may not sign, or is an authority.
    """
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
    except UNSOUND:
        raise IdentityError(f"the certificate of {name} is not valid PEM", ASK_ADMINISTRATOR) from None
    if pem(certificate) != certificate_pem:
        # It goes into files that are read again: text beside it could make such a file one that nobody can read.
        raise IdentityError(f"the certificate of {name} is PEM with something beside it", ASK_ADMINISTRATOR)
    root = load_root(trusted.authority, f"the authority's certificate that {trusted.name} has")
    try:
        certificate.verify_directly_issued_by(root)
    except UNSOUND:
        raise IdentityError(
            f"the certificate of {name} is not signed by this federation's authority", ASK_ADMINISTRATOR
        ) from None
    now = datetime.datetime.now(datetime.UTC)
    if certificate.not_valid_before_utc > now:
        raise IdentityError(
            f"the certificate of {name} is not valid before {_date(certificate.not_valid_before_utc)}",
            "compare the clocks of the machines",
        )
    if certificate.not_valid_after_utc <= now:
        raise IdentityError(
            f"the certificate of {name} expired on {_date(certificate.not_valid_after_utc)}",
            "renew it with: mpc-fl pki renew",
        )
    if certificate.serial_number in trusted.revoked:
        raise IdentityError(f"the certificate of {name} was revoked", ASK_ADMINISTRATOR)
    try:
        _check_fields(certificate, name)
        _check_chosen_name(certificate, name, trusted.names)
    except UNSOUND:
        raise IdentityError(
            f"the certificate of {name} lacks what a party's certificate must say", ASK_ADMINISTRATOR
        ) from None
    return certificate


def received_pem(value: object, name: str) -> bytes:
    """The certificate that a message of `name` holds; `verify_certificate` checks it. Raises `IdentityError` for no short text."""
    if not isinstance(value, str) or len(value) > _LONGEST_PEM or not value.isascii():
        raise IdentityError(f"{name} sent no certificate", SAME_VERSION)
    return value.encode("ascii")


def pem(certificate: x509.Certificate) -> bytes:
    """A certificate in PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def plain_pem(certificate_pem: bytes) -> bytes:
    """A certificate as parties send it: its PEM without text beside it or other ends of lines. Raises one of `UNSOUND`."""
    return pem(x509.load_pem_x509_certificate(certificate_pem))


def is_of_party(certificate: x509.Certificate, name: str) -> bool:
    """Whether a certificate is that of a party of this name, whenever it is or was valid; who issued it is not checked.

    Raises one of `UNSOUND` for a missing extension.
    """
    try:
        _check_fields(certificate, name)
    except IdentityError:
        return False
    return True


def _check_fields(certificate: x509.Certificate, name: str) -> None:
    """Name, role, key and permitted use. Raises `IdentityError`, or one of `UNSOUND` for a missing extension."""
    extensions = certificate.extensions
    alternative_names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if _subject_values(certificate.subject, NameOID.COMMON_NAME) != [name] or list(alternative_names) != [
        x509.DNSName(host_name(name))
    ]:
        raise IdentityError(f"the certificate does not name {name}: it is another party's", ASK_ADMINISTRATOR)
    if _subject_values(certificate.subject, NameOID.ORGANIZATIONAL_UNIT_NAME) != [role_of(name)]:
        raise IdentityError(f"the certificate of {name} is not for the role {role_of(name)}", ASK_ADMINISTRATOR)
    if extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
        raise IdentityError(f"the certificate of {name} is an authority's", ASK_ADMINISTRATOR)
    if not extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature:
        raise IdentityError(f"the certificate of {name} does not permit signatures", ASK_ADMINISTRATOR)
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(f"the certificate of {name} holds no P-256 key", ASK_ADMINISTRATOR)


def chosen_name(subject: x509.Name) -> str | None:
    """The name that a party's site chose, by the subject of its certificate or request; None where it chose none.

    Raises `IdentityError` for several, and for one that no site may choose.
    """
    values = _subject_values(subject, NameOID.PSEUDONYM)
    if len(values) > 1:
        raise IdentityError("a certificate can bind one chosen name, not several", ASK_ADMINISTRATOR)
    return check_chosen_name(str(values[0])) if values else None


def _check_chosen_name(certificate: x509.Certificate, name: str, names: ChosenNames) -> None:
    """Raises `IdentityError` where the certificate binds another name than the party has, or the name of another party."""
    bound, expected = chosen_name(certificate.subject), names.get(name)
    if bound == expected:
        return
    fix = "have it renewed with the right one (mpc-fl pki renew --chosen-name), or correct federation.names everywhere"
    has = "no chosen name" if bound is None else f"the name '{bound}'"
    if expected is not None:
        raise IdentityError(f"the certificate of {name} binds {has}, and federation.names says '{expected}'", fix)
    holder = None if bound is None else names.holder(bound)
    if holder is not None:
        raise IdentityError(f"the certificate of {name} binds {has}, which federation.names has for {holder}", fix)


def _subject_values(subject: x509.Name, attribute: x509.ObjectIdentifier) -> list[str | bytes]:
    return [item.value for item in subject.get_attributes_for_oid(attribute)]


def _date(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def verify_revocation_list(list_pem: bytes, authority: x509.Certificate) -> x509.CertificateRevocationList:
    """Check that `authority` signed this revocation list; return it, whatever its age.

    Raises `IdentityError` when it is not PEM, or not of this authority.
    """
    fix = f"fetch {REVOCATION_FILE} from the federation's administrator again"
    try:
        revocations = x509.load_pem_x509_crl(list_pem)
    except UNSOUND:
        raise IdentityError(f"{REVOCATION_FILE} is not a valid revocation list", fix) from None
    try:
        genuine = revocations.issuer == authority.subject and revocations.is_signature_valid(
            authority.public_key()  # type: ignore[arg-type]  # any other kind of key raises TypeError
        )
    except UNSOUND:
        genuine = False
    if not genuine:
        raise IdentityError(f"{REVOCATION_FILE} is not signed by this federation's authority", fix)
    return revocations


def revoked_serials(list_pem: bytes, authority: x509.Certificate) -> frozenset[int]:
    """The serial numbers in a revocation list that is genuine and current.

    Raises `IdentityError` when it is not PEM, not of this authority, or out of date: then it may lack a revocation.
    """
    revocations = verify_revocation_list(list_pem, authority)
    until = revocations.next_update_utc
    if until is None or until <= datetime.datetime.now(datetime.UTC):
        since = "" if until is None else f" since {_date(until)}"
        raise IdentityError(
            f"{REVOCATION_FILE} is out of date{since}", "fetch a new one from the federation's administrator"
        )
    return frozenset(entry.serial_number for entry in revocations)


# ---- signatures --------------------------------------------------------------------------------------------------------


def _signed_bytes(purpose: str, message: bytes) -> bytes:
    """Injective: lengths come first, so no other (purpose, message) gives these bytes."""
    words = purpose.encode()
    return (
        b"mpc-fl signature 1" + len(words).to_bytes(4, "little") + words + len(message).to_bytes(8, "little") + message
    )


def sign(identity: Identity, purpose: str, message: bytes) -> bytes:
    """Sign `message` for one purpose with the party's key: ECDSA on P-256 with SHA-256 (FIPS 186-5), DER-encoded.

    Raises `IdentityError` when the identity holds no usable key.
    """
    return private_key(identity.key, identity.name).sign(_signed_bytes(purpose, message), ec.ECDSA(hashes.SHA256()))


def verify_signature(certificate: x509.Certificate, purpose: str, message: bytes, signature: bytes) -> None:
    """Check that the holder of `certificate` signed this message for this purpose.

    `certificate` comes from `verify_certificate`. Raises `IdentityError` when the signature is not its holder's, or is
    over another message or purpose.
    """
    key = certificate.public_key()
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise TypeError
        key.verify(signature, _signed_bytes(purpose, message), ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, TypeError, ValueError):
        raise IdentityError(f"a signature for '{purpose}' does not verify", SAME_VERSION) from None


# ---- asking for a certificate ------------------------------------------------------------------------------------------


def key_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key (DER, SubjectPublicKeyInfo) in groups of four digits, for two people to compare."""
    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return " ".join(hashlib.sha256(encoded).hexdigest()[start : start + 4] for start in range(0, 64, 4))


def verify_request(request_pem: bytes, name: str) -> ec.EllipticCurvePublicKey:
    """Check a request for the certificate of `name`; return the public key to certify.

    Raises `IdentityError` when it is not PEM, not signed with the key it holds, or made for another name or role.
    """
    fix = f"make a request with: mpc-fl pki request {name}"
    try:
        request = x509.load_pem_x509_csr(request_pem)
        key, genuine = request.public_key(), request.is_signature_valid
    except UNSOUND:
        raise IdentityError(f"the request for {name} is not valid PEM", fix) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(f"the request for {name} holds no P-256 key", fix)
    if not genuine:
        raise IdentityError(f"the request for {name} is not signed with the key it holds", fix)
    if request.subject != party_subject(name, role_of(name), chosen=chosen_name(request.subject)):
        raise IdentityError(f"the request was not made for {name}", fix)
    return key


def requested_name(request_pem: bytes) -> str | None:
    """The name that a request asks to have bound, None for none; `verify_request` has checked the request."""
    return chosen_name(x509.load_pem_x509_csr(request_pem).subject)


def private_key(key_pem: bytes, name: str) -> ec.EllipticCurvePrivateKey:
    """The key of a party from its PEM. Raises `IdentityError` when it is none."""
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except UNSOUND:
        raise IdentityError(f"the key of {name} is not valid PEM", ASK_ADMINISTRATOR) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"the key of {name} is not a P-256 key", ASK_ADMINISTRATOR)
    return key
