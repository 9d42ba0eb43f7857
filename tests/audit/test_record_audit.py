"""What each party recorded beside the ledger: what was begun and signed nowhere is named, and so is what was edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mpc_fl.apps.cli import ledger as ledger_commands
from mpc_fl.audit.ledger_audit import Reading, read_ledger
from mpc_fl.audit.ledger_file import RevealLedger
from mpc_fl.audit.opening_record import OPENINGS_FILE, Opening
from mpc_fl.audit.record_audit import RecordCopy, verify_records
from mpc_fl.audit.reveal_ledger import LEDGER_FILE, Block, Chain, ChainedOpening, to_json
from mpc_fl.crypto.certificates import pem
from tests.audit.test_reveal_ledger import PARTIES, authority, identity, make_ledger, members, signed, text

BLOCKS = make_ledger(2, 2)
OPENINGS = [opening for block in BLOCKS for opening in block.openings]


def reading(blocks: list[Block] = BLOCKS) -> Reading:
    found = read_ledger(text(blocks), authority().certificate)
    assert not found.findings
    return found


def lines_of(party: str, openings: list[ChainedOpening] = OPENINGS) -> list[dict[str, Any]]:
    return [{"time": 1.0, "party": party, **to_json(opening)} for opening in openings]


def found(lines: list[Any], owner: str | None = "hospital-0", blocks: list[Block] = BLOCKS) -> list[str]:
    content = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    findings, notes = verify_records([RecordCopy("its record", owner, content)], reading(blocks))
    assert not notes
    return [finding.line for finding in findings]


def test_records_of_what_was_signed_have_no_findings() -> None:
    assert found(lines_of("hospital-0")) == [] == found(lines_of("aggregator"), None)
    assert found(lines_of("hospital-9", OPENINGS[:1]), "hospital-9") == [], "it signed none of the blocks"


def test_what_was_begun_and_not_signed_is_named_once_with_all_who_began_it() -> None:
    cut = BLOCKS[:2]  # the run was interrupted before round 2 was signed
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines_of("hospital-0"))
    other = b"".join(json.dumps(line).encode() + b"\n" for line in lines_of("hospital-1", OPENINGS[:3]))
    records = [RecordCopy("a", "hospital-0", content), RecordCopy("b", "hospital-1", other)]
    findings, notes = verify_records(records, reading(cut))
    assert [finding.line for finding in findings] == [
        "opening 3: was begun by hospital-0, hospital-1 and is signed nowhere (round 2: part 0)",
        "opening 4: was begun by hospital-0 and is signed nowhere (round 2: part 1)",
    ]
    assert [finding.opening for finding in findings] == [3, 4] and notes == []


def edited(index: int, **fields: Any) -> Callable[[list[Any]], Any]:
    return lambda lines: lines[index].update(fields)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (edited(1, why="nothing"), ["its record, opening 2: was edited: its digest does not fit"]),
        (edited(1, transcript=None), ["its record, opening 2: was edited: its digest does not fit"]),
        (edited(1, party="hospital-1"), ["its record, opening 2: line 2 is said to be of hospital-1, in the record of hospital-0"]),
        (lambda lines: lines.pop(2), [
            "its record, block 2, opening 3: is signed by hospital-0 and missing in its openings.jsonl"]),
        (lambda lines: lines.insert(1, lines[0]), ["its record, opening 1: comes again"]),
        (lambda lines: lines.append(b"null"), ["its record: line 5 is damaged or was edited: it is no opening"]),
        (lambda lines: lines.append(b"[" * 100_000), ["its record: line 5 is damaged or was edited: it is no opening"]),
        (lambda lines: lines.append({**lines[0], "party": "\x1b[2J"}), [
            "its record: line 5 is damaged or was edited: it is no opening"]),
    ],
)  # fmt: skip
def test_each_change_is_named_where_it_was_made(change: Callable[[list[Any]], Any], expected: list[str]) -> None:
    lines: list[Any] = lines_of("hospital-0")
    change(lines)
    assert found(lines) == expected


def test_a_record_that_is_not_there_or_was_cut_off_is_a_note() -> None:
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines_of("hospital-0")) + b'{"among"'
    records = [RecordCopy("a", "hospital-0", content), RecordCopy("b", "hospital-1", None)]
    findings, notes = verify_records(records, reading())
    assert findings == [] and "last line of a was cut off" in notes[0] and notes[1].startswith("b is not there")


# ---- the command -------------------------------------------------------------------------------------------------------


def interrupted_run(directory: Path) -> Path:
    """hospital-0 began a second opening; the run ended before it was signed."""
    for name in PARTIES:
        ledger = RevealLedger(directory / "parties" / name, identity(name))
        ledger.add(signed(Block(0, "start", "the run begins", PARTIES, (), {}, members(), Chain().seal)))
        first = Opening("sum", "round 1: mean update", (3,), ("aggregator",), PARTIES, transcript="7" * 64)
        ledger.append(first)
        ledger.add(signed(ledger.draft("openings", "round 1", PARTIES)))
        if name == "hospital-0":
            ledger.append(Opening("sum", "round 2: mean update", (3,), ("aggregator",), PARTIES))
    (directory / "federation.crt").write_bytes(pem(authority().certificate))
    return directory


def run(*arguments: object) -> Any:
    return CliRunner().invoke(ledger_commands.app, [str(argument) for argument in arguments])


def test_verify_names_what_a_hospital_began_and_nobody_signed(tmp_path: Path) -> None:
    directory = interrupted_run(tmp_path)
    line = "opening 2: was begun by hospital-0 and is signed nowhere (round 2: mean update)"
    result = run("verify", directory)
    assert result.exit_code == 1 and line in result.output.splitlines()
    said = json.loads(run("verify", directory, "--json").output)
    assert [finding["line"] for finding in said["findings"] if finding["opening"] == 2] == [line]
    assert (said["version"], said["quorum"], said["ok"]) == (2, 2, False)
    (directory / "parties" / "hospital-1" / OPENINGS_FILE).unlink()
    assert "parties/hospital-1/openings.jsonl is not there" in run("verify", directory).output
    shown = run("show", directory).output
    assert f"1: all in it agreed on SHA-256 {'7' * 64}" in shown
    assert (directory / "parties" / "hospital-0" / LEDGER_FILE).is_file()
