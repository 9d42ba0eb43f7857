"""An authority that loses nothing, forges nothing and is never made twice: real files, real processes."""

from __future__ import annotations

import base64
import datetime
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mpc_fl.crypto.authority import open_key
from mpc_fl.crypto.authority_directory import KEY_FILE, RECORD_FILE, AuthorityDirectory, describe
from mpc_fl.crypto.certificate_record import Issued
from mpc_fl.crypto.certificates import (
    REVOCATION_FILE,
    ROOT_FILE,
    Identity,
    chosen_name,
    verify_certificate,
    verify_request,
)
from mpc_fl.crypto.identity_files import load_identity, make_request
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import IdentityError, MpcFlError

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
DAY = datetime.timedelta(days=1)
SPAWN = multiprocessing.get_context("spawn")
WORDS = "correct horse battery staple"


def pem(item: Any) -> bytes:
    return item.public_bytes(serialization.Encoding.PEM)


def serial_of(identity: Identity) -> int:
    return x509.load_pem_x509_certificate(identity.certificate).serial_number


def words(text: str = WORDS) -> Private[bytes]:
    return Private("passphrase", text.encode())


@pytest.fixture
def authority(tmp_path: Path) -> AuthorityDirectory:
    return AuthorityDirectory.create(tmp_path / "authority", "test federation")


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def states(authority: AuthorityDirectory) -> list[tuple[str, str]]:
    return [(item["name"], item["state"]) for item in describe(authority.directory)["certificates"]]


def test_an_issued_identity_works_and_its_files_are_private(authority: AuthorityDirectory, tmp_path: Path) -> None:
    site = tmp_path / "site"
    issued = authority.issue("hospital-0", site)
    loaded = load_identity(site, "hospital-0")
    assert loaded.revoked == frozenset()
    assert issued.certificate == x509.load_pem_x509_certificate(loaded.certificate)
    end = issued.certificate.not_valid_after_utc
    assert abs(end - NOW - 30 * DAY) < DAY / 24
    assert site.stat().st_mode & 0o777 == authority.directory.stat().st_mode & 0o777 == 0o700
    for path in (site / "hospital-0.key", authority.directory / KEY_FILE, authority.directory / RECORD_FILE):
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert sorted(path.name for path in site.iterdir()) == [
        "federation.crl", "federation.crt", "hospital-0.crt", "hospital-0.key",
    ]  # fmt: skip
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_certificate_never_outlives_the_authority(tmp_path: Path) -> None:
    authority = AuthorityDirectory.create(tmp_path / "authority", "short", days=2)
    root = x509.load_pem_x509_certificate((authority.directory / ROOT_FILE).read_bytes())
    issued = authority.issue("dealer", tmp_path / "site", days=30)
    assert issued.certificate.not_valid_after_utc == root.not_valid_after_utc
    listed = x509.load_pem_x509_crl((tmp_path / "site" / REVOCATION_FILE).read_bytes())
    assert listed.next_update_utc == root.not_valid_after_utc


def test_an_authority_is_never_made_twice(authority: AuthorityDirectory, tmp_path: Path) -> None:
    before = contents(authority.directory)
    with pytest.raises(IdentityError, match="holds a federation authority already"):
        AuthorityDirectory.create(authority.directory, "again")
    for name in (ROOT_FILE, KEY_FILE, RECORD_FILE):  # what is left of one counts as one
        (tmp_path / name).mkdir()
        shutil.copy(authority.directory / name, tmp_path / name)
        with pytest.raises(IdentityError, match="holds a federation authority already"):
            AuthorityDirectory.create(tmp_path / name, "again")
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("hello")
    with pytest.raises(IdentityError, match="cannot make an authority"):
        AuthorityDirectory.create(tmp_path / "full", "again")
    assert contents(authority.directory) == before
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "empty").mkdir()
    AuthorityDirectory.create(tmp_path / "empty", "first")
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", [KEY_FILE, ROOT_FILE, RECORD_FILE])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "another's"])
def test_a_damaged_authority_is_an_error_and_is_not_mended(
    name: str, damage: str, authority: AuthorityDirectory, tmp_path: Path
) -> None:
    authority.issue("dealer", tmp_path / "site")
    path = authority.directory / name
    other = AuthorityDirectory.create(tmp_path / "other", "test federation")
    other.issue("dealer", tmp_path / "other site")
    mode = path.stat().st_mode
    if damage == "missing":
        path.unlink()
    elif damage == "another's":
        shutil.copy(other.directory / name, path)
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-60])
        path.chmod(mode)
    if (name, damage) == (RECORD_FILE, "empty"):
        return  # an authority that has issued nothing looks like this; see the test of old copies
    before = contents(authority.directory)
    with pytest.raises(IdentityError):
        AuthorityDirectory.open_(authority.directory).issue("aggregator", tmp_path / "late")
    with pytest.raises(IdentityError):
        AuthorityDirectory.create(authority.directory, "test federation")
    assert contents(authority.directory) == before
    assert not (tmp_path / "late").exists()


