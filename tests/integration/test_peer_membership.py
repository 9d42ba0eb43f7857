"""Hospitals that join a run among peers, by `mpc-fl party` in real processes, and one that leaves it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
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
from tests.support.held_party import reached
from tests.support.waiting import eventually

pytestmark = [pytest.mark.processes, pytest.mark.slow]
SETTINGS: dict[str, Any] = {
    "task": "train",
    "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 30}},
    "model": {"architecture": "mlp", "hidden": [4]},
    "training": {"rounds": 8, "local_steps": 1, "batch_size": 4, "per_sample_gradients": "loop"},
    "privacy": {"mechanism": "none"},
    "runtime": {"connect_timeout": 900.0, "receive_timeout": 1800.0, "silence_timeout": 120.0},
}
SEATS, FOUNDERS, LEAVER = hospital_names(5), hospital_names(3), "hospital-1"
NEWCOMERS = tuple(SEATS[3:])
# Newcomers are started when all founders are in round 2, and those train it when both have asked: so they are in no round before 3.
# hospital-3 needs nobody but founders; it trains round 4 when hospital-4 is linked with it, by an announced address.
HELD = dict.fromkeys(FOUNDERS, "2:hospital-3:asks,2:hospital-4:asks") | {
    "hospital-3": "4:hospital-4:links",
    "hospital-4": "",
}


def start(root: Path, name: str, held: str, *more: str) -> subprocess.Popen[bytes]:
    """A hospital that waits as `held` says (`held_party`), with more arguments for `mpc-fl party`."""
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
        *more,
    ]
    command = [sys.executable, "-m", "tests.support.held_party", held, *arguments]
    with said_by(root, name).open("wb") as said:
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)


def said_by(root: Path, name: str) -> Path:
    return root / f"{name}.txt"


def is_in_round(root: Path, name: str, process: subprocess.Popen[bytes], number: int) -> bool:
    said = said_by(root, name).read_text(errors="replace")
    assert process.poll() is None, said
    return reached(number) in said


def rounds_that_tell(told: dict[str, list[str]], what: str) -> dict[str, int]:
    """By hospital the round whose block, or the block before it that says who is in it, tells this of it."""
    found = dict[str, int]()
    for about, lines in told.items():
        for line in lines:
            if line.startswith(what):
                number = re.search(r"round (\d+)", about)
                assert number is not None, told
                of_whom = line.removeprefix(what).split(", ")
                assert not found.keys() & set(of_whom), told
                found |= dict.fromkeys(of_whom, int(number[1]))
    return found


def run_and_told(root: Path, held: Mapping[str, str], more: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Start founders, and when they are in round 2 the others; what each block of their ledger tells when all have ended well."""
    started = {name: start(root, name, held[name], *more.get(name, ())) for name in FOUNDERS}
    newcomers = [name for name in held if name not in FOUNDERS]
    try:
        for name in FOUNDERS:
            eventually(partial(is_in_round, root, name, started[name], 2), 900, f"{name} is in round 2")
        started |= {name: start(root, name, held[name], *more.get(name, ())) for name in newcomers}
        for process in started.values():
            process.wait(timeout=1800)
    finally:
        for process in started.values():
            process.kill()
            process.wait(timeout=30)
    said = {name: said_by(root, name).read_text(errors="replace") for name in held}
    assert {name: process.returncode for name, process in started.items()} == dict.fromkeys(held, 0), said
    run, authority = root / "run", root / "hospital-0" / "identity" / "federation.crt"
    verified = CliRunner().invoke(ledger.app, ["verify", str(run), "--authority", str(authority)])
    assert verified.exit_code == 0, verified.output
    shown = CliRunner().invoke(ledger.app, ["show", str(run), "--json"])
    return {block["about"]: block["told"] for block in json.loads(shown.output)["blocks"]}


@pytest.mark.timeout(3600)
def test_one_that_can_only_dial_out_joins_through_relays(tmp_path: Path) -> None:
    """So can hospital-2, a founder: the two reach each other through the other founders.

    Those train round 2 when the newcomer has asked them. hospital-2 hears between rounds from them through whom it is reached, and
    trains round 4 when the two are linked.
    """
    seats, dials = hospital_names(4), "hospital-2"
    relays = [name for name in FOUNDERS if name != dials]
    held = dict.fromkeys(relays, "2:hospital-3:asks") | {dials: "2,4:hospital-3:links", "hospital-3": ""}
    federation = {
        "coordinator": "none",
        "hospitals": 4,
        "founders": 3,
        "quorum": 3,
        "session": "joining",
        "addresses": {name: f"127.0.0.1:{port}" for name, port in zip(relays, free_ports(len(relays)), strict=True)},
        "dial_out_only": [dials],
    }
    training = {**SETTINGS["training"], "rounds": 6}
    (tmp_path / "federation.yaml").write_text(
        yaml.safe_dump({**SETTINGS, "training": training, "federation": federation})
    )
    make_local_identities(seats, {name: tmp_path / name / "identity" for name in seats})
    through = ["--set", f"site.reached_through=[{', '.join(relays)}]"]
    told = run_and_told(tmp_path, held, {"hospital-3": through})
    joined = rounds_that_tell(told, "Joined: ")
    assert list(joined) == ["hospital-3"] and 3 <= joined["hospital-3"] <= 5, told
    parties = tmp_path / "run" / "parties"
    assert len({(parties / name / "model.safetensors").read_bytes() for name in seats}) == 1
    relayed = {name: bytes_relayed(parties / name) for name in seats}
    assert {name for name, count in relayed.items() if count} <= set(relays) and any(relayed.values()), relayed


def bytes_relayed(party: Path) -> int:
    phases = json.loads((party / "traffic.json").read_text())["phases"].values()
    return sum(count["bytes_relayed"] for phase in phases for count in phase["peers"].values())


@pytest.mark.timeout(3600)  # what a machine may take that does much else
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
    more = {name: ["--set", f"site.address=127.0.0.1:{ports[name]}"] for name in NEWCOMERS}
    told = run_and_told(tmp_path, HELD, more | {LEAVER: ["--leave-after", "4"]})
    run = tmp_path / "run"
    joined, left = (rounds_that_tell(told, what) for what in ("Joined: ", "Left, as it said: "))
    # hospital-4 must be linked with hospital-3 before it can join, which takes it some rounds or none.
    assert set(joined) == set(NEWCOMERS) and joined["hospital-3"] == 3 <= joined["hospital-4"], told
    assert left == {LEAVER: 5}, told
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
