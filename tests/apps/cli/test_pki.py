"""`mpc-fl pki` from the command line: a whole federation, and no secret in its words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mpc_fl.apps.cli import pki
from mpc_fl.crypto.authority import open_key
from mpc_fl.crypto.authority_directory import KEY_FILE
from mpc_fl.crypto.certificates import REVOCATION_FILE, verify_certificate
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import IdentityError

WORDS = "correct horse battery staple"


class Terminal:
    """Runs `mpc-fl pki` in this process and keeps every word it says, errors included."""

    def __init__(self, directory: Path) -> None:
        self.said = ""
        self.passphrase = directory / "passphrase"
        self.passphrase.write_text(WORDS + "\n")
        self.passphrase.chmod(0o600)

    def run(
        self, *arguments: Any, answer: str | None = None, passphrase: bool = False
    ) -> tuple[str, IdentityError | None]:
        extra = ["--passphrase-file", str(self.passphrase)] if passphrase else []
        result = CliRunner().invoke(pki.app, [str(word) for word in arguments] + extra, input=answer)
        self.said += result.output + repr(result.exception)
        assert result.exception is None or isinstance(result.exception, IdentityError), result.output + repr(
            result.exception
        )
        return result.output, result.exception

    def good(self, *arguments: Any, **options: Any) -> str:
        output, error = self.run(*arguments, **options)
        assert error is None, error
        return output

    def bad(self, *arguments: Any, **options: Any) -> str:
        _, error = self.run(*arguments, **options)
        assert error is not None and "\n" not in str(error)
        return str(error)


def test_a_federation_from_the_command_line_and_no_secret_in_its_words(tmp_path: Path) -> None:
    terminal, fed, site = Terminal(tmp_path), tmp_path / "fed", tmp_path / "hospital-0"
    assert "Back it up" in terminal.good("init", fed, "--name", "lungs", "--no-passphrase")
    assert "never replaced" in terminal.bad("init", fed, "--no-passphrase")
    output = terminal.good("request", "hospital-0", "--out", site)
    fingerprint = output.split("Fingerprint of the key: ")[1].splitlines()[0]
    output = terminal.good("issue", fed, "hospital-0", "--request", site / "hospital-0.csr")
    assert fingerprint in output and "valid until" in output
    for path in (fed / "sites" / "hospital-0").iterdir():
        shutil.copy(path, site)
    load_identity(site, "hospital-0")
    assert "pki renew" in terminal.bad("issue", fed, "hospital-0")
    assert "carry" in terminal.good("issue", fed, "aggregator", "--out", tmp_path / "agg", "--days", 10)
    trusted = load_identity(tmp_path / "agg", "aggregator")
    assert "hospital-0" in terminal.good("renew", fed, "hospital-0", "--out", site)
    hospital = load_identity(site, "hospital-0")
    verify_certificate(hospital.certificate, "hospital-0", trusted)

    shown = json.loads(terminal.good("show", fed, "--json"))
    assert shown["federation"] == "lungs" and shown["key_sealed"] is False
    assert [item["name"] for item in shown["certificates"]] == ["hospital-0", "aggregator", "hospital-0"]
    assert {item["role"] for item in shown["certificates"]} == {"hospital", "aggregator"}
    output = terminal.good("revoke", fed, shown["certificates"][2]["serial"])
    assert output.count("Revoked") == 2 and "to every site" in output
    assert "written again" in terminal.good("revoke", fed, "hospital-0")
    shutil.copy(fed / REVOCATION_FILE, tmp_path / "agg")
    with pytest.raises(IdentityError, match="was revoked"):
        verify_certificate(hospital.certificate, "hospital-0", load_identity(tmp_path / "agg", "aggregator"))
    output = terminal.good("show", fed)
    assert output.count(" revoked ") == 2 and output.count(" live ") == 1 and "is current until" in output

    assert "no party name" in terminal.bad("issue", fed, "nurse")
    assert "not made for" in terminal.bad("issue", fed, "dealer", "--request", site / "hospital-0.csr")
    assert "cannot read" in terminal.bad("issue", fed, "dealer", "--request", tmp_path / "none")
    assert "no federation authority" in terminal.bad("show", tmp_path / "nowhere")
    assert "not valid PEM" in terminal.bad("issue", fed, "dealer", "--request", site / "hospital-0.key")

    damaged = (fed / KEY_FILE).read_bytes()
    key = open_key(damaged, None)
    (fed / KEY_FILE).write_bytes(damaged[:200])
    terminal.bad("issue", fed, "dealer")
    keys = [path.read_bytes() for path in tmp_path.rglob("*.key")] + [damaged]
    assert len(keys) >= 4 and "hospital-0" in terminal.said
    secrets = [line for content in keys for line in content.decode().splitlines() if not line.startswith("-----")]
    value = key.private_numbers().private_value
    for secret in [*secrets, "PRIVATE", str(value), f"{value:x}"]:
        assert secret not in terminal.said


def test_the_passphrase_is_asked_for(tmp_path: Path) -> None:
    terminal, fed = Terminal(tmp_path), tmp_path / "fed"
    assert "no passphrase was given" in terminal.bad("init", fed, answer="")
    assert not fed.exists()
    assert "fewer than 12" in terminal.bad("init", fed, answer="short\nshort\n")
    terminal.good("init", fed, answer=f"not {WORDS}\n{WORDS}\n{WORDS}\n{WORDS}\n")
    assert "does not open" in terminal.bad("issue", fed, "dealer", answer="wrong words, all of them\n")
    terminal.good("issue", fed, "dealer", answer=WORDS + "\n")
    assert "no passphrase was given" in terminal.bad("revoke", fed, "dealer", answer="")
    assert WORDS not in terminal.said and "wrong words" not in terminal.said
    terminal.passphrase.chmod(0o644)
    assert "other users" in terminal.bad("revoke", fed, "dealer", passphrase=True)
    assert "exclude each other" in terminal.bad("init", tmp_path / "two", "--no-passphrase", passphrase=True)
    terminal.good("init", tmp_path / "two", "--no-passphrase")
    terminal.passphrase.chmod(0o600)
    terminal.good("revoke", fed, "dealer", passphrase=True)
    assert "NOT sealed" in terminal.good("show", tmp_path / "two")
    terminal.good("issue", tmp_path / "two", "dealer")


def test_a_name_that_a_site_chose_goes_from_its_request_into_its_certificate(tmp_path: Path) -> None:
    terminal, fed, site = Terminal(tmp_path), tmp_path / "fed", tmp_path / "site"
    terminal.good("init", fed, "--no-passphrase")
    assert "reads like the identity" in terminal.bad(
        "request", "hospital-0", "--out", site, "--chosen-name", "hospital-1"
    )
    terminal.good("request", "hospital-0", "--out", site, "--chosen-name", "charite")
    asked = ("issue", fed, "hospital-0", "--request", site / "hospital-0.csr")
    assert "asks for the name 'charite', not 'ukb'" in terminal.bad(*asked, "--chosen-name", "ukb")
    assert "It binds the name charite: federation.names must have it for hospital-0" in terminal.good(*asked)
    assert "looks like that of hospital-0" in terminal.bad("issue", fed, "hospital-1", "--chosen-name", "char1te")
    terminal.good("issue", fed, "hospital-1", "--chosen-name", "st-thomas")
    assert "binds the name guys" in terminal.good("renew", fed, "hospital-1", "--chosen-name", "guys")
    assert "It binds" not in terminal.good("issue", fed, "dealer")
    rows = [line.split() for line in terminal.good("show", fed).splitlines()[-4:]]
    assert [(row[0], row[-1]) for row in rows] == [
        ("hospital-0", "charite"), ("hospital-1", "st-thomas"), ("hospital-1", "guys"), ("dealer", "-")
    ]  # fmt: skip
