"""Receipts of a session between its parties: a side that counts otherwise, or does not sign, is told so in one line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.audit.opening_record import Opening, OpeningRecord
from mpc_fl.audit.receipt_file import ReceiptFile
from mpc_fl.audit.receipts import Receipt, sign_receipt
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.certificates import Identity
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import MpcFlError
from mpc_fl.inference.serving import receipt_exchange
from mpc_fl.inference.serving.receipt_exchange import DealerReceipts, HospitalReceipts, OwnerReceipts, ServedTerms
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.links import Links
from tests.support.harness import run_parties_in_memory

HOSPITAL, OWNER, DEALER = NAMES = ["hospital-0", "model-owner", "dealer"]
AGREEMENT = Agreement("hospital-0/" + "1" * 32, "digest", "serve")
TERMS = ServedTerms("label", "a" * 64, "b" * 64)
OPENING = Opening("label", "diagnosis for the hospital that asked", (1,), (HOSPITAL,), (HOSPITAL, OWNER))


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    path = tmp_path_factory.mktemp("identities")
    make_local_identities(NAMES, {name: path / name for name in NAMES})
    return {name: load_identity(path / name, name) for name in NAMES}


def session(
    links: Links,
    identities: dict[str, Identity],
    directory: Path,
    batches: int,
    deviate: dict[str, Callable[[Any], None]],
) -> str | int:
    """A session of batches of the dealer, and one of a pool; the line of the error, or the last receipt's number."""
    file, identity = ReceiptFile(directory / links.name, identities[links.name]), identities[links.name]
    record = OpeningRecord(Path(os.devnull), links.name)
    try:
        if links.name == DEALER:
            dealing = DealerReceipts(links, HOSPITAL, identity, file)
            deviate.get(DEALER, lambda parts: None)(dealing)
            for _ in range(batches):
                links.receive_object(OWNER, "next")
                dealing.made(TERMS.network, 2)
                links.send_object(OWNER, "corrections", {})
            return batches
        side: Any
        if links.name == OWNER:
            side = OwnerReceipts(links, HOSPITAL, identity, file, record)
            deviate.get(OWNER, lambda parts: None)(side)
            side.meet(TERMS)
            for batch in range(batches + 1):
                side.require_signed()
                if batch < batches:
                    links.send_object(DEALER, "next", {})
                    links.receive_object(DEALER, "corrections")
                side.ready(2, batch < batches)
                links.send_object(HOSPITAL, "ready", {})
                links.receive_object(HOSPITAL, "evaluate")
                side.require_signed()
                side.record.append(OPENING)
                links.send_object(HOSPITAL, "answer", {})
            side.close()
            return int(side._so_far.number)
        side = HospitalReceipts(links, identity, file, record)
        deviate.get(HOSPITAL, lambda parts: None)(side)
        side.meet(None)
        side.require_network(TERMS.network)
        for batch in range(batches + 1):
            links.receive_object(OWNER, "ready")
            side.ready(2, batch < batches)
            links.send_object(OWNER, "evaluate", {})
            links.receive_object(OWNER, "answer")
            side.record.append(OPENING)
        side.finish()
        return int(side._so_far.number)
    except MpcFlError as error:
        return str(error)


def run(identities: dict[str, Identity], directory: Path, **deviate: Callable[[Any], None]) -> dict[str, Any]:
    named = {name.replace("_", "-"): how for name, how in deviate.items()}
    lines: dict[str, Any] = {}
    names = {"hospital": HOSPITAL, "owner": OWNER, "dealer": DEALER}
    deviating = {names[name]: how for name, how in named.items()}

    def party(links: Links) -> None:
        lines[links.name] = session(links, identities, directory, 2, deviating)
        if isinstance(lines[links.name], str):
            raise MpcFlError(lines[links.name])

    with contextlib.suppress(AssertionError):
        run_parties_in_memory(party, NAMES, agreement=AGREEMENT, receive_timeout=20.0)
    return lines


def test_all_sign_every_batch(identities: dict[str, Identity], tmp_path: Path) -> None:
    assert run(identities, tmp_path) == {HOSPITAL: 4, OWNER: 4, DEALER: 2}
    owner, hospital = ((tmp_path / name / "receipts.jsonl").read_text() for name in (OWNER, HOSPITAL))
    assert len(owner.splitlines()) == len(hospital.splitlines()) == 4


def _proposes(change: Callable[[Receipt], Receipt], number: int = 2) -> Callable[[Any], None]:
    """The model owner proposes another receipt of this number than that which follows, and signs it."""

    def deviate(side: Any) -> None:
        honest = side._propose

        def propose(receipt: Receipt) -> None:
            honest(change(receipt) if receipt.number == number else receipt)

        side._propose = propose

    return deviate


