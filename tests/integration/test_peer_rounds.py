"""Runs without an aggregator in real processes: whole, beside the mode with one, and with a proposer that is killed or stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mpc_fl.apps.cli import ledger
from mpc_fl.apps.runs.launcher import launch
from mpc_fl.apps.runs.local_runs import train
from mpc_fl.apps.runs.party_starter import PartyStarter, modules_to_share
from mpc_fl.config.config import Config, parse_config
from mpc_fl.links.routes import relayed_route
from mpc_fl.roles import AGGREGATOR
from tests.support.frozen_programs import FREEZE

pytestmark = [pytest.mark.processes, pytest.mark.slow]
SETTINGS: dict[str, Any] = {
    "task": "train",
    "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 30}},
    "model": {"architecture": "mlp", "hidden": [4]},
    "training": {"rounds": 2, "local_steps": 1, "batch_size": 4, "per_sample_gradients": "loop"},
    "privacy": {"mechanism": "none"},
    "runtime": {"connect_timeout": 240.0, "receive_timeout": 600.0},
}


NO_NOISE = {"mechanism": "none"}
ON_XRAYS: dict[str, Any] = {
    "task": "train",
    "data": {
        "source": "images",
        "classes": ["normal", "bacterial", "viral"],
        "image_size": 64,
        "channels": 1,
        "wrong_size": "resize",
    },
    "model": {"architecture": "small_cnn"},
    "training": {"rounds": 2, "local_steps": 2, "batch_size": 32, "gradient_clipping": 1.0, "sampling_seed": 5},
    "privacy": NO_NOISE,
    "runtime": {"connect_timeout": 600.0, "receive_timeout": 1800.0},
}


def require_the_model_of_both_modes(settings: dict[str, Any], hospitals: int, directory: Path) -> None:
    """Trains by real processes without an aggregator and with one, and compares every bit."""
    models = []
    for coordinator, quorum in (("none", max(3, hospitals // 2 + 1)), (AGGREGATOR, hospitals)):
        federation = {"coordinator": coordinator, "hospitals": hospitals, "quorum": quorum}
        config = parse_config({**settings, "federation": federation}, "test")
        summary = train(config, directory / coordinator, "test", lambda *_: None)
        assert not summary.lost
        models.append(load_file(directory / coordinator / "model.safetensors"))
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize("hospitals", [3, pytest.param(5, marks=pytest.mark.long)])
def test_the_model_is_that_of_the_mode_with_an_aggregator(hospitals: int, tmp_path: Path) -> None:
    training = {**SETTINGS["training"], "sampling_seed": 5}
    require_the_model_of_both_modes({**SETTINGS, "training": training}, hospitals, tmp_path)


def test_norms_are_checked_in_both_modes(tmp_path: Path) -> None:
    """All pass, and the model is the same; whoever verifies the ledger sees that one bit of each was opened."""
    training, aggregation = (
        {**SETTINGS["training"], "sampling_seed": 5, "rounds": 1},
        {"norm_check": True, "norm_bound": 10.0},
    )
    settings = {**SETTINGS, "training": training, "aggregation": aggregation}
    require_the_model_of_both_modes(settings, 3, tmp_path)
    verified = CliRunner().invoke(ledger.app, ["verify", str(tmp_path / "none")])
    assert verified.exit_code == 0, verified.output
    lines = [json.loads(line) for line in (tmp_path / "none" / "reveal_ledger.jsonl").read_text().splitlines()]
    opened = [opening for line in lines for opening in line["openings"]]
    (checked,) = [opening for opening in opened if opening["what"] == "whether each update is within its norm bound"]
    assert checked["to"] == checked["among"] == ["hospital-0", "hospital-1", "hospital-2"]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("hospitals", [3, 5])
def test_the_same_on_real_chest_xrays(hospitals: int, xrays: Path, tmp_path: Path) -> None:
    data = {**ON_XRAYS["data"], "path": str(xrays)}
    require_the_model_of_both_modes({**ON_XRAYS, "data": data}, hospitals, tmp_path)


def configuration(hospitals: int) -> Config:
    federation = {"coordinator": "none", "hospitals": hospitals, "quorum": 3}
    return parse_config({**SETTINGS, "federation": federation}, "test")


def test_a_whole_run_of_three(tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = train(configuration(3), out, "test", lambda *_: None)
    assert summary.final is not None and summary.took_part["2"] == ["hospital-0", "hospital-1", "hospital-2"]
    verified = CliRunner().invoke(ledger.app, ["verify", str(out)])
    assert verified.exit_code == 0, verified.output
    for name in (
        "model.safetensors",
        "model_card.md",
        "metrics.jsonl",
        "openings.jsonl",
        "report.html",
        "summary.json",
    ):
        assert (out / name).is_file(), name
    for name in summary.hospitals:
        own = out / "parties" / name
        assert (own / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
        assert (own / "reveal_ledger.jsonl").read_bytes() == (out / "reveal_ledger.jsonl").read_bytes()
        assert not (own / "identity").exists()


@pytest.mark.parametrize("how", ["dies", "stops"])
@pytest.mark.parametrize("phase", ["round 1 attendance", "round 1 training", "round 1 signatures"])
def test_the_proposer_is_lost(how: str, phase: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_without_hospital_1(how, phase, configuration(5), monkeypatch, tmp_path)


@pytest.mark.parametrize("how", ["dies", "stops"])
def test_the_relay_of_two_that_only_dial_out_is_lost(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """hospital-1 proposes, and the two prefer it; another one takes over, and no hospital loses one that is there.

    Where it was not linked with both in time they use the other one from the beginning; `test_peer_relays` loses the used one.
    """
    relays = ["hospital-1", "hospital-0"]
    if relayed_route("hospital-3", "hospital-4", relays).relays[0] != "hospital-1":
        relays.reverse()
    federation = {"dial_out_only": ["hospital-3", "hospital-4"], "relay": relays}
    config = configuration(5).with_values(federation={"coordinator": "none", "hospitals": 5, "quorum": 3, **federation})
    require_without_hospital_1(how, "round 1 training", config, monkeypatch, tmp_path)
    logs = "".join((tmp_path / "logs" / f"{name}.log").read_text() for name in ("hospital-3", "hospital-4"))
    assert "lost hospital-3" not in logs and "lost hospital-4" not in logs


def require_without_hospital_1(
    how: str, phase: str, config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is lost in that phase, and the others end the run, with one ledger."""
    monkeypatch.setenv(FREEZE, f"hospital-1/{phase}/{how}")
    with PartyStarter(modules_to_share(config), "tests.support.frozen_programs") as starter:
        lost = launch(config, tmp_path, lambda *_: None, starter)
    assert lost == ["hospital-1"]
    assert not [child for child in psutil.Process().children(recursive=True) if child.name().startswith("hospital-")]
    ledgers = {
        name: (tmp_path / "parties" / name / "reveal_ledger.jsonl").read_text().splitlines()
        for name in ("hospital-0", "hospital-2", "hospital-3", "hospital-4")
    }
    assert len({tuple(lines) for lines in ledgers.values()}) == 1
    last = json.loads(ledgers["hospital-0"][-1])
    assert last["kind"] == "end" and last["parties"] == list(ledgers)
    assert "hospital-1" in (tmp_path / "logs" / "hospital-2.log").read_text()
