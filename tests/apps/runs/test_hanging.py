"""The launcher and a party that stops or hangs: no wait without an end, and the party is named (see `apps.runs.watch`).

The parties are real processes; one of them freezes itself where the test says. Times of the launcher are made short where
what is tested is what comes after them; signs of life keep their own.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpc_fl.apps.runs import watch
from mpc_fl.apps.runs.launcher import launch
from mpc_fl.apps.runs.party_starter import PartyStarter, modules_to_share
from mpc_fl.config.config import parse_config
from mpc_fl.errors import RunFailedError
from tests.support import served
from tests.support.frozen_programs import FREEZE

pytestmark = [pytest.mark.processes, pytest.mark.slow]
SETTINGS: dict[str, Any] = {
    "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 30}},
    "model": {"architecture": "mlp", "hidden": [4]},
    "training": {"rounds": 3, "local_steps": 1, "batch_size": 4, "per_sample_gradients": "loop"},
    "privacy": {"mechanism": "none"},
    "runtime": {"connect_timeout": 120.0, "receive_timeout": 600.0},
}
PARTIES = {"hospital-0", "hospital-1", "hospital-2", "aggregator"}


def frozen(monkeypatch: pytest.MonkeyPatch, directory: Path, freeze: str, **changes: dict[str, Any]) -> list[str]:
    """Launch a run in which `freeze` happens; the names of lost hospitals."""
    monkeypatch.setenv(FREEZE, freeze)
    values = {name: {**SETTINGS.get(name, {}), **changes.get(name, {})} for name in {*SETTINGS, *changes}}
    config = parse_config({**values, "task": "train"}, "test")
    with PartyStarter(modules_to_share(config), "tests.support.frozen_programs") as starter:
        lost = launch(config, directory, lambda *_: None, starter)
    assert not PARTIES & {process.name() for process in psutil.Process().children(recursive=True)}
    return lost


def failure(monkeypatch: pytest.MonkeyPatch, directory: Path, freeze: str, **changes: dict[str, Any]) -> str:
    with pytest.raises(RunFailedError) as caught:
        frozen(monkeypatch, directory, freeze, **changes)
    assert not PARTIES & {process.name() for process in psutil.Process().children(recursive=True)}
    return str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize(
    ("victim", "phase"), [("hospital-1", "round 2 training"), ("aggregator", "round 2 aggregation")]
)
def test_a_party_stopped_in_a_round_is_named_by_those_who_wait_for_it(
    victim: str, phase: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = failure(monkeypatch, tmp_path, f"{victim}/{phase}/stops")
    assert f"{victim} has given no sign of life for 20 s in phase" in said and f"see the log of {victim}" in said


def test_a_party_stopped_at_the_farewell_is_named_by_the_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All others have finished; its results are not complete before it says so."""
    said = failure(monkeypatch, tmp_path, "hospital-1/closed/stops")
    assert said == (
        "hospital-1 failed: no sign of life for 30 s (its process was stopped, or this machine hangs): it was killed, see its log"
    )


def test_a_party_stopped_after_its_last_word_harms_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(watch, "EXIT_GRACE", 1.0)
    assert frozen(monkeypatch, tmp_path, "hospital-1/end/stops") == []
    assert (tmp_path / "parties" / "hospital-1" / "model.safetensors").exists()


def test_a_party_that_hangs_after_all_others_have_finished_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It still gives signs of life."""
    monkeypatch.setattr(watch, "LAST_GRACE", 2.0)
    said = failure(monkeypatch, tmp_path, "hospital-1/closed/hangs")
    assert said == (
        "hospital-1 failed: it was still at work 2 s after all others had finished: it was killed, see its log"
    )


@pytest.mark.long
def test_a_stopped_hospital_is_started_again_where_there_is_a_quorum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rounds = {"rounds": 400, "local_steps": 1, "batch_size": 4, "per_sample_gradients": "loop"}
    changes: dict[str, dict[str, Any]] = {"federation": {"quorum": 2}, "training": rounds}
    lost = frozen(monkeypatch, tmp_path, "hospital-1/round 2 training/stops", runtime={"restarts": 1}, **changes)
    assert lost == ["hospital-1"]


@pytest.mark.long
def test_a_stopped_party_of_a_service_ends_it_and_is_named(tmp_path: Path) -> None:
    """Nobody asks anything, so no peer can miss it."""
    config = served.configuration().with_values(runtime={"silence_timeout": 20.0})
    served.make_service_directory(tmp_path, config)
    config = config.with_values(site={"model": str(tmp_path / "model.safetensors")})
    served_by: set[str] = set()

    def progress(party: str, phase: str, done: int, total: int) -> None:
        served_by.update({party} if phase == "serving" else ())
        if len(served_by) == 2 and phase == "serving":
            (dealer,) = (each for each in psutil.Process().children(recursive=True) if each.name() == "dealer")
            dealer.suspend()

    with pytest.raises(RunFailedError) as caught:
        launch(config, tmp_path, progress)
    assert str(caught.value).startswith("dealer failed: no sign of life for 30 s")
    assert not {"dealer", "model-owner"} & {each.name() for each in psutil.Process().children(recursive=True)}


@pytest.mark.long
def test_a_stopped_fork_server_keeps_no_run_from_ending(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody tells of the ends of parties any more; they said themselves that they had finished."""
    monkeypatch.setattr(watch, "EXIT_GRACE", 1.0)
    monkeypatch.setenv(FREEZE, "nobody/never/stops")
    config = parse_config({**SETTINGS, "task": "train"}, "test")
    with PartyStarter(modules_to_share(config), "tests.support.frozen_programs") as starter:

        def progress(party: str, phase: str, done: int, total: int) -> None:
            if phase == "training" and done == 1:
                os.kill(starter.pid, signal.SIGSTOP)

        assert launch(config, tmp_path, progress, starter) == []