CHANGES: dict[str, Callable[[Receipt], Receipt]] = {
    "more images": lambda receipt: replace(receipt, images=receipt.images + 1),
    "more batches": lambda receipt: replace(receipt, batches=receipt.batches + 1),
    "fewer openings": lambda receipt: replace(receipt, openings=0),
    "other openings": lambda receipt: replace(receipt, opened="c" * 64),
    "other weights": lambda receipt: replace(receipt, commitment="c" * 64),
    "another network": lambda receipt: replace(receipt, network="c" * 64),
    "logits": lambda receipt: replace(receipt, reveal="logits"),
    "another history": lambda receipt: replace(receipt, previous="c" * 64),
    "another session": lambda receipt: replace(receipt, session="hospital-1/" + "1" * 32),
    "another certificate": lambda receipt: replace(receipt, hospital_certificate="c" * 64),
    "the end": lambda receipt: replace(receipt, closing=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_hospital_signs_what_it_counted_itself(
    identities: dict[str, Identity], tmp_path: Path, change: Callable[[Receipt], Receipt]
) -> None:
    lines = run(identities, tmp_path, owner=_proposes(change))
    assert lines[HOSPITAL] == (
        "model-owner counts otherwise in receipt 2 of this session, so nothing more is sent to it: ask its owner"
    )
    assert len((tmp_path / HOSPITAL / "receipts.jsonl").read_text().splitlines()) == 1


def test_a_time_far_away_is_refused(
    identities: dict[str, Identity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deviate(side: Any) -> None:
        def propose(receipt: Receipt) -> None:
            dated = replace(receipt, time="2020-01-01T00:00:00+00:00")
            message = {"receipt": vars(dated), "signature": sign_receipt(dated, side._identity)}
            side._proposed = dated, message["signature"]
            side._links.send_object(HOSPITAL, receipt_exchange.RECEIPT, message)

        side._propose = propose

    assert "gave a time far from this clock (2020-01-01" in run(identities, tmp_path, owner=deviate)[HOSPITAL]


@pytest.mark.parametrize("kind", ["nothing", "no receipt", "no signature", "somebody else's"])
def test_a_hospital_goes_no_further_with_a_model_owner_that_does_not_sign(
    identities: dict[str, Identity], tmp_path: Path, kind: str
) -> None:
    def deviate(side: Any) -> None:
        def propose(receipt: Receipt) -> None:
            receipt = replace(receipt, time=receipt_exchange.time_text(receipt_exchange._now()))
            message: dict[str, Any] = {"receipt": vars(receipt), "signature": ""}
            if kind == "no receipt":
                message = {}
            if kind == "somebody else's":
                message["signature"] = sign_receipt(receipt, identities[DEALER])
            side._proposed = receipt, ""
            if kind != "nothing":
                side._links.send_object(HOSPITAL, receipt_exchange.RECEIPT, message)

        side._propose = propose

    line = run(identities, tmp_path, owner=deviate)[HOSPITAL]
    what = "sent something else than" if kind == "no receipt" else "did not sign"
    assert line == f"model-owner {what} receipt 1 of this session, so nothing more is sent to it: ask its owner"


@pytest.mark.parametrize("kind", ["nothing", "too few", "false signature", "rubbish"])
def test_a_dealer_that_does_not_sign_is_named_by_both(
    identities: dict[str, Identity], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deviate(side: Any) -> None:
        honest, links = side._links.send_object, side._links

        def send_object(receiver: str, tag: str, value: dict[str, Any]) -> None:
            if tag == receipt_exchange.COUNT:
                if kind == "nothing":
                    return
                value = {
                    "too few": {**value, "count": {**value.get("count", {}), "batches": 0}},
                    "false signature": {**value, "signature": "00"},
                    "rubbish": {**value, "count": {"batches": 10**40}},
                }[kind]
            honest(receiver, tag, value)

        links.send_object = send_object

    lines = run(identities, tmp_path, dealer=deviate)
    assert "the dealer" in lines[OWNER] and ("sign" in lines[OWNER] or "count" in lines[OWNER])
    assert "the dealer" in lines[HOSPITAL]
    assert not (tmp_path / HOSPITAL / "receipts.jsonl").exists()


def test_a_closing_receipt_that_is_not_signed_takes_nothing_back(
    identities: dict[str, Identity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receipt_exchange, "_CLOSING", 0.5)

    def deviate(side: Any) -> None:
        side.finish = lambda: None

    assert run(identities, tmp_path, hospital=deviate) == {HOSPITAL: 3, OWNER: 3, DEALER: 2}
    lines = (tmp_path / OWNER / "receipts.jsonl").read_text().splitlines()
    assert len(lines) == 3 and '"images":6' in lines[-1]


@pytest.mark.parametrize("who", ["hospital", "owner", "dealer"])
@pytest.mark.parametrize(
    "beside",
    ["\x01" * 3000 + "\n", "é\n", "\ud800\n", "x" * 5000 + "\n"],
    ids=["too long as JSON", "not ASCII", "not to be encoded", "too long"],
)
def test_nobody_brings_text_into_the_files_of_others_beside_a_certificate(
    who: str, beside: str, identities: dict[str, Identity], tmp_path: Path
) -> None:
    """It is genuine PEM, but a line that holds it could not be read again: a model owner would not start any more."""
    names = {"hospital": HOSPITAL, "owner": OWNER, "dealer": DEALER}

    def deviate(side: Any) -> None:
        honest = side._links.send_object

        def send(receiver: str, tag: str, value: dict[str, Any]) -> None:
            if "certificate" in value:
                value = {**value, "certificate": beside + value["certificate"]}
            honest(receiver, tag, value)

        side._links.send_object = send

    lines = run(identities, tmp_path, **{who: deviate})
    for name in {HOSPITAL, OWNER} - {names[who]}:
        line = str(lines[name])
        assert (
            f"certificate of {names[who]} is PEM with something" in line or f"{names[who]} sent no certificate" in line
        )
    for name in NAMES:
        ReceiptFile(tmp_path / name, identities[name])  # what was kept can be read
