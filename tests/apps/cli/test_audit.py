"""`mpc-fl audit`: from the directory of a finished run to bounds, a report, and an exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mpc_fl.apps.cli import audit
from mpc_fl.apps.report.audit_page import write_audit_report
from mpc_fl.apps.summaries import SUMMARY_FILE, PrivacySpent, TrainingSummary
from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError, DataError
from mpc_fl.files import write_json, write_text
from mpc_fl.roles import hospital_names
from tests.support.auditing import NOISE, audited, same_seeds
from tests.support.shortcuts import hospitals_own_run


def finished(directory: Path, config: Config) -> Path:
    """What an audit reads of a run."""
    noise = None if config.privacy.mechanism == "none" else NOISE
    names = hospital_names(config.federation.hospitals)
    spent = [PrivacySpent(name, 1.4, 1e-4, noise, 8.0, config.privacy.mechanism) for name in names]
    summary = TrainingSummary(
        name=config.name, synthetic=True, rounds=1, parameters=9, hospitals=names, seconds=1.0, command="mpc-fl train",
        versions={}, privacy=spent,
    )  # fmt: skip
    directory.mkdir()
    write_text(directory / "config.yaml", config.to_yaml())
    write_json(directory / SUMMARY_FILE, summary.to_json())
    return directory


def invoked(*arguments: Any) -> Any:
    return CliRunner().invoke(audit.app, ["privacy", *map(str, arguments)])


def test_a_run_is_audited_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_seeds(monkeypatch)
    run = finished(tmp_path / "run", audited("local"))
    told = invoked(run, "--canaries", 400, "--at-once", 200, "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["holds"] and found["canaries"] == 400 and found["repetitions"] == 2 and found["unit"] == "patient"
    assert found["upper"] == [found["bounds"][-1]["upper"]] and found["noise_multiplier"] == NOISE
    report = (tmp_path / "run-audit" / "report.html").read_text()
    assert "Epsilon at least" in report and "found no fault" in report and "data:image/svg+xml" in report
    with pytest.raises(ConfigError, match="exists already"):
        raise invoked(run, "--canaries", 400).exception


def test_a_contradiction_is_an_exit_status_and_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_seeds(monkeypatch)
    run, out = finished(tmp_path / "run", audited("local")), tmp_path / "audit"
    assert invoked(run, "--canaries", 200, "--out", out).exit_code == 0
    values = json.loads((out / "audit.json").read_text())
    values["bounds"][0]["lower"] = values["upper"][0] + 1
    (out / "audit.json").write_text(json.dumps(values))
    values["membership"] = {
        "models": 8,
        "patients": 90,
        "area": 0.71,
        "rates": [[0.01, 0.2]],
        "curve": [[0.0, 0.0], [0.01, 0.2], [1.0, 1.0]],
    }
    (out / "audit.json").write_text(json.dumps(values))
    report = write_audit_report(out).read_text()
    assert "Do not release" in report and "8 runs like this one" in report and "20.0 %" in report
    monkeypatch.setattr("mpc_fl.apps.audit_summary.AuditSummary.holds", False)
    assert invoked(run, "--canaries", 200, "--out", tmp_path / "again").exit_code == 1


@pytest.mark.parametrize("broken", ["nothing", "no summary", "too many for delta"])
def test_what_cannot_be_audited_is_told_in_one_line(broken: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if broken != "nothing":
        finished(run, audited("local"))
    if broken == "no summary":
        (run / SUMMARY_FILE).unlink()
    shadows = invoked(run, "--shadows", 2)
    assert isinstance(shadows.exception, ConfigError) and "tell nothing" in str(shadows.exception)
    told = invoked(run, "--canaries", 20_000, "--at-once", 20_000)
    assert isinstance(told.exception, ConfigError if broken == "too many for delta" else DataError)
    assert str(told.exception).isprintable() and not told.stdout
    assert not (tmp_path / "run-audit").exists()


def test_shortcuts_are_found_and_said(tmp_path: Path) -> None:
    run = hospitals_own_run(tmp_path / "run", tmp_path / "films")
    words = ["shortcuts", str(run), "--data", str(tmp_path / "films"), "--no-probe", "--no-left-out"]
    told = CliRunner().invoke(audit.app, words)
    assert told.exit_code == 0, told.output
    assert "corners replaced: accuracy -100.0 points" in told.stdout and "SHORTCUT" in told.stdout
    assert (
        "The run's model shows a shortcut" in told.stdout
        and str(tmp_path / "run-shortcuts" / "report.html") in told.stdout
    )
    told = CliRunner().invoke(audit.app, [*words, "--json", "--out", str(tmp_path / "other")])
    assert "corners replaced" in json.loads(told.stdout.splitlines()[-1])["shortcuts"]
    assert "--no-left-out" in CliRunner().invoke(audit.app, ["shortcuts", "--help"], env={"COLUMNS": "200"}).stdout
