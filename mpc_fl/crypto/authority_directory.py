"""The federation authority in a directory that only its administrator can enter, and its record of every certificate.

    authority.key   the signing key, mode 0600, sealed under a passphrase if one was given
    federation.crt  its self-signed certificate, which every site trusts
    federation.crl  the revoked certificates, which every site checks
    issued.jsonl    one line per certificate issued or revoked; lines are only ever added

Key and root certificate are made once, by `create`. Nothing makes them again: while one is missing or damaged, every
operation is refused until it is restored. Each file is replaced whole, and a lock keeps two commands from writing at once,
so a command that is killed leaves the state before or after it. A certificate is recorded before anybody gets it, and a
revocation before the list is written; `renew` and `revoke` finish what a killed command left undone.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from mpc_fl.chosen_names import check_chosen_name, look_alike
from mpc_fl.crypto.authority import Authority, federation_of, is_sealed, open_key
from mpc_fl.crypto.certificate_record import Issued, lines_of, now, parse_record
from mpc_fl.crypto.certificates import (
    REVOCATION_FILE,
    ROOT_FILE,
    load_root,
    pem,
    private_key,
    requested_name,
    verify_request,
    verify_revocation_list,
)
from mpc_fl.crypto.identity_files import make_directory, make_key, read_private, write_certificates, write_file
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import IdentityError, MpcFlError
from mpc_fl.roles import check_party_name

KEY_FILE = "authority.key"
RECORD_FILE = "issued.jsonl"
CERTIFICATE_DAYS = 30.0  # short, so that a stolen key is of use for weeks even where a revocation never arrives
ROOT_DAYS = 1825.0
_LOCK_DEADLINE = 30.0  # seconds
_RESTORE = "restore it from a backup of the authority's directory; it is never made anew"


# ---- reading, without the key ------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IdentityError(f"cannot read {path}: {error.strerror}", _RESTORE) from None


def read_root(directory: Path) -> x509.Certificate:
    """The authority's certificate. Raises `IdentityError` when there is none, or it is damaged."""
    path = directory / ROOT_FILE
    if not directory.is_dir() or not any(
        os.path.lexists(directory / name) for name in (ROOT_FILE, KEY_FILE, RECORD_FILE)
    ):
        raise IdentityError(f"{directory} is no federation authority", f"make one with: mpc-fl pki init {directory}")
    return load_root(_read(path), str(path), _RESTORE)


def needs_passphrase(directory: Path) -> bool:
    """Whether the authority's key is sealed. Raises `IdentityError` when there is none."""
    read_root(directory)
    return is_sealed(_read(directory / KEY_FILE))


def read_record(directory: Path, root: x509.Certificate) -> list[Issued]:
    """Every certificate issued, oldest first, with its last state. Raises `IdentityError` for a missing or damaged record."""
    return parse_record(_read(directory / RECORD_FILE), root)


def _read_revocations(directory: Path, root: x509.Certificate) -> x509.CertificateRevocationList | None:
    """The authority's own copy of its revocation list, `None` when it was never written."""
    path = directory / REVOCATION_FILE
    try:
        return verify_revocation_list(_read(path), root) if os.path.lexists(path) else None
    except IdentityError as error:
        raise IdentityError(
            f"{error.what} (in {directory})", "restore it, or remove it: the next revoke or renew writes it again"
        ) from None


def describe(directory: Path) -> dict[str, Any]:
    """The authority, its revocation list and every certificate, for people and machines; needs no key.

    Raises `IdentityError` when root certificate, record or list are missing or damaged.
    """
    root = read_root(directory)
    record = read_record(directory, root)
    revocations = _read_revocations(directory, root)
    listed = set() if revocations is None else {entry.serial_number for entry in revocations}
    until = None if revocations is None else revocations.next_update_utc
    return {
        "federation": federation_of(root),
        "sha256": root.fingerprint(hashes.SHA256()).hex(),
        "not_after": root.not_valid_after_utc.isoformat(),
        "key_sealed": needs_passphrase(directory),
        "revocation_list": {
            "not_after": None if until is None else until.isoformat(),
            "complete": listed == {item.certificate.serial_number for item in record if item.revoked},
        },
        "certificates": [{**item.summary(), "chosen_name": item.chosen_name} for item in record],
    }


