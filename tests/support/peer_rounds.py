"""Runs among peers in memory, and what must hold of every one of them, whoever was lost."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpc_fl.audit.ledger_audit import Copy, verify_copies
from mpc_fl.audit.ledger_file import now
from mpc_fl.audit.opening_record import OPENINGS_FILE
from mpc_fl.audit.record_audit import RecordCopy, verify_records
from mpc_fl.audit.reveal_ledger import LEDGER_FILE, UNCONFIRMED_FILE
from mpc_fl.crypto.certificates import load_root
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.federation.attendance import ROUNDS_FILE
from mpc_fl.files import read_json_lines
from tests.support.training_in_memory import Training


def names(count: int) -> list[str]:
    return [f"hospital-{rank}" for rank in range(count)]


def among_peers(
    directory: Path, monkeypatch: pytest.MonkeyPatch, count: int = 5, **changes: dict[str, Any]
) -> Training:
    """A run of so many hospitals, of which three are a quorum or more than half of them."""
    federation = {"coordinator": "none", "hospitals": count, "quorum": max(3, count // 2 + 1)}
    federation |= changes.pop("federation", {})
    return Training(directory, monkeypatch, federation=federation, **changes)


def model_of(run: Training, name: str) -> dict[str, torch.Tensor]:
    return load_file(run.party(name) / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def require_sound(run: Training, finished: Collection[str]) -> None:
    """Who has finished has the whole ledger and the same model; no copy of anybody contradicts it, and no opening is unsigned
    but at who was lost."""
    assert all(run.said[name] == "finished" for name in finished), (run.said, run.log[-20:])
    authority = load_root(load_identity(run.party("hospital-0") / "identity", "hospital-0").authority, "test")
    copies, records = list[Copy](), list[RecordCopy]()
    for name in names(run.config.federation.hospitals):
        party = run.party(name)
        if (party / LEDGER_FILE).exists():
            beside = party / UNCONFIRMED_FILE
            unconfirmed = beside.read_bytes() if beside.exists() else b""
            copies.append(Copy(name, name, (party / LEDGER_FILE).read_bytes(), unconfirmed))
        if name in finished:
            records.append(RecordCopy(name, name, (party / OPENINGS_FILE).read_bytes()))
    verdict = verify_copies(copies, authority, now())
    assert not verdict.findings, [finding.line for finding in verdict.findings]
    findings, _ = verify_records(records, verdict.reference)
    assert not findings, [finding.line for finding in findings]
    assert verdict.reference.chain.ended
    first, *others = finished
    assert all(same(model_of(run, first), model_of(run, other)) for other in others)
    rounds = {name: [line["round"] for line in read_json_lines(run.party(name) / ROUNDS_FILE)] for name in finished}
    assert all(found == list(range(run.config.last_round + 1)) for found in rounds.values()), rounds
