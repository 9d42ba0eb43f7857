"""`mpc-fl audit views`: from the directory of a recorded run to tables, tests, pictures, a report, and an exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from mpc_fl.apps.auditing import views_audit
from mpc_fl.apps.cli import audit
from mpc_fl.apps.report.views_page import write_views_report
from mpc_fl.apps.summaries import SUMMARY_FILE
from mpc_fl.apps.views_summary import PICTURES_FILE, VIEWS_FILE, ViewsSummary
from mpc_fl.audit.model_origin import MODEL_FILE
from mpc_fl.crypto.stream_cipher import Stream
from mpc_fl.errors import ConfigError, DataError
from mpc_fl.federation.global_model import initial_model
from mpc_fl.learning.models.model_file import save_model
from tests.apps.cli.test_audit import finished
from tests.support.auditing import same_seeds
from tests.support.viewed import record_at, tensor_frame, viewed

QUICK = ("--images", 2, "--steps", 10, "--queries", 25)


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    same_seeds(monkeypatch)
    monkeypatch.setattr(views_audit, "LEVEL", 1e-6)  # keys are fresh in every run
    torch.set_num_threads(1)


def recorded(run: Path, key: int = 2) -> Path:
    """A finished run whose aggregator received two summands, the second under this key."""
    config = viewed()
    finished(run, config)
    save_model(run / MODEL_FILE, initial_model(config), config)
    record = record_at(run)
    for number, of in enumerate((1, key)):
        words = torch.full((1200,), number, dtype=torch.int32)
        Stream(bytes([of]) * 32).add_to(words)
        record("hospital-0", tensor_frame(f"summand update {number} 0 0", words))
    return run


def invoked(*arguments: Any) -> Any:
    return CliRunner().invoke(audit.app, ["views", *map(str, arguments)])


def test_a_recorded_run_is_audited_and_reported(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    told = invoked(run, *QUICK, "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["holds"] and found["received"] == [
        {"receiver": "aggregator", "sender": "hospital-0", "what": "summand of a sum", "form": "masked", "messages": 2,
         "bytes": 9600}
    ]  # fmt: skip
    assert [of["view"] for of in found["inversions"]] == ["plaintext", "noised", "masked", "sum"]
    assert found["extraction"]["labels"][-1][0] == 25 and len(found["repeated"]) == 6
    out = tmp_path / "run-views"
    read = ViewsSummary.from_json(json.loads((out / VIEWS_FILE).read_text()))
    assert {**json.loads(json.dumps(read.to_json())), "report": str(out / "report.html")} == found
    report = (out / "report.html").read_text()
    assert report.count("data:image/png") == 9 and "data:image/svg+xml" in report
    assert "summand of a sum" in report and "Release nothing" not in report
    with pytest.raises(ConfigError, match="exists already"):
        raise invoked(run, *QUICK).exception


def test_a_mask_used_twice_is_an_exit_status_and_a_warning(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", key=1)
    told = invoked(run, "--images", 2, "--steps", 10, "--queries", 0)
    assert told.exit_code == 1
    assert "REJECTED: summand of a sum, with the one before, message 1 at aggregator from hospital-0" in told.stdout
    report = (tmp_path / "run-views" / "report.html").read_text()
    assert "Release nothing" in report and "difference: bytes" in report and "needs a trained model" in report


@pytest.mark.parametrize("broken", ["nothing", "no summary", "no record", "damaged record"])
def test_what_cannot_be_audited_is_told_in_one_line(broken: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if broken != "nothing":
        finished(run, viewed())
    if broken == "no summary":
        (run / SUMMARY_FILE).unlink()
    if broken == "damaged record":
        record_at(run)
        (run / "parties" / "aggregator" / "messages" / "messages.jsonl").write_text('{"number": 0}\n')
    told = invoked(run, *QUICK)
    assert isinstance(told.exception, DataError) and str(told.exception).isprintable() and not told.stdout
    assert not (tmp_path / "run-views").exists()
    few = invoked(run, "--queries", 3)
    assert isinstance(few.exception, ConfigError) and "extract no model" in str(few.exception)


def test_pictures_that_are_none_make_no_report(tmp_path: Path) -> None:
    run, place = recorded(tmp_path / "run"), tmp_path / "run-views"
    assert invoked(run, "--images", 2, "--steps", 10, "--queries", 0).exit_code == 0
    for content in (torch.zeros(2, 32, 32), torch.zeros(2, 99, 32, dtype=torch.uint8)):
        save_file({"image": content}, place / PICTURES_FILE)
        with pytest.raises(DataError, match="else than pictures"):
            write_views_report(place)
    (place / PICTURES_FILE).write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        write_views_report(place)
