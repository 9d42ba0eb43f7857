"""`mpc-fl pki init | issue | request | show | renew | revoke`: who belongs to the federation."""

from __future__ import annotations

import getpass
import warnings
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from mpc_fl.apps.cli.options import AsJson, Command, Group, print_json, say
from mpc_fl.crypto import authority_directory as directories
from mpc_fl.crypto import certificates as identity
from mpc_fl.crypto import identity_files
from mpc_fl.crypto.authority_directory import AuthorityDirectory
from mpc_fl.crypto.certificate_record import Issued
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import IdentityError

app = typer.Typer(
    cls=Group,
    name="pki",
    no_args_is_help=True,
    add_completion=False,
    help="""Decide who belongs to the federation: its authority and certificates.

    One administrator keeps the authority in a directory of its own, best on
    a machine that runs no party. Every party proves by a certificate of this
    authority that it is hospital-0, hospital-1, ..., aggregator, dealer or
    model-owner. From nothing to a federation:

    1. The administrator, once: mpc-fl pki init DIR

    2. Each site: mpc-fl pki request NAME --out SITE_DIR,
    and sends the .csr file to the administrator, never the .key.

    3. The administrator: mpc-fl pki issue DIR NAME --request FILE,
    and sends three files back, which the site puts into SITE_DIR.

    4. Each site: mpc-fl party ROLE --identity SITE_DIR ...

    Certificates live 30 days; before they end: mpc-fl pki renew DIR NAME.
    When a key may be in wrong hands: mpc-fl pki revoke DIR NAME, and give
    federation.crl to every site.
    """,
)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The authority's directory.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="hospital-<n>, aggregator, dealer or model-owner")]
Site = Annotated[
    Path | None,
    typer.Option("--out", metavar="SITE_DIR", help="Where to write the site's files. Default: DIR/sites/NAME."),
]
Days = Annotated[float, typer.Option(min=0.01, help="How long the certificate lives; never longer than the authority.")]
ChosenName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Name that the site chose, like charite; bound by the certificate, shown in reports."
    ),
]
Request = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The site's request (.csr); its key then stays where it is.")
]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Read the authority's passphrase from a file of mode 0600 instead of asking."),
]


@app.command(cls=Command)
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New directory for the authority.")],
    federation: Annotated[
        str, typer.Option("--name", help="Name of the federation, in every certificate.")
    ] = "mpc-fl federation",
    days: Annotated[float, typer.Option(min=1, help="How long the authority lives.")] = directories.ROOT_DAYS,
    passphrase_file: PassphraseFile = None,
    no_passphrase: Annotated[
        bool,
        typer.Option("--no-passphrase", help="Leave the authority's key unsealed: whoever reads it is the authority."),
    ] = False,
) -> None:
    """Make the authority of a new federation in DIR; it is never replaced.

    Its key is sealed under a passphrase that is asked for. Keep a backup of
    DIR: without the key no certificate can be issued or revoked, and the
    federation has to start anew.
    """
    if no_passphrase and passphrase_file is not None:
        raise IdentityError("--no-passphrase and --passphrase-file exclude each other", "give one of them")
    passphrase = None if no_passphrase else _passphrase(passphrase_file, twice=True)
    made = AuthorityDirectory.create(directory, federation, days, passphrase)
    say(f"The authority of '{federation}' is in {made.directory}. Back it up, and let nobody else read it.")
    say("Next, at each site:  mpc-fl pki request NAME --out SITE_DIR")
    say(f"then here:           mpc-fl pki issue {directory} NAME --request FILE")


@app.command(cls=Command)
def request(
    name: Name,
    out: Annotated[Path, typer.Option("--out", metavar="SITE_DIR", help="The party's directory; gets its key.")],
    chosen_name: ChosenName = None,
) -> None:
    """At a site: make its key in SITE_DIR and a request for a certificate.

    The key never leaves SITE_DIR. Send NAME.csr to the administrator and read
    the fingerprint out to them, by telephone for example: it shows that nobody
    exchanged the request on its way. With --chosen-name the site is shown by
    that name where all parties have it in federation.names, too.
    """
    path = identity_files.make_request(out, name, chosen_name)
    key = identity.verify_request(path.read_bytes(), name)
    say(
        f"Send this file to the federation's administrator: {path}\nFingerprint of the key: {identity.key_fingerprint(key)}"
    )
    say(f"Put the three files that come back into {out}: {name}.crt, {identity.ROOT_FILE}, {identity.REVOCATION_FILE}.")


@app.command(cls=Command)
def issue(
    directory: Directory,
    name: Name,
    out: Site = None,
    days: Days = directories.CERTIFICATE_DAYS,
    request: Request = None,
    passphrase_file: PassphraseFile = None,
    chosen_name: ChosenName = None,
) -> None:
    """Issue the certificate of a party that has none.

    With --request the site keeps its key: the way between machines. Without
    it a key is made here and written to SITE_DIR, which then has to be carried
    to the site by a safe way and deleted here. A name that the site asks for
    is shown: see that it is the site's, and agreed on.
    """
    authority, request_pem = _open(directory, request, passphrase_file)
    site = out or directory / "sites" / name
    _told(authority.issue(name, site, days, request_pem, chosen_name), name, site, request_pem)
    if request_pem is None:
        say(f"{name}.key is the party's secret: carry {site} to the site by a safe way and delete it here.")


