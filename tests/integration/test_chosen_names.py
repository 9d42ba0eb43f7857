"""A run of three hospitals whose sites chose names, with real processes: people read the names, files keep the identities."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mpc_fl.apps.runs.local_runs import train
from mpc_fl.config.config import parse_config
from mpc_fl.errors import RunFailedError

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).resolve().parents[2]
CHOSEN = {"hospital-0": "charite", "hospital-1": "st-thomas", "hospital-2": "inselspital", "aggregator": "rki"}
VALUES: dict[str, Any] = {
    "data": {"image_size": 8, "phantoms": {"train_patients": 60, "test_patients": 30}},
    "model": {"architecture": "mlp", "hidden": [4]},
    "training": {"rounds": 1, "local_steps": 1, "batch_size": 8, "per_sample_gradients": "vmap"},
    "federation": {"names": CHOSEN},
}


def mpc_fl(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpc_fl", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=REPOSITORY)


def seen(page: Path) -> str:
    """What a reader sees of a report, without its configuration."""
    text = re.sub(r"<style.*?</style>|<details><summary>Resolved.*?</details>", " ", page.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", text)).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's directory and what the command said."""
    directory = tmp_path_factory.mktemp("named")
    (directory / "config.yaml").write_text(yaml.safe_dump(VALUES))
    done = mpc_fl("train", directory / "config.yaml", "--out", directory / "run")
    assert done.returncode == 0, done.stderr
    return directory / "run", done.stdout


def test_the_command_the_report_and_the_logs_tell_names(run: tuple[Path, str]) -> None:
    directory, said = run
    page = seen(directory / "report.html")
    logs = {name: (directory / "logs" / f"{name}.log").read_text() for name in CHOSEN}
    for party, name in CHOSEN.items():
        shown = f"{name} ({party})"
        assert shown in page, shown
        assert f"{shown} starts (train)" in logs[party] and f"{shown} has finished" in logs[party]
        if party != "aggregator":
            assert f"{shown}: epsilon" in said and f"\n{party}: " not in said
    alone = re.compile(r"(?<![\w./(-])hospital-[0-9](?![\w/-])(?!\.\w)")  # neither in a path nor behind its name
    for text in (page, said, *logs.values()):
        assert alone.search(text) is None, alone.search(text)


def test_files_keep_the_identities_and_the_summary_has_both(run: tuple[Path, str]) -> None:
    directory, _ = run
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["names"] == CHOSEN
    assert summary["hospitals"] == [entry["hospital"] for entry in summary["privacy"]] == list(CHOSEN)[:3]
    assert {path.name for path in (directory / "parties").iterdir()} == set(CHOSEN)
    opened = [json.loads(line) for line in (directory / "openings.jsonl").read_text().splitlines()]
    assert all(set(line["among"]) <= set(CHOSEN) for line in opened)


def test_the_ledger_tells_names_by_the_certificates_in_it(run: tuple[Path, str]) -> None:
    directory, _ = run
    (directory / "config.yaml").rename(directory / "config.away")
    try:
        shown, verified = mpc_fl("ledger", "show", directory), mpc_fl("ledger", "verify", directory)
        found = json.loads(mpc_fl("ledger", "show", directory, "--json").stdout)
    finally:
        (directory / "config.away").rename(directory / "config.yaml")
    assert verified.returncode == 0, verified.stdout
    all_of_them = ", ".join(f"{name} ({party})" for party, name in CHOSEN.items())
    assert f"Signed by {all_of_them}" in " ".join(shown.stdout.split())
    assert found["names"] == CHOSEN and found["blocks"][0]["parties"] == list(CHOSEN)


def test_who_was_lost_is_told_by_name(tmp_path: Path) -> None:
    """By the launcher, which goes by identities: whose process it is, and whose log."""
    values = {**VALUES, "training": {**VALUES["training"], "rounds": 500}}
    struck = list[str]()

    def progress(party: str, phase: str, done: int, total: int) -> None:
        if not struck and (party, phase) == ("hospital-1", "training"):
            struck.append(party)
            next(child for child in psutil.Process().children(recursive=True) if child.name() == party).kill()

    with pytest.raises(RunFailedError) as failure:
        train(parse_config(values, "test"), tmp_path / "run", "test", progress)
    assert struck and str(failure.value).startswith("st-thomas (hospital-1) was killed by signal 9: all other parties")
