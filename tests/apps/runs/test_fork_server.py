"""What a fork copies: nothing secret, no thread, no randomness; and the ends of parties, server and launcher.

`tests.support.forked_programs` runs in place of a party's program: it says what the fork finds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpc_fl.apps.runs.launcher import start_early
from mpc_fl.apps.runs.memory import peak_memory
from mpc_fl.apps.runs.party_starter import PartyStarter, StartedParty, modules_to_share
from mpc_fl.config.config import parse_config
from mpc_fl.errors import RunFailedError
from tests.support.waiting import eventually

PROGRAM = "tests.support.forked_programs"
PATIENCE = 120.0
pytestmark = pytest.mark.processes


def starter_of(*modules: str) -> PartyStarter:
    return PartyStarter(modules, PROGRAM)


def asked(starter: PartyStarter, what: str) -> tuple[StartedParty, Any]:
    """A party that was asked for something, and its answer; it stays."""
    party = starter.start("somebody", {"do": what})
    assert party.pipe.poll(PATIENCE), starter.failure()
    return party, json.loads(party.pipe.recv_bytes())


def gone(process: int) -> bool:
    return not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


# ---- what a fork finds -------------------------------------------------------------------------------------------------


def test_two_parties_draw_different_seeds_and_keys() -> None:
    """The modules that make them are imported before the fork."""
    with starter_of(*modules_to_share(parse_config({"task": "infer"}, "test"))) as starter:
        draws = [asked(starter, "draw")[1] for _ in range(2)]
    assert set(draws[0]) == {"seed", "exchange", "identity", "system", "python"}
    for kind in draws[0]:
        assert draws[0][kind] != draws[1][kind], kind


def test_a_party_has_the_place_of_its_launcher_and_nothing_else_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPC_FL_TEST", "told")
    monkeypatch.syspath_prepend("/of/the/launcher")
    secret = os.open(tmp_path / "secret", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(secret, True)
    with starter_of() as starter:
        _first, _ = asked(starter, "describe")
        party, found = asked(starter, "describe")
    expected = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    assert {name: found["environment"].get(name) for name in expected} == expected
    assert found["directory"] == str(tmp_path) and found["path"] == sys.path
    # The three of every process, the pipe to the launcher, and the one that lists them.
    assert len(found["descriptors"]) == 5
    assert not {"pytest", "typer", "rich", "mpc_fl.apps.cli.main"} & set(found["modules"])
    assert found["collecting"] and party.pid != starter.pid


def test_a_party_gets_sigterm_but_no_interrupt() -> None:
    with starter_of() as starter:
        party, found = asked(starter, "describe")
        assert found["blocked"] == [signal.SIGINT] and all(found["defaults"])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(starter.pid, number)
        party.signal(signal.SIGINT)
        asked(starter, "describe")  # both live
        party.signal(signal.SIGTERM)
        party.join(PATIENCE)
        assert party.exitcode == -signal.SIGTERM


def test_the_peak_of_memory_is_the_partys_own() -> None:
    with starter_of("tests.support.with_a_peak") as starter:
        _, peak = asked(starter, "measure")
    assert 0 < peak < 200_000_000 < peak_memory() + 200_000_000


# ---- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"task": "infer", "inference": {"engine": "fast"}},
        {"task": "infer", "inference": {"engine": "reference"}},
        {"task": "train"},
        {"task": "train", "aggregation": {"norm_check": True}},
        {"task": "serve", "inference": {"engine": "fast"}},
    ],
    ids=lambda values: "-".join(
        [values["task"], *values.get("inference", {}).values(), *values.get("aggregation", {})]
    ),
)
def test_what_parties_share_starts_no_thread(values: dict[str, Any]) -> None:
    modules = modules_to_share(parse_config(values, "test"))
    assert modules
    with starter_of(*modules) as starter:
        _, found = asked(starter, "describe")
        assert set(modules) <= set(found["modules"])
        assert psutil.Process(starter.pid).num_threads() == 1


def test_a_module_that_starts_a_thread_is_not_shared() -> None:
    with starter_of("tests.support.with_a_thread") as starter:
        party = starter.start("somebody", {})
        party.join(PATIENCE)
        assert party.lost
        assert str(starter.failure()).startswith(
            "the process that parties are forked from failed: RuntimeError: 2 threads run"
        )


def test_a_module_that_cannot_be_imported_is_named() -> None:
    with starter_of("no_such_module") as starter:
        party = starter.start("somebody", {})
        party.join(PATIENCE)
        assert "No module named 'no_such_module'" in str(starter.failure())
        with pytest.raises(RunFailedError, match="no_such_module"):
            starter.start("another", {})


def test_whatever_an_import_raises_is_told_and_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """So Python itself fails where memory runs out."""
    (tmp_path / "out_of_memory.py").write_text("raise SystemError('returned NULL without setting an exception')")
    monkeypatch.syspath_prepend(tmp_path)
    with starter_of("out_of_memory") as starter:
        starter.start("somebody", {}).join(PATIENCE)
        assert "failed: SystemError: returned NULL" in str(starter.failure())
    assert capfd.readouterr().err == ""


def test_a_server_that_cannot_be_started_is_told_with_the_first_party(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else is wrong with the task comes first."""
    monkeypatch.setattr(sys, "executable", "/no/python")
    with starter_of() as starter, pytest.raises(RunFailedError, match="cannot be started: /no/python: No such file"):
        starter.start("somebody", {})