@app.command(cls=Command)
def renew(
    directory: Directory,
    name: Name,
    out: Site = None,
    days: Days = directories.CERTIFICATE_DAYS,
    request: Request = None,
    passphrase_file: PassphraseFile = None,
    chosen_name: ChosenName = None,
) -> None:
    """Issue a new certificate to a party before its old one ends, or after.

    The site keeps its key and only exchanges the files written to SITE_DIR;
    with --request it gets a certificate for a new key. The old certificate
    stays valid until it ends, so nothing that runs is cut off. It keeps its
    chosen name, unless another is given. A revoked party needs a new key:
    mpc-fl pki issue.
    """
    authority, request_pem = _open(directory, request, passphrase_file)
    site = out or directory / "sites" / name
    _told(authority.renew(name, site, days, request_pem, chosen_name), name, site, request_pem)


@app.command(cls=Command)
def revoke(
    directory: Directory,
    name_or_serial: Annotated[
        str, typer.Argument(metavar="NAME_OR_SERIAL", help="A party, or the serial number of one certificate.")
    ],
    passphrase_file: PassphraseFile = None,
) -> None:
    """Take the certificates of a party back.

    Its key may be in wrong hands, or it leaves the federation. A serial number
    stands for its key: other certificates of the same key are revoked with it.
    A site refuses the party from the moment the site has the new federation.crl
    and its own party starts; until then nothing changes there.
    """
    authority, _ = _open(directory, None, passphrase_file)
    revoked = authority.revoke(name_or_serial)
    for item in revoked:
        say(f"Revoked the certificate of {item.name}, serial {item.serial}.")
    if not revoked:
        say(f"All certificates of {name_or_serial} had been revoked; the list was written again.")
    path = authority.directory / identity.REVOCATION_FILE
    say(f"Give {path} to every site now: it goes into each party's identity directory and counts from the next start.")


@app.command(cls=Command)
def show(
    directory: Directory,
    as_json: AsJson = False,
) -> None:
    """Show the authority and every certificate it issued. Needs no passphrase."""
    found = directories.describe(directory)
    if as_json:
        print_json(found)
        return
    sealed = "sealed under a passphrase" if found["key_sealed"] else "NOT sealed"
    say(f"Federation '{found['federation']}', authority valid until {_date(found['not_after'])}, its key {sealed}.")
    say(f"SHA-256 of {identity.ROOT_FILE}: {found['sha256']}")
    revocations = found["revocation_list"]
    if revocations["complete"] and revocations["not_after"]:
        say(f"{identity.REVOCATION_FILE} is current until {_date(revocations['not_after'])}.")
    else:
        say(f"{identity.REVOCATION_FILE} is NOT complete: run mpc-fl pki revoke again for a revoked party.")
    row = "{party:<14} {state:<8} {end:<21} {serial:<40} {name}"
    say("\n" + row.format(party="PARTY", state="STATE", end="VALID UNTIL", serial="SERIAL", name="NAME"))
    for item in found["certificates"]:
        of = {
            "party": item["name"],
            "state": item["state"],
            "serial": item["serial"],
            "name": item["chosen_name"] or "-",
        }
        say(row.format(**of, end=_date(item["not_after"])))


def _date(iso: str) -> str:
    return f"{datetime.fromisoformat(iso):%Y-%m-%d %H:%M UTC}"


def _told(issued: Issued, name: str, site: Path, request_pem: bytes | None) -> None:
    """Say what was issued and what to do with it."""
    end = issued.certificate.not_valid_after_utc.isoformat()
    say(f"Certificate of {name}, serial {issued.serial}, valid until {_date(end)}.")
    if issued.chosen_name is not None:
        say(f"It binds the name {issued.chosen_name}: federation.names must have it for {name} at every party.")
    if request_pem is not None:
        fingerprint = identity.key_fingerprint(identity.verify_request(request_pem, name))
        say(
            f"Fingerprint of its key: {fingerprint}\nCompare it with what the site reads out before you send the files."
        )
    say(f"For the site, in {site}: {name}.crt, {identity.ROOT_FILE}, {identity.REVOCATION_FILE}")


def _open(
    directory: Path, request: Path | None, passphrase_file: Path | None
) -> tuple[AuthorityDirectory, bytes | None]:
    """The authority and the content of the request; the passphrase is asked for last."""
    request_pem = None if request is None else _content(request)
    sealed = directories.needs_passphrase(directory)
    return AuthorityDirectory.open_(directory, _passphrase(passphrase_file) if sealed else None), request_pem


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IdentityError(f"cannot read {path}: {error.strerror}", "check the path") from None


def _passphrase(file: Path | None, twice: bool = False) -> Private[bytes]:
    """The authority's passphrase, from a file or the terminal; never from the command line, which others can see."""
    if file is not None:
        try:
            words = identity_files.read_private(file)
        except OSError as error:
            raise IdentityError(f"cannot read {file}: {error.strerror}", "check the path") from None
        return Private("passphrase", words.removesuffix(b"\n"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", getpass.GetPassWarning)  # a terminal that cannot hide it is not asked
            words = typer.prompt("Passphrase of the authority", hide_input=True, confirmation_prompt=twice, err=True)
    except (typer.Abort, getpass.GetPassWarning, EOFError):
        raise IdentityError("no passphrase was given", "answer at a terminal, or give --passphrase-file FILE") from None
    return Private("passphrase", words.encode("utf-8", "surrogateescape"))
