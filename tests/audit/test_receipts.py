"""Receipts: what is signed, and that whatever is changed in a file of them is found."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpc_fl.audit.opening_record import Opening
from mpc_fl.audit.receipt_audit import are_receipts, check_lines, compare
from mpc_fl.audit.receipt_file import ReceiptFile
from mpc_fl.audit.receipts import (
    NOTHING,
    RECEIPTS_FILE,
    DealerCount,
    Receipt,
    entry_from,
    fingerprint_of,
    opened_with,
    receipt_from,
    sign_count,
    sign_receipt,
)
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.certificates import CLOCK_SKEW, Identity
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.crypto.signatory import time_text
from mpc_fl.errors import MpcFlError, ProtocolError

NAMES = ["hospital-0", "hospital-1", "model-owner", "dealer"]
OPENING = Opening(
    "label", "diagnosis for the hospital that asked", (1,), ("hospital-0",), ("hospital-0", "model-owner")
)


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    path = tmp_path_factory.mktemp("identities")
    make_local_identities(NAMES, {name: path / name for name in NAMES})
    return {name: load_identity(path / name, name) for name in NAMES}


SESSION = "hospital-0/" + "1" * 32


def when(identities: dict[str, Identity]) -> str:
    """When everything here was signed: as the last certificate was made. Files of one session hold the same times."""
    starts = [x509.load_pem_x509_certificate(own.certificate).not_valid_before_utc for own in identities.values()]
    return time_text(max(starts) + CLOCK_SKEW)


def write(
    directory: Path,
    identities: dict[str, Identity],
    keeper: str,
    batches: int = 3,
    lost: int = 0,
    session: str = SESSION,
    keeping: ReceiptFile | None = None,
) -> bytes:
    """The file of `keeper` after a session of `batches` that was closed; the last `lost` lines were not written."""
    keeping = keeping or ReceiptFile(directory, identities[keeper])
    hospital, owner, dealer = (identities[name] for name in ("hospital-0", "model-owner", "dealer"))
    prints = [fingerprint_of(one.certificate) for one in (hospital, owner)]
    certificates = {one.name: one.certificate for one in (hospital, owner, dealer)}
    receipt, opened = Receipt(session, 0, prints[0], prints[1], "label", "a" * 64, "b" * 64), (0, NOTHING)
    count = DealerCount(session, 0, 0, "a" * 64, fingerprint_of(dealer.certificate), when(identities))
    for number in range(batches + 1):
        closing = number == batches
        receipt = replace(
            receipt.closed(opened) if closing else receipt.after_batch(2, True, opened), time=when(identities)
        )
        if not closing:
            count = replace(count, batches=count.batches + 1, records=count.records + 2)
            opened = opened_with(opened, OPENING)
        elif keeper == "dealer":
            break
        if number <= batches - lost:
            signatures = {"dealer": sign_count(count, dealer)}
            if keeper == "dealer":
                keeping.keep(None, count, signatures, {"dealer": dealer.certificate})
                continue
            signatures |= {one.name: sign_receipt(receipt, one) for one in (hospital, owner)}
            keeping.keep(receipt, count, signatures, certificates)
    return keeping.path.read_bytes()


def authority(identities: dict[str, Identity]) -> x509.Certificate:
    return x509.load_pem_x509_certificate(identities["dealer"].authority)


def test_files_of_all_parties_verify_and_agree(tmp_path: Path, identities: dict[str, Identity]) -> None:
    files = {name: write(tmp_path / name, identities, name) for name in ("hospital-0", "model-owner", "dealer")}
    checked = {name: check_lines(content, authority(identities)) for name, content in files.items()}
    assert not [trouble for of in checked.values() for trouble in of.troubles]
    assert not compare({name: of.entries for name, of in checked.items()})
    assert all(are_receipts(content) for content in files.values()) and not are_receipts(b'{"number": 0}\n')
    last = checked["model-owner"].entries[-1].receipt
    assert last is not None and (last.images, last.batches, last.openings, last.dealt, last.closing) == (
        6,
        3,
        3,
        3,
        True,
    )
    path = tmp_path / "model-owner" / RECEIPTS_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    sizes = [len(line) for line in files["model-owner"].splitlines()]
    assert sizes[0] < 5000 and max(sizes[1:]) < 2000  # the first introduces three certificates
    # The model owner keeps a receipt last, so it may lack the last one of a session that was cut off, and no other.
    for lost, wrong in ((1, 0), (2, 1)):
        short = check_lines(write(tmp_path / str(lost), identities, "model-owner", lost=lost), authority(identities))
        assert not short.troubles
        assert len(compare({"here": checked["hospital-0"].entries, "there": short.entries})) == wrong
    short = check_lines(write(tmp_path / "dealt", identities, "dealer", batches=2), authority(identities))
    assert "lacks batches" in compare({"here": checked["hospital-0"].entries, "there": short.entries})[0]


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_changed_byte_and_no_removed_line_goes_unseen(
    tmp_path_factory: pytest.TempPathFactory, identities: dict[str, Identity], data: st.DataObject
) -> None:
    directory = tmp_path_factory.getbasetemp() / "changed"
    if not (directory / RECEIPTS_FILE).exists():
        write(directory, identities, "model-owner")
    content = (directory / RECEIPTS_FILE).read_bytes()
    root = authority(identities)
    if data.draw(st.booleans()):
        place, change = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
        edited = content[:place] + bytes([content[place] ^ change]) + content[place + 1 :]
    else:
        lines = content.splitlines(keepends=True)
        kept = data.draw(st.permutations(lines).map(lambda some: some[: len(lines) - 1]))
        if kept == lines[: len(kept)]:
            return  # an end that was cut off is seen beside another party's file alone
        edited = b"".join(kept)
    assert check_lines(edited, root).troubles


def test_what_was_signed_again_by_one_side_alone_is_found(tmp_path: Path, identities: dict[str, Identity]) -> None:
    content = write(tmp_path, identities, "hospital-0")
    entry = entry_from(content.splitlines()[-1])
    assert entry.receipt is not None
    mine, root = identities["hospital-0"], authority(identities)
    fewer = replace(entry.receipt, images=2)
    forged = replace(entry, receipt=fewer, signatures={**entry.signatures, "hospital-0": sign_receipt(fewer, mine)})
    lines = [*content.splitlines(keepends=True)[:-1], forged.sealed(mine).encoded()]
    found = [trouble.what for trouble in check_lines(b"".join(lines), root).troubles]
    assert any("the signature of model-owner is false" in what for what in found)
    other = identities["hospital-1"]
    lines[-1] = replace(entry, keeper="hospital-1").sealed(other).encoded()
    found = [trouble.what for trouble in check_lines(b"".join(lines), root).troubles]
    assert found == [
        "is of hospital-1, and the file of hospital-0",
        "is not what hospital-1 wrote: its seal is false",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", -1),
        ("images", True),
        ("images", 1 << 48),
        ("images", 1.0),
        ("closing", 1),
        ("reveal", "all"),
        ("network", "a" * 63),
        ("time", "2027-01-15T08:00:00"),
        ("time", "2027-13-15T08:00:00+00:00"),
        ("session", "model-owner/" + "1" * 32),
        ("session", "hospital-0/" + "1" * 500),
        ("session", None),
    ],
)
def test_what_is_no_receipt_is_refused(name: str, value: object) -> None:
    good = asdict(
        Receipt(
            "hospital-0/" + "1" * 32, 1, *["c" * 64] * 2, "label", "a" * 64, "b" * 64, time="2026-11-27T12:00:00+00:00"
        )
    )  # type: ignore[arg-type]
    assert receipt_from(good).number == 1
    with pytest.raises(ValueError):
        receipt_from({**good, name: value})
    for other in (None, [], {}, {**good, "more": 1}):
        with pytest.raises(ValueError):
            receipt_from(other)


def test_a_file_goes_on_after_a_crash_and_not_after_an_edit(tmp_path: Path, identities: dict[str, Identity]) -> None:
    content = write(tmp_path, identities, "dealer")
    path = tmp_path / RECEIPTS_FILE
    path.write_bytes(content + content[:100])  # cut off
    write(tmp_path, identities, "dealer", session="hospital-0/" + "2" * 32)
    lines = path.read_bytes().splitlines(keepends=True)
    assert b"".join(lines[:3]) == content and len(lines) == 6
    assert all("certificates" in json.loads(line) and not json.loads(line)["certificates"] for line in lines[1:])
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with pytest.raises(MpcFlError, match="line 3 of .* is damaged or was edited"):
        ReceiptFile(tmp_path, identities["dealer"])
    with pytest.raises(MpcFlError, match="line 1 of"):
        ReceiptFile(tmp_path, identities["model-owner"])


@pytest.mark.parametrize("keeper", ["model-owner", "dealer"])
@pytest.mark.parametrize("when", ["later", "after a restart", "at another process"])
def test_a_session_under_a_name_that_was_used_is_not_kept(
    keeper: str, when: str, tmp_path: Path, identities: dict[str, Identity]
) -> None:
    """A hospital chooses the name. Two sessions of one name would look like one that the keeper of the file had edited."""
    first, beside = (ReceiptFile(tmp_path, identities[keeper]) for _ in range(2))
    content = write(tmp_path, identities, keeper, keeping=first)
    again = {"later": first, "after a restart": None, "at another process": beside}[when]
    with pytest.raises(ProtocolError, match="hospital-0 began a session under a name that was used before"):
        write(tmp_path, identities, keeper, keeping=again)
    assert (tmp_path / RECEIPTS_FILE).read_bytes() == content
    fresh = write(tmp_path, identities, keeper, session="hospital-0/" + "2" * 32, keeping=again)
    checked = check_lines(fresh, authority(identities))
    assert not checked.troubles and len(checked.entries) == 2 * len(content.splitlines())