# ---- with the key ------------------------------------------------------------------------------------------------------


class AuthorityDirectory:
    """A federation authority on disk. Make one with `create`, use it with `open_`."""

    def __init__(self, directory: Path, authority: Authority) -> None:
        self.directory = directory
        self._authority = authority

    @classmethod
    def create(
        cls, directory: Path, federation: str, days: float = ROOT_DAYS, passphrase: Private[bytes] | None = None
    ) -> AuthorityDirectory:
        """Make the authority of a new federation. The directory appears whole or not at all.

        Raises `IdentityError` when `directory` holds anything, an authority above all: that is never replaced.
        """
        directory = Path(os.path.realpath(directory))
        if not (federation.isprintable() and len(federation.strip()) >= 1 and len(federation) <= 64):
            raise IdentityError("the federation's name is not usable", "give 1 to 64 printable characters")
        if not 1 <= days <= 36500:
            raise IdentityError(f"an authority cannot be valid for {days:g} days", "give 1 to 36500")
        authority = Authority(datetime.timedelta(days=days), federation)
        key_file = authority.sealed_key(passphrase)
        made = cls(directory, authority)
        make_directory(directory.parent)
        temporary: Path | None = None
        try:
            made.directory = temporary = Path(
                tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent)
            )
            write_file(temporary / KEY_FILE, key_file, 0o600)
            write_file(temporary / ROOT_FILE, pem(authority.certificate))
            write_file(temporary / RECORD_FILE, b"", 0o600)
            made._write_revocations([])
            os.rename(temporary, directory)  # fails when `directory` exists and is not an empty directory
        except OSError as error:
            if any(os.path.lexists(directory / name) for name in (ROOT_FILE, KEY_FILE, RECORD_FILE)):
                raise IdentityError(
                    f"{directory} holds a federation authority already, and an authority is never replaced",
                    f"use it with: mpc-fl pki issue {directory} NAME, or give a new directory",
                ) from None
            raise IdentityError(
                f"cannot make an authority in {directory}: {error.strerror}", "give a new directory"
            ) from None
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        made.directory = directory
        return made

    @classmethod
    def open_(cls, directory: Path, passphrase: Private[bytes] | None = None) -> AuthorityDirectory:
        """Open an authority to issue, renew and revoke.

        Raises `IdentityError` when key, root certificate or record are missing, damaged or do not belong together, when
        the key can be read by others, when the passphrase is wrong, or when the authority has expired.
        """
        directory = Path(os.path.realpath(directory))
        root = read_root(directory)
        try:
            key_file = read_private(directory / KEY_FILE)
        except OSError as error:
            raise IdentityError(f"cannot read {directory / KEY_FILE}: {error.strerror}", _RESTORE) from None
        authority = Authority.restore(open_key(key_file, passphrase), root)
        if root.not_valid_after_utc <= now():
            raise IdentityError(
                f"the authority in {directory} has expired",
                "make a new one in a new directory and give every site its certificates",
            )
        read_record(directory, root)
        return cls(directory, authority)

    def issue(
        self,
        name: str,
        site: Path,
        days: float = CERTIFICATE_DAYS,
        request_pem: bytes | None = None,
        chosen: str | None = None,
    ) -> Issued:
        """Issue the certificate of a party that has none; write what its site needs into the directory `site`.

        With a request the site keeps its key; without one a key is made and written to `site`. The
        certificate binds `chosen`, or the name that the request asks for. Raises `IdentityError` for a name no party has, when
        there is a live certificate of this name (see `renew`), for a request that does not fit, for a key that was revoked or
        is another party's, and for a chosen name that no site may choose or that looks like another party's.
        """
        check_party_name(name)
        public_key = None if request_pem is None else verify_request(request_pem, name)
        chosen = _agreed_name(name, chosen, request_pem)
        with self._locked() as record:
            if any(item.name == name and item.state == "live" for item in record):
                raise IdentityError(
                    f"{name} has a certificate already",
                    f"extend it with: mpc-fl pki renew {self.directory} {name}, or revoke it first",
                )
            with contextlib.ExitStack() as undo:
                if public_key is None:
                    public_key = make_key(site, name).public_key()
                    undo.callback((site / f"{name}.key").unlink, missing_ok=True)
                issued = self._certify(record, name, public_key, days, site, chosen)
                undo.pop_all()
            self._deliver([*record, issued], issued, site)
        return issued

    def renew(
        self,
        name: str,
        site: Path,
        days: float = CERTIFICATE_DAYS,
        request_pem: bytes | None = None,
        chosen: str | None = None,
    ) -> Issued:
        """Issue a new certificate to a party that has or had one: for the same key, or for the one in the request.

        The old certificate stays valid until it expires, so a running site is not cut off. The new one binds the chosen name of
        the old one where neither `chosen` nor the request gives another. Raises `IdentityError` when
        there is nothing to renew (never issued, or revoked), and for requests and keys as `issue` does.
        """
        check_party_name(name)
        requested = None if request_pem is None else verify_request(request_pem, name)
        chosen = _agreed_name(name, chosen, request_pem)
        with self._locked() as record:
            held = [item for item in record if item.name == name and not item.revoked]
            if not held:
                raise IdentityError(
                    f"{name} has no certificate to renew", f"issue one with: mpc-fl pki issue {self.directory} {name}"
                )
            public_key = held[-1].certificate.public_key() if requested is None else requested
            issued = self._certify(record, name, public_key, days, site, chosen or held[-1].chosen_name)
            self._deliver([*record, issued], issued, site)
        return issued

    def revoke(self, name_or_serial: str) -> list[Issued]:
        """Revoke every certificate of a party, or the one with this serial number and all others of the same key.

        Writes a new revocation list in any case; it takes effect at a site when the site has it. Returns the certificates
        revoked now, none when all had been. Raises `IdentityError` when there is no such certificate.
        """
        serial = name_or_serial.lower().replace(":", "").removeprefix("0x").lstrip("0")
        with self._locked() as record:
            keys = {item.public_key for item in record if serial == item.serial}
            found = [item for item in record if item.name == name_or_serial or item.public_key in keys]
            if not found:
                raise IdentityError(
                    f"there is no certificate of '{name_or_serial[:64]}'",
                    f"see names and serial numbers with: mpc-fl pki show {self.directory}",
                )
            revoked = [Issued(item.certificate, True, now()) for item in found if not item.revoked]
            if revoked:
                self._append(revoked)
            changed = {item.serial: item for item in revoked}
            self._write_revocations([changed.get(item.serial, item) for item in record])
        return revoked

    def _certify(
        self, record: list[Issued], name: str, public_key: Any, days: float, site: Path, chosen: str | None
    ) -> Issued:
        """Certify a key and record the certificate, before anybody gets it."""
        if not 0 < days <= 36500:
            raise IdentityError(f"a certificate cannot be valid for {days:g} days", "give 1 to 36500")
        certificate = self._authority.certify(name, public_key, datetime.timedelta(days=days), chosen)
        issued = Issued(certificate, False, now())
        _require_own_name(record, name, chosen)
        another = f"make a new key with: mpc-fl pki request {name} --out NEW_DIR"
        for item in record:
            if item.public_key == issued.public_key and (item.revoked or item.name != name):
                reason = "was revoked" if item.revoked else f"belongs to {item.name}"
                raise IdentityError(f"the key for {name} {reason}", another)
        self._check_site(site, name, public_key)
        self._append([issued])
        return issued

    def _check_site(self, site: Path, name: str, public_key: Any) -> None:
        """Refuse to write a certificate beside another key, or to exchange the root that a site trusts."""
        another = "give another directory with --out"
        key_path, root_path = site / f"{name}.key", site / ROOT_FILE
        try:
            if os.path.lexists(key_path) and private_key(read_private(key_path), name).public_key() != public_key:
                raise IdentityError(f"{site} holds another key of {name}", another)
            if os.path.lexists(root_path) and root_path.read_bytes() != pem(self._authority.certificate):
                raise IdentityError(f"{site} belongs to another federation", another)
        except OSError as error:
            raise IdentityError(f"cannot read {site}: {error.strerror}", another) from None

    def _append(self, items: list[Issued]) -> None:
        path = self.directory / RECORD_FILE
        write_file(path, _read(path) + lines_of(items).encode("ascii"), 0o600)

    def _deliver(self, record: list[Issued], issued: Issued, site: Path) -> None:
        """Write a new revocation list, then certificate, root certificate and list into the site's directory."""
        try:
            revocations = self._write_revocations(record)
            write_certificates(
                site, issued.name, pem(issued.certificate), pem(self._authority.certificate), revocations
            )
        except MpcFlError as error:
            raise IdentityError(
                f"the certificate of {issued.name} was issued but not written: {error.what}",
                f"write it with: mpc-fl pki renew {self.directory} {issued.name}",
            ) from None

    def _write_revocations(self, record: list[Issued]) -> bytes:
        """Write the revocation list. It stays current as long as any live certificate, and at least 30 days."""
        root = self._authority.certificate
        previous = _read_revocations(self.directory, root)
        number = time.time_ns() // 1000  # grows even when the previous list was lost
        if previous is not None:
            last = previous.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            number = max(number, last + 1)
        ends = [item.certificate.not_valid_after_utc for item in record if item.state == "live"]
        until = max([now() + datetime.timedelta(days=CERTIFICATE_DAYS), *ends])
        revoked = {item.certificate.serial_number: item.at for item in record if item.revoked}
        content = self._authority.revocation_list(revoked, number, min(until, root.not_valid_after_utc))
        write_file(self.directory / REVOCATION_FILE, content)
        return content

    @contextlib.contextmanager
    def _locked(self) -> Iterator[list[Issued]]:
        """The record, while no other command can change it.

        Raises `IdentityError` when the record lacks a revocation that is in the list: then it is an old copy, and using it
        would make a revoked certificate good again.
        """
        descriptor = _lock(self.directory)
        try:
            root = self._authority.certificate
            record = read_record(self.directory, root)
            listed = _read_revocations(self.directory, root)
            revoked = {item.certificate.serial_number for item in record if item.revoked}
            if listed is not None and not {entry.serial_number for entry in listed} <= revoked:
                raise IdentityError(f"{self.directory / RECORD_FILE} lacks a revocation: it is an old copy", _RESTORE)
            yield record
        finally:
            os.close(descriptor)


