"""The record without signatures: one line per opening, in the form that every earlier version wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpc_fl.audit import opening_record
from mpc_fl.audit.opening_record import Opening, OpeningRecord


def test_a_line_is_the_same_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening_record.time, "time", lambda: 1790000000.12345)
    record = OpeningRecord(tmp_path / "new" / "openings.jsonl", "hospital-0")
    record.append(Opening("logits", "result of batch 0", (2, 3), ("hospital-0",), ("hospital-0", "model-owner")))
    record.append(Opening("sum", "why", (), ("aggregator",), ("hospital-0",), {"mechanism": "local", "epsilon": 8.0}))
    assert (tmp_path / "new" / "openings.jsonl").read_text() == (
        '{"number": 1, "time": 1790000000.123, "party": "hospital-0", "what": "logits", "why": "result of batch 0", '
        '"shape": [2, 3], "to": ["hospital-0"], "among": ["hospital-0", "model-owner"], "privacy": null, "transcript": null}\n'
        '{"number": 2, "time": 1790000000.123, "party": "hospital-0", "what": "sum", "why": "why", '
        '"shape": [], "to": ["aggregator"], "among": ["hospital-0"], '
        '"privacy": {"mechanism": "local", "epsilon": 8.0}, "transcript": null}\n'
    )
