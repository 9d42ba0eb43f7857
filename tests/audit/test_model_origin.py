"""A model file is held against the digest that all parties signed at the end of its training."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from mpc_fl.audit.ledger_audit import extend
from mpc_fl.audit.model_origin import model_origin
from mpc_fl.audit.reveal_ledger import LEDGER_FILE, Block, Chain, Members, encode_block, sign_block
from mpc_fl.crypto.authority import Authority
from mpc_fl.crypto.certificates import ROOT_FILE, pem
from mpc_fl.crypto.signatory import fingerprint
from mpc_fl.errors import ModelError

PARTIES = ("hospital-0", "hospital-1", "aggregator")
MODEL = b"weights"


def make_run(directory: Path, values: dict[str, str], ended: bool = True) -> Path:
    """The directory of a run with a genuine ledger, the authority's certificate and a model; the path of the model."""
    authority, chain, lines = Authority(datetime.timedelta(days=1)), Chain(), b""
    identities = {name: authority.issue(name) for name in PARTIES}
    certificates = {name: identity.certificate.decode() for name, identity in identities.items()}
    members = Members("session", "c" * 64, fingerprint(authority.certificate), certificates, 2)
    for number, kind in enumerate(("start", "end") if ended else ("start",)):
        block = Block(
            number, kind, kind, PARTIES, (), values if number else {}, None if number else members, chain.seal
        )
        moment = datetime.datetime.now(datetime.UTC)
        block = replace(block, signatures=tuple(sign_block(block, identities[name], moment) for name in PARTIES))
        chain, findings = extend(chain, block, authority.certificate)
        assert not findings
        lines += encode_block(block)
    directory.mkdir(parents=True)
    (directory / LEDGER_FILE).write_bytes(lines)
    (directory / ROOT_FILE).write_bytes(pem(authority.certificate))
    (directory / "model.safetensors").write_bytes(MODEL)
    return directory / "model.safetensors"


def signed_run(directory: Path) -> Path:
    return make_run(directory, {"model.safetensors": hashlib.sha256(MODEL).hexdigest()})


def test_the_file_that_was_signed_is_known_as_such(tmp_path: Path) -> None:
    model = signed_run(tmp_path / "run")
    origin = model_origin(model)
    assert origin.signed and origin.sha256 == hashlib.sha256(MODEL).hexdigest()
    assert origin.words == (
        f"is the one that all parties signed in {model.parent / LEDGER_FILE} (aggregator, hospital-0, hospital-1)"
    )
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(MODEL)
    assert model_origin(moved, model.parent).signed and model_origin(moved, model.parent / LEDGER_FILE).signed


def test_one_changed_bit_is_found(tmp_path: Path) -> None:
    model = signed_run(tmp_path / "run")
    model.write_bytes(bytes([MODEL[0] ^ 1]) + MODEL[1:])
    with pytest.raises(ModelError, match="is not the one that all parties signed in .*reveal_ledger.jsonl: take the"):
        model_origin(model)


def test_a_ledger_that_does_not_verify_is_refused(tmp_path: Path) -> None:
    model, other = signed_run(tmp_path / "run"), signed_run(tmp_path / "other")
    with pytest.raises(ModelError, match="names another authority"):
        model_origin(model, authority=other.parent / ROOT_FILE)
    ledger = model.parent / LEDGER_FILE
    ledger.write_bytes(ledger.read_bytes().replace(b'"about":"end"', b'"about":"END"'))
    with pytest.raises(ModelError, match="does not verify: block 1: .*see what with: mpc-fl ledger verify"):
        model_origin(model)
    ledger.write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(ModelError, match="line 1 is damaged or was edited"):
        model_origin(model)


def test_what_cannot_be_checked_is_said_and_refused_where_a_check_was_asked_for(tmp_path: Path) -> None:
    alone = tmp_path / "model.safetensors"
    alone.write_bytes(MODEL)
    assert not model_origin(alone).signed and "there is no reveal_ledger.jsonl beside it" in model_origin(alone).words
    with pytest.raises(ModelError, match="there is no reveal ledger .*nowhere"):
        model_origin(alone, tmp_path / "nowhere")
    own = make_run(tmp_path / "own", {"global model": "5" * 64})
    assert "each hospital has a model of its own" in model_origin(own).words
    half = make_run(tmp_path / "half", {}, ended=False)
    assert "the run has not come to its end" in model_origin(half).words
    with pytest.raises(ModelError, match="cannot be checked: .*its end in it: give --ledger and --authority"):
        model_origin(alone, half.parent)
    (own.parent / ROOT_FILE).unlink()
    assert "there is no federation.crt beside" in model_origin(own).words
    (own.parent / ROOT_FILE).mkdir()
    with pytest.raises(ModelError, match="cannot read certificate .*Is a directory"):
        model_origin(own)