def _agreed_name(name: str, chosen: str | None, request_pem: bytes | None) -> str | None:
    """The name that a certificate shall bind: what the administrator says and the site asks for, which must be one name."""
    asked = None if request_pem is None else requested_name(request_pem)
    if chosen is not None and asked is not None and chosen != asked:
        raise IdentityError(
            f"the request of {name} asks for the name '{asked}', not '{chosen}'",
            "leave out --chosen-name, or have the site make another request",
        )
    return asked if chosen is None else check_chosen_name(chosen)


def _require_own_name(record: list[Issued], name: str, chosen: str | None) -> None:
    """Raise `IdentityError` where a live certificate of another party binds a name that looks like `chosen`."""
    for item in record:
        held = item.chosen_name
        if item.state == "live" and item.name != name and held and chosen and look_alike(held, chosen):
            raise IdentityError(
                f"the name '{chosen}' looks like that of {item.name}, '{held}'", "agree on another name with the site"
            )


def _lock(directory: Path) -> int:
    """Lock the directory against other commands; closing the descriptor unlocks it, and so does the end of the process.

    Raises `IdentityError` when another command holds the lock for 30 s.
    """
    deadline = time.monotonic() + _LOCK_DEADLINE
    try:
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise IdentityError(f"cannot lock {directory}: {error.strerror}", "check that you may write there") from None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            if not isinstance(error, BlockingIOError) or time.monotonic() > deadline:
                os.close(descriptor)
                raise IdentityError(f"another command is using {directory}", "wait until it has ended") from None
            time.sleep(0.02)