def test_a_readable_key_is_refused(authority: AuthorityDirectory) -> None:
    (authority.directory / KEY_FILE).chmod(0o640)
    with pytest.raises(IdentityError, match="other users"):
        AuthorityDirectory.open_(authority.directory)


def test_a_sealed_key_needs_its_passphrase(tmp_path: Path) -> None:
    authority = AuthorityDirectory.create(tmp_path / "sealed", "sealed", passphrase=words())
    key_file = (authority.directory / KEY_FILE).read_bytes()
    AuthorityDirectory.open_(authority.directory, words()).issue("dealer", tmp_path / "site")
    with pytest.raises(IdentityError, match="is sealed"):
        AuthorityDirectory.open_(authority.directory)
    with pytest.raises(IdentityError, match="does not open"):
        AuthorityDirectory.open_(authority.directory, words(WORDS + "s"))
    key = open_key(key_file, words())
    secret = key.private_numbers().private_value.to_bytes(32, "big")
    assert secret not in base64.b64decode(b"".join(key_file.split(b"\n")[1:-2]))
    changed = bytearray(key_file)
    changed[100] ^= 1
    with pytest.raises(IdentityError, match="does not open|damaged"):
        open_key(bytes(changed), words())
    with pytest.raises(IdentityError, match="fewer than 12"):
        AuthorityDirectory.create(tmp_path / "weak", "weak", passphrase=words("too short"))
    assert not (tmp_path / "weak").exists()


@pytest.mark.parametrize(
    "name", ["", "hospital", "hospital-", "hospital-01", "hospital-1000", "hospital--1", "hospital-0\n", "HOSPITAL-0",
             "hospital-٣", "nurse", "../dealer", "dealer/", "federation authority"],
)  # fmt: skip
def test_only_parties_get_certificates(name: str, authority: AuthorityDirectory, tmp_path: Path) -> None:
    for act in (authority.issue, authority.renew):
        with pytest.raises(IdentityError, match="is no party name"):
            act(name, tmp_path / "site")
    with pytest.raises(IdentityError, match="is no party name"):
        make_request(tmp_path / "site", name)
    assert not (tmp_path / "site").exists()


# ---- issue, renew, revoke ----------------------------------------------------------------------------------------------


def test_a_site_that_asks_keeps_its_key(authority: AuthorityDirectory, tmp_path: Path) -> None:
    site, back = tmp_path / "site", tmp_path / "back"
    request = make_request(site, "hospital-1")
    key = (site / "hospital-1.key").read_bytes()
    assert (site / "hospital-1.key").stat().st_mode & 0o777 == 0o600
    authority.issue("hospital-1", back, request_pem=request.read_bytes())
    assert sorted(path.name for path in back.iterdir()) == ["federation.crl", "federation.crt", "hospital-1.crt"]
    for path in back.iterdir():
        shutil.copy(path, site)
    assert load_identity(site, "hospital-1").key == key
    with pytest.raises(IdentityError, match="exists already"):
        make_request(site, "hospital-1")
    assert (site / "hospital-1.key").read_bytes() == key


