"""What a certificate, a signature and a revocation list must say to be believed."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.chosen_names import ChosenNames
from mpc_fl.crypto.authority import Authority, make_local_identities
from mpc_fl.crypto.authority_directory import AuthorityDirectory, read_root
from mpc_fl.crypto.certificates import (
    REVOCATION_FILE,
    ROOT_FILE,
    Identity,
    host_name,
    sign,
    verify_certificate,
    verify_signature,
)
from mpc_fl.crypto.identity_files import load_identity, write_identity
from mpc_fl.errors import IdentityError

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
DAY = datetime.timedelta(days=1)


def pem(item: Any) -> bytes:
    return item.public_bytes(serialization.Encoding.PEM)


# ---- what verify_certificate refuses -----------------------------------------------------------------------------------


class Root:
    """An authority that signs whatever it is asked to."""

    def __init__(self, subject: str = "root") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
        extensions = {"constraints": x509.BasicConstraints(ca=True, path_length=0)}
        self.certificate = pem(self._sign(self.subject, self.key.public_key(), NOW - DAY, NOW + DAY, extensions))

    def _sign(self, subject: x509.Name, key: Any, start: Any, end: Any, extensions: dict[str, Any]) -> x509.Certificate:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self.subject).public_key(key)
        builder = builder.serial_number(extensions.get("serial", 7)).not_valid_before(start).not_valid_after(end)
        for extension in ("names", "constraints", "usage"):
            if extensions.get(extension) is not None:
                builder = builder.add_extension(extensions[extension], critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def certify(self, **changes: Any) -> bytes:
        """The certificate of hospital-0, but for the changes."""
        usage = {"digital_signature": True, "content_commitment": False, "key_encipherment": False,
                 "data_encipherment": False, "key_agreement": False, "key_cert_sign": False, "crl_sign": False,
                 "encipher_only": False, "decipher_only": False, **changes.get("usage_bits", {})}  # fmt: skip
        fields: dict[str, Any] = {
            "common_names": ["hospital-0"],
            "roles": ["hospital"],
            "key": ec.generate_private_key(ec.SECP256R1()).public_key(),
            "start": NOW - DAY,
            "end": NOW + DAY,
            "names": x509.SubjectAlternativeName([x509.DNSName(host_name("hospital-0"))]),
            "constraints": x509.BasicConstraints(ca=False, path_length=None),
            "usage": x509.KeyUsage(**usage),
            **changes,
        }
        subject = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role) for role in fields["roles"]]
        subject += [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in fields["common_names"]]
        subject += [x509.NameAttribute(NameOID.PSEUDONYM, name) for name in fields.get("chosen", [])]
        return pem(self._sign(x509.Name(subject), fields["key"], fields["start"], fields["end"], fields))


ROOT = Root()
TRUSTED = Identity("aggregator", b"", ROOT.certificate, b"", frozenset({99}))


def alternative(*names: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.DNSName(name) for name in names])


def test_a_sound_certificate_is_accepted() -> None:
    assert verify_certificate(ROOT.certify(), "hospital-0", TRUSTED).serial_number == 7


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "not valid PEM"),
    "no PEM": (lambda: b"hello", "not valid PEM"),
    "not ASCII": (lambda: b"\xff\x00" * 50, "not valid PEM"),
    "a key": (lambda: ROOT.certify().replace(b"CERTIFICATE", b"PUBLIC KEY"), "not valid PEM"),
    "cut off": (lambda: ROOT.certify()[:-200], "not valid PEM"),
    "text before it": (lambda: b"\x01" * 2000 + b"\n" + ROOT.certify(), "PEM with something beside it"),
    "text after it": (lambda: ROOT.certify() + "é\n".encode(), "PEM with something beside it"),
    "two of them": (lambda: ROOT.certify() * 2, "PEM with something beside it"),
    "another authority": (lambda: Root("other").certify(), "not signed by this federation"),
    "an authority that took the name": (lambda: Root("root").certify(), "not signed by this federation"),
    "the authority itself": (lambda: ROOT.certificate, "lacks what a party"),
    "expired": (lambda: ROOT.certify(end=NOW - DAY / 24), "expired on"),
    "not yet valid": (lambda: ROOT.certify(start=NOW + DAY / 24), "not valid before"),
    "revoked": (lambda: ROOT.certify(serial=99), "was revoked"),
    "another party": (lambda: ROOT.certify(common_names=["hospital-1"]), "does not name hospital-0"),
    "two names": (lambda: ROOT.certify(common_names=["hospital-0", "hospital-1"]), "does not name hospital-0"),
    "no name": (lambda: ROOT.certify(common_names=[]), "does not name hospital-0"),
    "another host": (lambda: ROOT.certify(names=alternative(host_name("hospital-1"))), "does not name hospital-0"),
    "two hosts": (
        lambda: ROOT.certify(names=alternative(host_name("hospital-0"), host_name("aggregator"))),
        "does not name hospital-0",
    ),
    "no host": (lambda: ROOT.certify(names=None), "lacks what a party"),
    "another role": (lambda: ROOT.certify(roles=["aggregator"]), "not for the role hospital"),
    "two roles": (lambda: ROOT.certify(roles=["hospital", "aggregator"]), "not for the role hospital"),
    "no role": (lambda: ROOT.certify(roles=[]), "not for the role hospital"),
    "no signatures": (lambda: ROOT.certify(usage_bits={"digital_signature": False}), "does not permit signatures"),
    "no usage": (lambda: ROOT.certify(usage=None), "lacks what a party"),
    "an authority": (lambda: ROOT.certify(constraints=x509.BasicConstraints(True, 0)), "is an authority's"),
    "perhaps an authority": (lambda: ROOT.certify(constraints=None), "lacks what a party"),
    "another curve": (lambda: ROOT.certify(key=ec.generate_private_key(ec.SECP384R1()).public_key()), "no P-256 key"),
    "RSA": (lambda: ROOT.certify(key=rsa.generate_private_key(65537, 2048).public_key()), "no P-256 key"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsound_certificate_is_refused(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(IdentityError, match=reason) as caught:
        verify_certificate(make(), "hospital-0", TRUSTED)
    assert "\n" not in str(caught.value)


NAMED = replace(TRUSTED, names=ChosenNames.of({"hospital-0": "charite", "hospital-1": "st-thomas"}))


@pytest.mark.parametrize(
    ("chosen", "trusted", "reason"),
    [
        (["charite"], NAMED, None),
        (["charite"], TRUSTED, None),  # a run that names nobody
        ([], TRUSTED, None),
        ([], NAMED, "binds no chosen name, and federation.names says 'charite'"),
        (["st-thomas"], NAMED, "binds the name 'st-thomas', and federation.names says 'charite'"),
        (["char1te"], NAMED, "binds the name 'char1te', and federation.names says 'charite'"),
        (["charite", "charite"], NAMED, "one chosen name, not several"),
        (["hospital-1"], TRUSTED, "reads like the identity of a party"),
        (["Dr. Who"], TRUSTED, "cannot be the name of a site"),
    ],
)
def test_a_certificate_binds_the_name_that_the_configuration_says(
    chosen: list[str], trusted: Identity, reason: str | None
) -> None:
    if reason is None:
        verify_certificate(ROOT.certify(chosen=chosen), "hospital-0", trusted)
        return
    with pytest.raises(IdentityError, match=reason) as refused:
        verify_certificate(ROOT.certify(chosen=chosen), "hospital-0", trusted)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("bound", ["st-thomas", "st-th0mas"])
def test_who_has_no_name_cannot_have_a_certificate_of_anothers(bound: str) -> None:
    trusted = replace(TRUSTED, names=ChosenNames.of({"hospital-1": "st-thomas"}))
    with pytest.raises(
        IdentityError, match=f"hospital-0 binds the name '{bound}', which federation.names has for hosp"
    ):
        verify_certificate(ROOT.certify(chosen=[bound]), "hospital-0", trusted)
    verify_certificate(ROOT.certify(chosen=["charite"]), "hospital-0", trusted)


def test_a_party_does_not_start_with_a_certificate_of_another_name(tmp_path: Path) -> None:
    names = ChosenNames.of({"hospital-0": "charite"})
    make_local_identities(["hospital-0"], {"hospital-0": tmp_path}, chosen=names)
    assert load_identity(tmp_path, "hospital-0", names).names == names
    with pytest.raises(IdentityError, match="binds the name 'charite', and federation.names says 'st-thomas'"):
        load_identity(tmp_path, "hospital-0", ChosenNames.of({"hospital-0": "st-thomas"}))


def broken_root(certificate: bytes) -> bytes:
    """The same certificate with one bit of its own signature changed, which no DER reader minds."""
    encoded = bytearray(x509.load_pem_x509_certificate(certificate).public_bytes(serialization.Encoding.DER))
    encoded[-1] ^= 1
    return pem(x509.load_der_x509_certificate(bytes(encoded)))


def test_a_root_whose_own_signature_does_not_verify_is_refused_wherever_it_is_read(tmp_path: Path) -> None:
    """On the old code each of these accepted it, but for the authority that is about to sign."""
    with pytest.raises(IdentityError, match="aggregator has is damaged or not an authority's: its own signature"):
        verify_certificate(
            ROOT.certify(), "hospital-0", Identity("aggregator", b"", broken_root(ROOT.certificate), b"")
        )
    party_as_root = Identity("aggregator", b"", ROOT.certify(), b"")
    with pytest.raises(IdentityError, match="not an authority's"):
        verify_certificate(ROOT.certify(), "hospital-0", party_as_root)
    site = tmp_path / "hospital-0"
    make_local_identities(["hospital-0"], {"hospital-0": site})
    sound = load_identity(site, "hospital-0")
    RevealLedger(tmp_path / "sound", sound)
    path = site / ROOT_FILE
    path.write_bytes(broken_root(path.read_bytes()))
    with pytest.raises(IdentityError, match=f"{path} is damaged or not an authority's"):
        load_identity(site, "hospital-0")
    with pytest.raises(IdentityError, match="its own signature does not verify"):
        RevealLedger(tmp_path / "ledger", replace(sound, authority=path.read_bytes()))
    fed = tmp_path / "fed"
    AuthorityDirectory.create(fed, "ward")
    (fed / ROOT_FILE).write_bytes(broken_root((fed / ROOT_FILE).read_bytes()))
    with pytest.raises(IdentityError, match=f"{fed / ROOT_FILE} is damaged.*restore it from a backup"):
        read_root(fed)


def test_a_hospitals_certificate_is_not_an_aggregators() -> None:
    with pytest.raises(IdentityError, match="does not name aggregator"):
        verify_certificate(ROOT.certify(), "aggregator", TRUSTED)
    renamed = ROOT.certify(common_names=["aggregator"], names=alternative(host_name("aggregator")))
    with pytest.raises(IdentityError, match="not for the role aggregator"):
        verify_certificate(renamed, "aggregator", TRUSTED)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_no_changed_byte_makes_a_certificate_say_something_else() -> None:
    original = x509.load_pem_x509_certificate(ROOT.certify())
    encoded = bytearray(original.public_bytes(serialization.Encoding.DER))
    refused = 0
    for position in range(len(encoded)):
        for flip in (0x01, 0x80):
            encoded[position] ^= flip
            text = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(encoded) + b"-----END CERTIFICATE-----\n"
            try:
                accepted = verify_certificate(text, "hospital-0", TRUSTED)
                # One byte of the encoding (how many bits the signature leaves unused) carries nothing.
                assert accepted.tbs_certificate_bytes == original.tbs_certificate_bytes
                assert accepted.signature == original.signature
            except IdentityError:
                refused += 1
            encoded[position] ^= flip
    assert refused >= 2 * len(encoded) - 1


# ---- signatures --------------------------------------------------------------------------------------------------------


def test_a_signature_holds_for_its_holder_purpose_and_message_only() -> None:
    authority = Authority(DAY)
    alice, bob = authority.issue("hospital-0"), authority.issue("hospital-1")
    certificate = verify_certificate(alice.certificate, "hospital-0", bob)
    other = verify_certificate(bob.certificate, "hospital-1", bob)
    signature = sign(alice, "greeting", b"message")
    verify_signature(certificate, "greeting", b"message", signature)
    verify_signature(certificate, "", b"", sign(alice, "", b""))
    refused: list[tuple[x509.Certificate, str, bytes, bytes]] = [
        (other, "greeting", b"message", signature),
        (certificate, "farewell", b"message", signature),
        (certificate, "greeting", b"massage", signature),
        (certificate, "greetin", b"gmessage", signature),  # the same bytes, cut elsewhere
        (certificate, "greetingmessage", b"", signature),
        (certificate, "", b"greetingmessage", signature),
        (certificate, "greeting", b"message", b""),
        (certificate, "greeting", b"message", signature[:-1]),
        (certificate, "greeting", b"message", signature + b"\x00"),
        (certificate, "greeting", b"message", bytes(len(signature))),
    ]
    for arguments in refused:
        with pytest.raises(IdentityError, match="does not verify"):
            verify_signature(*arguments)


def test_purpose_and_message_are_kept_apart() -> None:
    """A signature over the plain message, as another program would make it, is good for no purpose."""
    identity = Authority(DAY).issue("dealer")
    certificate = verify_certificate(identity.certificate, "dealer", identity)
    key = serialization.load_pem_private_key(identity.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    # If only the message had its length, this pair of (purpose, message) would give the same bytes as the other.
    inner = b"x" + (2).to_bytes(8, "little") + b"m2"
    outer = "p" + len(inner).to_bytes(8, "little").decode() + "x"
    with pytest.raises(IdentityError, match="does not verify"):
        verify_signature(certificate, outer, b"m2", sign(identity, "p", inner))
    for text in (b"purposemessage", b"message"):
        with pytest.raises(IdentityError, match="does not verify"):
            verify_signature(certificate, "purpose", b"message", key.sign(text, ec.ECDSA(hashes.SHA256())))


# ---- the directory of a party ------------------------------------------------------------------------------------------


def serial_of(identity: Identity) -> int:
    return x509.load_pem_x509_certificate(identity.certificate).serial_number


def test_a_party_honours_the_revocation_list_in_its_directory(tmp_path: Path) -> None:
    authority = Authority(DAY)
    alice, bob = authority.issue("hospital-0"), authority.issue("hospital-1")
    write_identity(alice, tmp_path)
    assert load_identity(tmp_path, "hospital-0").revoked == frozenset()
    revocations = tmp_path / REVOCATION_FILE

    revocations.write_bytes(authority.revocation_list({serial_of(bob): NOW}, 1, NOW + DAY))
    loaded = load_identity(tmp_path, "hospital-0")
    assert loaded.revoked == {serial_of(bob)}
    with pytest.raises(IdentityError, match="of hospital-1 was revoked"):
        verify_certificate(bob.certificate, "hospital-1", loaded)
    verify_certificate(bob.certificate, "hospital-1", alice)

    revocations.write_bytes(authority.revocation_list({serial_of(alice): NOW}, 2, NOW + DAY))
    with pytest.raises(IdentityError, match="of hospital-0 was revoked"):
        load_identity(tmp_path, "hospital-0")


def test_a_bad_revocation_list_stops_a_party(tmp_path: Path) -> None:
    authority = Authority(DAY)
    write_identity(authority.issue("dealer"), tmp_path)
    revocations = tmp_path / REVOCATION_FILE
    genuine = authority.revocation_list({}, 1, NOW + DAY)
    bad = {
        "out of date since .* fetch a new one": authority.revocation_list({5: NOW}, 1, NOW - DAY),
        "not signed by this federation": Authority(DAY).revocation_list({}, 1, NOW + DAY),
        "not a valid revocation list": genuine[:-100],
    }
    for reason, content in {**bad, "is not a valid revocation": b""}.items():
        revocations.write_bytes(content)
        with pytest.raises(IdentityError, match=reason):
            load_identity(tmp_path, "dealer")
    revocations.unlink()
    revocations.symlink_to(tmp_path / "gone")
    with pytest.raises(IdentityError, match="cannot read"):
        load_identity(tmp_path, "dealer")
    revocations.unlink()
    revocations.write_bytes(genuine)
    load_identity(tmp_path, "dealer")


def test_a_local_run_has_identities_that_believe_each_other(tmp_path: Path) -> None:
    names = ["hospital-0", "hospital-1", "aggregator"]
    make_local_identities(names, {name: tmp_path / name for name in names})
    loaded = {name: load_identity(tmp_path / name, name) for name in names}
    for one in loaded.values():
        for name, other in loaded.items():
            verify_certificate(other.certificate, name, one)
        assert "PRIVATE" not in repr(one)
        assert (tmp_path / one.name).stat().st_mode & 0o777 == 0o700
        assert (tmp_path / one.name / f"{one.name}.key").stat().st_mode & 0o777 == 0o600


def test_a_certificate_file_with_text_beside_it_is_read_as_the_certificate_alone(tmp_path: Path) -> None:
    """As openssl writes it, or with ends of lines of another system: peers are sent what they accept."""
    alice = Authority(DAY).issue("hospital-0")
    write_identity(alice, tmp_path)
    path = tmp_path / "hospital-0.crt"
    for content in (b"Certificate:\n  Data:\n" + alice.certificate, alice.certificate.replace(b"\n", b"\r\n")):
        path.write_bytes(content)
        assert load_identity(tmp_path, "hospital-0").certificate == alice.certificate
