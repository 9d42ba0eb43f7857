"""A finished run is given more rounds, with real processes: its model, ledgers and metrics go on, or it stays as it was."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpc_fl.files import read_json_lines
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger

pytestmark = [pytest.mark.processes, pytest.mark.slow]
REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """
data: {image_size: 8, phantoms: {train_patients: 60, test_patients: 30}}
model: {architecture: mlp, hidden: [4]}
training: {rounds: 2, local_steps: 1, batch_size: 8, per_sample_gradients: vmap}
"""


def mpc_fl(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpc_fl", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=REPOSITORY)


def content(run: Path) -> dict[str, str]:
    """Every file of a run but logs, by its digest."""
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix != ".log"]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_finished_run_is_given_more_rounds(tmp_path: Path) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    train = ("train", config, "--out", run)
    done = mpc_fl(*train)
    assert done.returncode == 0, done.stderr
    before = content(run)

    for more, said in [
        ((), "is complete with 2 rounds: set training.rounds to more"),
        (("--set", "training.rounds=1"), "was started with training.rounds 2, not 1"),
        (("--set", "training.rounds=3", "--set", "model.hidden=[5]"), "was started with model.hidden [4], not [5]"),
        (("--set", "training.rounds=3"), "calibrated to the whole budget: epsilon "),
    ]:
        refused = mpc_fl(*train, "--resume", *more)
        assert refused.returncode != 0 and said in refused.stderr, refused.stderr
        assert not list(tmp_path.glob("run.*"))
        kept = content(run)
        changed = {name for name in {**before, **kept} if before.get(name) != kept.get(name)}
        assert all("privacy.sqlite3" in name or "traffic" in name for name in changed), changed

    done = mpc_fl(*train, "--resume", "--set", "training.rounds=3", "--set", "privacy.epsilon=30", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 3
    assert [line["round"] for line in read_json_lines(run / "metrics.jsonl")] == [0, 1, 2, 3]
    records = PrivacyLedger(run / "parties" / "hospital-0" / "hospital-0-privacy.sqlite3", "hospital-0").records()
    assert [record["round"] for record in records] == [1, 2, 3] and len({record["run"] for record in records}) == 1
    assert not list(run.rglob("*.key")) and not list(tmp_path.glob("run.*"))

    verified = mpc_fl("ledger", "verify", run, "--json")
    found = json.loads(verified.stdout)
    assert verified.returncode == 0 and found["findings"] == [], found
    assert any("was given more rounds after it" in note for note in found["notes"])
    model = run / "parties" / "hospital-1" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    assert "is not the one that all parties signed" in mpc_fl("ledger", "verify", run).stdout