def test_a_request_is_believed_only_for_its_own_key_and_name(authority: AuthorityDirectory, tmp_path: Path) -> None:
    request = make_request(tmp_path / "site", "hospital-1").read_bytes()
    with pytest.raises(IdentityError, match="not made for hospital-2"):
        authority.issue("hospital-2", tmp_path / "back", request_pem=request)
    with pytest.raises(IdentityError, match="not valid PEM"):
        verify_request(request[:-100], "hospital-1")
    # Somebody else's public key in a request that is signed with one's own.
    signed = bytearray(x509.load_pem_x509_csr(request).public_bytes(serialization.Encoding.DER))
    own = x509.load_pem_x509_csr(request).public_key()
    stolen = ec.generate_private_key(ec.SECP256R1()).public_key()
    points = [
        key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
        for key in (own, stolen)
    ]
    forged = x509.load_der_x509_csr(bytes(signed).replace(points[0], points[1]))
    with pytest.raises(IdentityError, match="not signed with the key it holds"):
        verify_request(pem(forged), "hospital-1")
    names = x509.Name([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "aggregator"),
                       x509.NameAttribute(NameOID.COMMON_NAME, "hospital-1")])  # fmt: skip
    for curve, subject, reason in ((ec.SECP256R1(), names, "not made for"), (ec.SECP384R1(), names, "no P-256 key")):
        key = ec.generate_private_key(curve)
        made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
        with pytest.raises(IdentityError, match=reason):
            verify_request(pem(made), "hospital-1")
    assert states(authority) == []


