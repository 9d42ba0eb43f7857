"""Groups of test patients in a run of real processes: in its metrics, summary, report, model card and signed ledger."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mpc_fl.files import read_json_lines
from tests.integration.test_end_to_end import REPOSITORY, mpc_fl

pytestmark = [pytest.mark.processes, pytest.mark.slow]
SETTINGS = [
    "training.rounds=1",
    "training.local_steps=1",
    "data.phantoms.train_patients=150",
    "data.phantoms.test_patients=300",
    "evaluation.groups.sex=[female, male]",
    "evaluation.groups.age_bands=[30, 60]",
]


@pytest.mark.parametrize("coordinator", ["aggregator", "none"])
def test_a_run_tells_of_groups_and_of_none_that_is_small(coordinator: str, tmp_path: Path) -> None:
    more = [f"federation.coordinator={coordinator}", "privacy.mechanism=none", "privacy.noise_multiplier=null"]
    chosen = [part for setting in [*SETTINGS, *more] for part in ("--set", setting)]
    summary = mpc_fl("train", REPOSITORY / "configs" / "demo.yaml", "--out", tmp_path / "run", *chosen)
    groups = summary["groups"]
    shown = {(of["attribute"], of["group"]) for of in groups["shown"]}
    assert {attribute for attribute, _ in shown} == {"sex", "age"} and len(groups["gaps"]) == 12
    assert ("sex", "unknown") not in shown and ("age", "unknown") not in shown
    assert read_json_lines(tmp_path / "run" / "metrics.jsonl")[-1]["groups"] == groups
    report, card = ((tmp_path / "run" / name).read_text() for name in ("report.html", "model_card.md"))
    assert "Groups of patients" in report and "Sensitivity by group" in report and "Fisher&#x27;s exact test" in report
    assert "By group of patients" in card and "noised numbers of patients" in card
    command = [sys.executable, "-m", "mpc_fl", "ledger", "verify", str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True, timeout=120, check=False, cwd=REPOSITORY).returncode == 0