# ---- ends --------------------------------------------------------------------------------------------------------------


def test_ends_of_parties_are_told() -> None:
    with starter_of() as starter:
        killed, _ = asked(starter, "describe")
        finished, _ = asked(starter, "describe")
        killed.signal(signal.SIGKILL)
        finished.pipe.send_bytes(b"end")
        for party in (killed, finished):
            party.join(PATIENCE)
        assert (killed.exitcode, finished.exitcode) == (-signal.SIGKILL, 7)
        assert not killed.lost and not finished.lost
        killed.signal(signal.SIGKILL)  # nothing to do


def test_a_fork_that_raises_does_not_run_on_as_a_server(capfd: pytest.CaptureFixture[str]) -> None:
    with starter_of() as starter:
        party = starter.start("somebody", {"do": "raise"})
        party.join(PATIENCE)
        assert party.exitcode == 1 and "KeyError" in capfd.readouterr().err
        assert not asked(starter, "describe")[0].lost


def test_closing_leaves_no_process_even_if_one_ignores_sigterm() -> None:
    with starter_of() as starter:
        deaf, _ = asked(starter, "be deaf")
        other, _ = asked(starter, "describe")
    for process in (starter.pid, deaf.pid, other.pid):
        assert process is not None and gone(process)


def test_closing_does_not_wait_for_imports() -> None:
    with starter_of("torch", "parties.hospital") as starter:
        party = starter.start("somebody", {"do": "draw"})
    assert gone(starter.pid)
    party.join(PATIENCE)
    assert party.lost and party.pid is None


def test_a_party_that_outlives_the_server_is_ended() -> None:
    with starter_of() as starter:
        deaf, _ = asked(starter, "be deaf")
        eventually(lambda: deaf.pid is not None, PATIENCE, "the server tells of the party it forked")
        os.kill(starter.pid, signal.SIGKILL)
        deaf.join(PATIENCE)
        assert deaf.lost and deaf.pid is not None
        assert "the process that parties are forked from was killed by signal 9" in str(starter.failure())
        deaf.end_if_lost()
        eventually(lambda: gone(deaf.pid or 0), PATIENCE, "the end of the party")


def test_the_launcher_shares_by_task() -> None:
    assert "parties.dealer" in modules_to_share(parse_config({"task": "infer"}, "test"))
    assert "parties.aggregator" in modules_to_share(parse_config({"task": "train"}, "test"))
    with start_early(parse_config({}, "test"), "infer") as starter:
        assert not gone(starter.pid)
    assert gone(starter.pid)