def test_a_live_certificate_is_renewed_not_issued_again(authority: AuthorityDirectory, tmp_path: Path) -> None:
    site = tmp_path / "site"
    first = authority.issue("aggregator", site, days=2)
    key = (site / "aggregator.key").read_bytes()
    with pytest.raises(IdentityError, match="pki renew"):
        authority.issue("aggregator", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    second = authority.renew("aggregator", site)
    assert second.public_key == first.public_key and second.serial != first.serial
    assert second.certificate.not_valid_after_utc > first.certificate.not_valid_after_utc
    loaded = load_identity(site, "aggregator")
    assert loaded.key == key and serial_of(loaded) == int(second.serial, 16)
    verify_certificate(pem(first.certificate), "aggregator", loaded)  # until it ends
    with pytest.raises(IdentityError, match="no certificate to renew"):
        authority.renew("dealer", site)

    request = make_request(tmp_path / "new key", "aggregator").read_bytes()
    with pytest.raises(IdentityError, match="holds another key"):
        authority.renew("aggregator", site, request_pem=request)
    third = authority.renew("aggregator", tmp_path / "new key", request_pem=request)
    assert third.public_key != first.public_key
    load_identity(tmp_path / "new key", "aggregator")
    assert states(authority) == [("aggregator", "live")] * 3


def bound(site: Path, name: str) -> str | None:
    return chosen_name(x509.load_pem_x509_certificate(load_identity(site, name).certificate).subject)


def test_a_certificate_binds_the_name_that_its_site_chose(authority: AuthorityDirectory, tmp_path: Path) -> None:
    """By the request, or by the administrator; a renewed one keeps it, unless another is agreed on."""
    request = make_request(tmp_path / "site", "hospital-1", "charite").read_bytes()
    with pytest.raises(IdentityError, match="asks for the name 'charite', not 'st-thomas'"):
        authority.issue("hospital-1", tmp_path / "back", request_pem=request, chosen="st-thomas")
    assert authority.issue("hospital-1", tmp_path / "back", request_pem=request).chosen_name == "charite"
    shutil.copytree(tmp_path / "back", tmp_path / "site", dirs_exist_ok=True)
    assert bound(tmp_path / "site", "hospital-1") == "charite"
    authority.issue("hospital-2", tmp_path / "two", chosen="st-thomas")
    authority.renew("hospital-2", tmp_path / "two")
    assert bound(tmp_path / "two", "hospital-2") == "st-thomas"
    authority.renew("hospital-2", tmp_path / "two", chosen="guys")
    assert bound(tmp_path / "two", "hospital-2") == "guys"
    authority.issue("aggregator", tmp_path / "none")
    assert bound(tmp_path / "none", "aggregator") is None
    found = [(item["name"], item["chosen_name"]) for item in describe(authority.directory)["certificates"]]
    assert found == [("hospital-1", "charite"), *[("hospital-2", name) for name in ("st-thomas", "st-thomas", "guys")],
                     ("aggregator", None)]  # fmt: skip


@pytest.mark.parametrize("other", ["charite", "char1te", "cha-rite"])
def test_no_two_parties_are_certified_for_names_that_look_alike(
    authority: AuthorityDirectory, tmp_path: Path, other: str
) -> None:
    authority.issue("hospital-0", tmp_path / "one", chosen="charite")
    with pytest.raises(IdentityError, match=f"the name '{other}' looks like that of hospital-0, 'charite'"):
        authority.issue("hospital-1", tmp_path / "two", chosen=other)
    assert not (tmp_path / "two" / "hospital-1.crt").exists() and len(states(authority)) == 1
    authority.revoke("hospital-0")
    authority.issue("hospital-1", tmp_path / "two", chosen=other)  # nobody has it any more


def test_a_name_that_no_site_may_choose_is_not_certified(authority: AuthorityDirectory, tmp_path: Path) -> None:
    for name in ("hospital-1", "Charité"):
        with pytest.raises(IdentityError, match="reads like the identity|cannot be the name"):
            make_request(tmp_path / "site", "hospital-0", name)
        with pytest.raises(IdentityError, match="reads like the identity|cannot be the name"):
            authority.issue("hospital-0", tmp_path / "site", chosen=name)
    assert not (tmp_path / "site").exists() and states(authority) == []


def test_an_expired_certificate_can_be_renewed(authority: AuthorityDirectory, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    authority._append([Issued(authority._authority.certify("dealer", key.public_key(), -DAY), False, NOW - 2 * DAY)])
    assert states(authority) == [("dealer", "expired")]
    authority.renew("dealer", tmp_path / "site")
    assert states(authority) == [("dealer", "expired"), ("dealer", "live")]


def test_a_revoked_party_is_out_with_its_key(authority: AuthorityDirectory, tmp_path: Path) -> None:
    site = tmp_path / "hospital-0"
    authority.issue("hospital-0", site)
    authority.renew("hospital-0", site)
    authority.issue("aggregator", tmp_path / "aggregator")
    stolen = load_identity(site, "hospital-0")
    revoked = authority.revoke("hospital-0")
    assert len(revoked) == 2
    shutil.copy(authority.directory / REVOCATION_FILE, tmp_path / "aggregator")
    trusted = load_identity(tmp_path / "aggregator", "aggregator")
    assert trusted.revoked == {int(item.serial, 16) for item in revoked}
    with pytest.raises(IdentityError, match="was revoked"):
        verify_certificate(stolen.certificate, "hospital-0", trusted)
    with pytest.raises(IdentityError, match="no certificate to renew"):
        authority.renew("hospital-0", site)

    request = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "hospital"),
                   x509.NameAttribute(NameOID.COMMON_NAME, "hospital-0")])
    )  # fmt: skip
    key = serialization.load_pem_private_key(stolen.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    with pytest.raises(IdentityError, match="the key for hospital-0 was revoked"):
        authority.issue("hospital-0", tmp_path / "x", request_pem=pem(request.sign(key, hashes.SHA256())))
    authority.issue("hospital-0", tmp_path / "new")
    verify_certificate(load_identity(tmp_path / "new", "hospital-0").certificate, "hospital-0", trusted)
    assert states(authority) == [
        ("hospital-0", "revoked"), ("hospital-0", "revoked"), ("aggregator", "live"), ("hospital-0", "live"),
    ]  # fmt: skip


def test_a_serial_number_stands_for_its_key(authority: AuthorityDirectory, tmp_path: Path) -> None:
    first = authority.issue("dealer", tmp_path / "site")
    authority.renew("dealer", tmp_path / "site")
    request = make_request(tmp_path / "other", "dealer").read_bytes()
    authority.renew("dealer", tmp_path / "other", request_pem=request)
    written = ":".join(f"{first.certificate.serial_number:040X}"[start : start + 2] for start in range(0, 40, 2))
    assert [item.name for item in authority.revoke(written)] == ["dealer", "dealer"]
    assert [state for _, state in states(authority)] == ["revoked", "revoked", "live"]
    assert authority.revoke(first.serial) == []
    for nobody in ("hospital-5", "", "0", "abcdef", "0x"):
        with pytest.raises(IdentityError, match="there is no certificate"):
            authority.revoke(nobody)


def test_one_key_serves_one_party(authority: AuthorityDirectory, tmp_path: Path) -> None:
    authority.issue("hospital-0", tmp_path / "site")
    key = serialization.load_pem_private_key((tmp_path / "site" / "hospital-0.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "aggregator"),
                         x509.NameAttribute(NameOID.COMMON_NAME, "aggregator")])  # fmt: skip
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    with pytest.raises(IdentityError, match="belongs to hospital-0"):
        authority.issue("aggregator", tmp_path / "aggregator", request_pem=pem(request))


def test_a_site_never_changes_federation_unasked(authority: AuthorityDirectory, tmp_path: Path) -> None:
    site = tmp_path / "site"
    authority.issue("hospital-0", site)
    before = contents(site)
    other = AuthorityDirectory.create(tmp_path / "other", "test federation")
    with pytest.raises(IdentityError, match="belongs to another federation"):
        other.issue("aggregator", site)
    assert contents(site) == before and states(other) == []


# ---- the record --------------------------------------------------------------------------------------------------------


def test_the_record_only_grows_and_every_line_is_checked(authority: AuthorityDirectory, tmp_path: Path) -> None:
    path = authority.directory / RECORD_FILE
    seen = [path.read_bytes()]
    for act in (
        lambda: authority.issue("hospital-0", tmp_path / "a"),
        lambda: authority.issue("hospital-1", tmp_path / "b"),
        lambda: authority.renew("hospital-0", tmp_path / "a"),
        lambda: authority.revoke("hospital-1"),
    ):
        act()
        assert path.read_bytes().startswith(seen[-1]) and len(path.read_bytes()) > len(seen[-1])
        seen.append(path.read_bytes())
    lines = seen[-1].splitlines(keepends=True)
    first = json.loads(lines[0])
    assert set(first) >= {"serial", "name", "role", "not_before", "not_after", "sha256", "state"}
    wrong = [json.dumps({**first, name: "x"}).encode() + b"\n" for name in first]
    wrong += [b"{}\n", b"[]\n", b"\xff\n", b"\n", json.dumps({**first, "state": "revoked"}).encode() + b"\n"]
    for line in wrong:
        path.write_bytes(line + b"".join(lines[1:]))
        with pytest.raises(IdentityError, match="line 1 of the record"):
            describe(authority.directory)
    path.write_bytes(b"".join([lines[0], *lines]))
    with pytest.raises(IdentityError, match="line 2 of the record"):
        describe(authority.directory)
    path.write_bytes(seen[-1][:-1])
    with pytest.raises(IdentityError, match="cut off"):
        describe(authority.directory)


def test_an_old_copy_of_the_record_makes_no_revoked_certificate_good(
    authority: AuthorityDirectory, tmp_path: Path
) -> None:
    authority.issue("hospital-0", tmp_path / "site")
    path = authority.directory / RECORD_FILE
    old = path.read_bytes()
    authority.revoke("hospital-0")
    new = path.read_bytes()
    for content in (old, b""):
        path.write_bytes(content)
        assert describe(authority.directory)["revocation_list"]["complete"] is False
        for act in (authority.issue, authority.renew):
            with pytest.raises(IdentityError, match="old copy"):
                act("hospital-0", tmp_path / "again")
        with pytest.raises(IdentityError, match="old copy"):
            authority.revoke("hospital-0")
    path.write_bytes(new)
    authority.issue("hospital-0", tmp_path / "again")


def test_a_lost_list_is_written_again(authority: AuthorityDirectory, tmp_path: Path) -> None:
    issued = authority.issue("hospital-0", tmp_path / "site")
    authority.revoke("hospital-0")
    path = authority.directory / REVOCATION_FILE
    number = x509.load_pem_x509_crl(path.read_bytes()).extensions.get_extension_for_class(x509.CRLNumber).value
    path.unlink()
    assert describe(authority.directory)["revocation_list"]["complete"] is False
    assert authority.revoke("hospital-0") == []
    written = x509.load_pem_x509_crl(path.read_bytes())
    assert [entry.serial_number for entry in written] == [int(issued.serial, 16)]
    assert written.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number >= number.crl_number
    path.write_text("nonsense")
    with pytest.raises(IdentityError, match="remove it"):
        authority.revoke("hospital-0")


# ---- several commands at once, and commands that are cut off ------------------------------------------------------------


def _issue_all(directory: Path, sites: Path, names: list[str], start: Any, won: Any) -> None:
    authority = AuthorityDirectory.open_(directory)
    start.wait(60)
    for name in names:
        try:
            won.put((name, authority.issue(name, sites / name).serial))
        except IdentityError as error:
            assert "has a certificate already" in str(error), error
            won.put((name, None))


@pytest.mark.processes
def test_two_commands_at_once_lose_no_record(authority: AuthorityDirectory, tmp_path: Path) -> None:
    own = [[f"hospital-{number}" for number in range(first, first + 12)] for first in (0, 100)]
    shared = ["aggregator", "dealer", "model-owner"]
    start, won = SPAWN.Barrier(2), SPAWN.Queue()
    processes = [
        SPAWN.Process(target=_issue_all, args=(authority.directory, tmp_path / str(n), names + shared, start, won))
        for n, names in enumerate(own)
    ]
    for process in processes:
        process.start()
    results = [won.get(timeout=60) for _ in range(2 * (12 + 3))]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    winners = [(name, serial) for name, serial in results if serial is not None]
    assert sorted(name for name, _ in winners) == sorted([*own[0], *own[1], *shared])
    found = describe(authority.directory)["certificates"]
    assert sorted((item["name"], item["serial"]) for item in found) == sorted(winners)


@pytest.mark.processes
def test_two_authorities_are_not_made_at_once(tmp_path: Path) -> None:
    start, made = SPAWN.Barrier(2), SPAWN.Queue()
    processes = [SPAWN.Process(target=_create, args=(tmp_path / "authority", start, made)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [made.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    root = x509.load_pem_x509_certificate((tmp_path / "authority" / ROOT_FILE).read_bytes())
    assert sorted(results, key=str) == sorted(["refused", root.serial_number], key=str)
    AuthorityDirectory.open_(tmp_path / "authority")
    assert [path.name for path in tmp_path.iterdir()] == ["authority"]


def _create(directory: Path, start: Any, made: Any) -> None:
    start.wait(60)
    try:
        AuthorityDirectory.create(directory, "race")
        made.put(x509.load_pem_x509_certificate((directory / ROOT_FILE).read_bytes()).serial_number)
    except IdentityError:
        made.put("refused")


def test_a_write_that_fails_midway_leaves_the_old_state(authority: AuthorityDirectory, tmp_path: Path) -> None:
    """The kernel stops the write of the record after 10 of its new bytes: file size limit, as on a full disk."""
    for number in range(3):  # the record becomes the largest file, so that the limit stops it and nothing else
        authority.issue(f"hospital-{number}", tmp_path / f"hospital-{number}")
    size = (authority.directory / RECORD_FILE).stat().st_size
    before, sites = contents(authority.directory), contents(tmp_path / "hospital-0")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        for act in (
            lambda: authority.issue("dealer", tmp_path / "dealer"),
            lambda: authority.renew("hospital-0", tmp_path / "hospital-0"),
            lambda: authority.revoke("hospital-0"),
        ):
            with pytest.raises(MpcFlError, match="cannot write .*issued.jsonl"):
                act()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(authority.directory) == before
    assert contents(tmp_path / "hospital-0") == sites
    assert list((tmp_path / "dealer").iterdir()) == []  # not even the key that was made first
    authority.issue("dealer", tmp_path / "dealer")
    load_identity(tmp_path / "dealer", "dealer")


def _issue_for_ever(directory: Path, sites: Path) -> None:
    authority = AuthorityDirectory.open_(directory)
    for number in range(1000):
        name = f"hospital-{number}"
        authority.issue(name, sites / name)
        if number % 3 == 0:
            authority.revoke(name)


@pytest.mark.processes
def test_a_killed_command_leaves_a_whole_authority(authority: AuthorityDirectory, tmp_path: Path) -> None:
    process = SPAWN.Process(target=_issue_for_ever, args=(authority.directory, tmp_path / "sites"))
    process.start()
    deadline = time.monotonic() + 60
    while (authority.directory / RECORD_FILE).read_bytes().count(b"\n") < 10:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    reopened = AuthorityDirectory.open_(authority.directory)
    recorded = {item["sha256"] for item in describe(authority.directory)["certificates"]}
    assert len(recorded) >= 6
    for path in (tmp_path / "sites").rglob("hospital-*.crt"):  # nobody has a certificate that was not recorded
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        assert certificate.fingerprint(hashes.SHA256()).hex() in recorded
    reopened.revoke("hospital-0")
    assert describe(authority.directory)["revocation_list"]["complete"] is True
    reopened.issue("aggregator", tmp_path / "aggregator")
