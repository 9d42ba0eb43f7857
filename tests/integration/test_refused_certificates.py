"""A hospital whose certificate was revoked, which it does not know: it is refused, named by all, and blamed on nobody else."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import pytest
from cryptography import x509

from mpc_fl.crypto.authority import Authority
from mpc_fl.crypto.certificates import REVOCATION_FILE
from mpc_fl.crypto.identity_files import write_identity
from tests.support.deviating import Federation

pytestmark = [pytest.mark.processes, pytest.mark.slow]
REVOKED = "hospital-1"


def federation_with_a_revoked_hospital(directory: Path, quorum: int | None) -> Federation:
    """All others have the revocation list."""
    federation = Federation(directory, federation={"quorum": quorum})
    authority, now = Authority(datetime.timedelta(hours=1)), datetime.datetime.now(datetime.UTC)
    identities = {name: authority.issue(name) for name in federation.placed}
    serial = x509.load_pem_x509_certificate(identities[REVOKED].certificate).serial_number
    listed = authority.revocation_list({serial: now}, 1, now + datetime.timedelta(hours=1))
    for name, identity in identities.items():
        own = federation.party(name) / "identity"
        shutil.rmtree(own)
        write_identity(identity, own)
        if name != REVOKED:
            (own / REVOCATION_FILE).write_bytes(listed)
    return federation


def test_the_one_that_was_refused_is_named_by_all(tmp_path: Path) -> None:
    said = federation_with_a_revoked_hospital(tmp_path, None).run({}, timeout=150.0)
    for name, words in said.items():
        assert "the certificate of hospital-1 was revoked" in words, said
        assert not any(f"refused {other}" in words for other in said if other != REVOKED), (name, said)
        assert "did not connect" not in words or f"{REVOKED} did not connect" in words, said


def test_with_a_quorum_the_others_go_on_without_it(tmp_path: Path) -> None:
    federation = federation_with_a_revoked_hospital(tmp_path, 2)
    said = federation.run({}, timeout=250.0)
    assert "refused hospital-1: the certificate of hospital-1 was revoked" in said.pop(REVOKED)
    assert set(said.values()) == {"finished"}, said
    assert (federation.party("aggregator") / "model.safetensors").exists()
