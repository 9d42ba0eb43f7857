"""Hospitals that join a run among peers, by `mpc-fl party` in real processes, and one that leaves it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mpc_fl.apps.cli import ledger
from mpc_fl.apps.runs.launcher import launch
from mpc_fl.apps.runs.party_starter import PartyStarter, modules_to_share
from mpc_fl.audit.ledger_audit import parse_line
from mpc_fl.audit.peer_record import lines_of
from mpc_fl.config.config import parse_config
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.roles import hospital_names
from tests.support.frozen_programs import FREEZE
from tests.support.harness import free_ports

pytestmark = [pytest.mark.processes, pytest.mark.slow]
SETTINGS: dict[str, Any] = {
    "task": "train",
    "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 30}},
    "model": {"architecture": "mlp", "hidden": [4]},
    "training": {"rounds": 8, "local_steps": 1, "batch_size": 4, "per_sample_gradients": "loop"},
    "privacy": {"mechanism": "none"},
    "runtime": {"connect_timeout": 240.0, "receive_timeout": 600.0},
}
SEATS, FOUNDERS, LEAVER = hospital_names(5), hospital_names(3), "hospital-1"
# Founders train round 2 when hospital-3 has asked; that trains round 4 when hospital-4 is linked with it, by an announced address.
HELD = {"hospital-3": "4:hospital-4:links", "hospital-4": ""} | dict.fromkeys(FOUNDERS, "2:hospital-3:asks")


def start(root: Path, name: str, port: int) -> subprocess.Popen[str]:
    identity, out = root / name / "identity", root / "run" / "parties" / name
    arguments = [
        "party",
        name,
        "--config",
        str(root / "federation.yaml"),
        "--identity",
        str(identity),
        "--out",
        str(out),
    ]
    if name not in FOUNDERS:
        arguments += ["--set", f"site.address=127.0.0.1:{port}"]
    if name == LEAVER:
        arguments += ["--leave-after", "4"]
    command = [sys.executable, "-m", "tests.support.held_party", HELD[name], *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long  # holds for ever where hospital-3 is ready before round 1: then nobody asks later
@pytest.mark.timeout(1000)
def test_two_join_and_one_leaves(tmp_path: Path) -> None:
    ports = dict(zip(SEATS, free_ports(len(SEATS)), strict=True))
    federation = {
        "coordinator": "none",
        "hospitals": 5,
        "founders": 3,
        "quorum": 3,
        "session": "joining",
        "addresses": {name: f"127.0.0.1:{ports[name]}" for name in FOUNDERS},
    }
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump({**SETTINGS, "federation": federation}))
    make_local_identities(SEATS, {name: tmp_path / name / "identity" for name in SEATS})
    started = {name: start(tmp_path, name, ports[name]) for name in SEATS}
    said = {}
    try:
        for name, process in started.items():
            said[name] = process.communicate(timeout=900)[0]
    finally:
        for process in started.values():
            process.kill()
            process.wait(timeout=30)
    assert {name: process.returncode for name, process in started.items()} == dict.fromkeys(SEATS, 0), said
    run, authority = tmp_path / "run", tmp_path / "hospital-0" / "identity" / "federation.crt"
    verified = CliRunner().invoke(ledger.app, ["verify", str(run), "--authority", str(authority)])
    assert verified.exit_code == 0, verified.output
    shown = CliRunner().invoke(ledger.app, ["show", str(run), "--json"])
    told = {block["about"]: block["told"] for block in json.loads(shown.output)["blocks"]}
    joined = [line for of in told.values() for line in of if line.startswith("Joined: ")]  # when depends on the machine
    assert sorted(", ".join(line.removeprefix("Joined: ") for line in joined).split(", ")) == list(SEATS[3:]), told
    assert any(about.startswith("round 5") and f"Left, as it said: {LEAVER}" in of for about, of in told.items()), told
    models = {name: (run / "parties" / name / "model.safetensors").read_bytes() for name in SEATS}
    stayed = [name for name in SEATS if name != LEAVER]
    assert len({models[name] for name in stayed}) == 1 and models[LEAVER] != models[stayed[0]]


@pytest.mark.parametrize("phase", ["round 1 training", "round 1 signatures"])
def test_one_that_died_is_started_again(phase: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FREEZE, f"hospital-1/{phase}/dies")
    federation = {"coordinator": "none", "hospitals": 4, "quorum": 3}
    runtime = {**SETTINGS["runtime"], "restarts": 1}
    training = {**SETTINGS["training"], "rounds": 5}
    config = parse_config({**SETTINGS, "federation": federation, "runtime": runtime, "training": training}, "test")
    with PartyStarter(modules_to_share(config), "tests.support.held_programs") as starter:
        assert launch(config, tmp_path, lambda *_: None, starter) == ["hospital-1"]
    ledgers = {(tmp_path / "parties" / name / "reveal_ledger.jsonl").read_bytes() for name in hospital_names(4)}
    assert len(ledgers) == 1
    told = lines_of([parse_line(line) for line in ledgers.pop().splitlines()])
    assert [line for lines in told for line in lines if "Came back" in line] == ["Came back: hospital-1"]
    verified = CliRunner().invoke(
        ledger.app,
        ["verify", str(tmp_path), "--authority", str(tmp_path / "parties/hospital-0/identity/federation.crt")],
    )
    assert verified.exit_code == 0, verified.output
