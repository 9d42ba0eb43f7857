"""Comparing what each party recorded of openings with the ledger that all signed.

A party writes an opening to `openings.jsonl` before anything of it leaves, and signs what stands there. So an opening in a
party's record that no block holds was begun and signed nowhere: the run was interrupted, or a block left it out. And a block
holds no opening that is not in the record of each of its parties. This module is pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpc_fl.audit.ledger_audit import Finding, Reading
from mpc_fl.audit.ledger_versions import fields_of
from mpc_fl.audit.opening_record import OPENINGS_FILE
from mpc_fl.audit.reveal_ledger import ChainedOpening, opening_from
from mpc_fl.parsing import parse_json


@dataclass(frozen=True)
class RecordCopy:
    """A party's record: where it lies, whose it is (`None`: whose its lines say), its bytes (`None`: there is none)."""

    where: str
    owner: str | None
    content: bytes | None


@dataclass
class _Record:
    """What could be read of a record: openings by digest, the numbers of those that were edited, and what is wrong."""

    owner: str
    openings: dict[str, ChainedOpening] = field(default_factory=dict)
    edited: set[int] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)


def verify_records(records: Sequence[RecordCopy], reference: Reading) -> tuple[list[Finding], list[str]]:
    """Compare the records of parties with a checked ledger; findings, and notes on what could not be seen.

    A party of version 1 did not always write down what it signed, nor signed all that it had begun: there what is found is a
    note.
    """
    version, findings, notes = reference.chain.version or 1, list[Finding](), list[str]()
    signed = {opening.digest for block in reference.blocks if block for opening in block.openings}
    begun: dict[str, tuple[ChainedOpening, list[str]]] = {}
    for copy in records:
        if copy.content is None:
            notes.append(f"{copy.where} is not there, so what its party began and nobody signed cannot be seen")
            continue
        if not copy.content.endswith(b"\n") and copy.content:
            notes.append(f"the last line of {copy.where} was cut off by a crash; nothing of its opening can have left")
        record = _read(copy, copy.content, version)
        findings += [*record.findings, *_missing(record, copy.where, reference)]
        for digest, opening in record.openings.items():
            if digest not in signed:
                begun.setdefault(digest, (opening, []))[1].append(record.owner)
    for opening, owners in begun.values():
        what = f"was begun by {', '.join(owners)} and is signed nowhere ({opening.why})"
        findings.append(Finding(what, opening=opening.number))
    if version == 1:
        return [], [*notes, *(finding.line for finding in findings)]
    return findings, notes


def _read(copy: RecordCopy, content: bytes, version: int) -> _Record:
    """All whole lines of a record. One that was edited is named once."""
    record = _Record(copy.owner or "")
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            party, opening = _line(parse_json(line), version)
        except ValueError:
            record.findings.append(
                Finding(f"line {number} is damaged or was edited: it is no opening", copy=copy.where)
            )
            continue
        record.owner = record.owner or party
        if party != record.owner:
            what = f"line {number} is said to be of {party}, in the record of {record.owner}"
            record.findings.append(Finding(what, opening=opening.number, copy=copy.where))
        if opening.computed_digest(version) != opening.digest:
            record.edited.add(opening.number)
            what = "was edited: its digest does not fit"
            record.findings.append(Finding(what, opening=opening.number, copy=copy.where))
        elif opening.digest in record.openings:
            record.findings.append(Finding("comes again", opening=opening.number, copy=copy.where))
        else:
            record.openings[opening.digest] = opening
    return record


def _line(value: Any, version: int) -> tuple[str, ChainedOpening]:
    """Party and opening of a line. Raises `ValueError` when it is none."""
    names = fields_of(ChainedOpening, version)
    if not isinstance(value, dict) or set(value) != {*names, "time", "party"}:
        raise ValueError("no line of a record")
    party: Any = value["party"]
    if not isinstance(party, str) or not party.isprintable() or len(party) > 100:
        raise ValueError("no party")
    fields: Mapping[str, Any] = {name: value[name] for name in names}
    return party, opening_from(fields, version)


def _missing(record: _Record, where: str, reference: Reading) -> list[Finding]:
    """Openings that the owner signed and that its record does not hold, but for those named as edited."""
    return [
        Finding(
            f"is signed by {record.owner} and missing in its {OPENINGS_FILE}", block.number, opening.number, copy=where
        )
        for block in reference.blocks
        if block is not None and record.owner in block.parties
        for opening in block.openings
        if opening.digest not in record.openings and opening.number not in record.edited
    ]
