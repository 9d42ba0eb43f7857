"""The launcher with real processes: whatever ends a run, it names the reason and leaves no process and no half result.

Every test waits for an event of the run (a progress report, a file) and then for the end; no sleep decides anything.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from mpc_fl.apps.cli.progress import PROGRESS_LINE
from mpc_fl.apps.runs.local_parties import local_addresses
from mpc_fl.apps.runs.local_runs import train
from mpc_fl.apps.runs.run_directory import run_directory
from mpc_fl.config.config import parse_config
from mpc_fl.errors import LinkError, RunFailedError
from tests.support.harness import interruptible
from tests.support.waiting import eventually

REPOSITORY = Path(__file__).resolve().parents[3]
TO_START = 150.0  # until a run on a busy machine is under way
TO_END = 10.0  # the launcher's promise, from the event until the last process is gone

# Smallest run that has several rounds before it and after it whatever happens.
ENDLESS = {
    "data": {"image_size": 8, "phantoms": {"train_patients": 24, "test_patients": 12}},
    # At this rate no update exceeds its bound, however many rounds pass before anybody looks.
    "training": {
        "rounds": 100_000,
        "local_steps": 1,
        "batch_size": 4,
        "learning_rate": 1e-6,
        "per_sample_gradients": "loop",
    },
    "privacy": {"mechanism": "none"},
    "federation": {"hospitals": 2},
}
Record = Callable[[str, object], None]  # pytest's record_property: shows up in --junitxml
PARTIES = ["aggregator", "hospital-0", "hospital-1"]


def end_of(processes: list[psutil.Process], began: float, record: Record) -> None:
    """All processes must be gone within the promised time."""
    _, alive = psutil.wait_procs(processes, timeout=max(0.0, began + TO_END - time.monotonic()))
    record("seconds_to_end", round(time.monotonic() - began, 2))
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert not alive, f"still there after {TO_END} s: {alive}"


# Besides the logs: what was opened, who signed for it or had just signed, and what privacy it cost stay known; after a
# complete round also what it takes to go on.
KEPT_OF_A_FAILED_RUN = {
    *("config.yaml", "logs", "federation.crt", "parties", "session"),
    # With the journal of one that was being written: whoever opens it next undoes that.
    *(f"hospital-{rank}-privacy.sqlite3{end}" for rank in range(3) for end in ("", "-journal")),
}
KEPT_OF_A_PARTY = re.compile(
    r"openings\.jsonl|reveal_ledger\.jsonl|unconfirmed_block\.json|metrics\.jsonl|identity|federation\.crt|checkpoint-\d+\.safetensors"
    r"|hospital-\d-privacy\.sqlite3(-journal)?"
)


def only_logs_are_left(out: Path) -> None:
    assert not out.exists() and not out.with_name(f"{out.name}.partial").exists()
    kept = out.with_name(f"{out.name}.failed")
    assert {"config.yaml", "logs"} <= {path.name for path in kept.iterdir()} <= KEPT_OF_A_FAILED_RUN
    assert [path.name for path in kept.glob("parties/*/*") if not KEPT_OF_A_PARTY.fullmatch(path.name)] == []
    assert sorted(path.stem for path in (kept / "logs").iterdir()) == PARTIES


# ---- a party fails -----------------------------------------------------------------------------------------------------


def failing_run(out: Path, values: dict[str, object], strike: Callable[[str, str, int], bool], record: Record) -> str:
    """Run in local processes; the message of the failure. `strike` gets the progress until it says that it has struck."""
    struck, processes = list[float](), list[psutil.Process]()

    def progress(party: str, phase: str, done: int, total: int) -> None:
        if struck:
            return
        # Before the strike: who lost the process it was forked from is no child any more.
        if len(processes) < len(PARTIES):
            processes[:] = running_parties().values()
        if strike(party, phase, done):
            struck.append(time.monotonic())

    with pytest.raises(RunFailedError) as failure:
        train(parse_config(values, "test"), out, "test", progress)
    assert len(struck) == 1 and len(processes) == len(PARTIES), failure.value
    end_of(processes, struck[0], record)
    only_logs_are_left(out)
    return str(failure.value)


def running_parties() -> dict[str, psutil.Process]:
    processes = {process.name(): process for process in psutil.Process().children(recursive=True)}
    return {name: process for name, process in processes.items() if name in PARTIES}


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_party_is_named(tmp_path: Path, number: signal.Signals, record_property: Record) -> None:
    """SIGTERM is also what the launcher itself sends to the others: it must not be mistaken for that."""

    def strike(party: str, phase: str, done: int) -> bool:
        ready = (party, phase) == ("hospital-1", "training") and done >= 3
        if ready:
            running_parties()["hospital-1"].send_signal(number)
        return ready

    message = failing_run(tmp_path / "run", ENDLESS, strike, record_property)
    assert message.startswith(f"hospital-1 was killed by signal {int(number)}: all other parties were stopped")


@pytest.mark.processes
def test_a_killed_fork_server_is_named_and_its_parties_end(tmp_path: Path, record_property: Record) -> None:
    """Nobody tells of the ends of its parties any more; one of them hangs."""

    def strike(party: str, phase: str, done: int) -> bool:
        ready = (party, phase) == ("hospital-1", "training") and done >= 3
        if ready:
            running_parties()["hospital-0"].suspend()
            running_parties()["hospital-1"].parent().kill()
        return ready

    message = failing_run(tmp_path / "run", ENDLESS, strike, record_property)
    assert message == "the process that parties are forked from was killed by signal 9: all parties were stopped"


@pytest.mark.processes
def test_a_party_that_raises_is_named_though_another_hangs(tmp_path: Path, record_property: Record) -> None:
    """hospital-1 finds its privacy ledger damaged. hospital-0 is stopped: it neither answers its peers nor SIGTERM."""
    values = {**ENDLESS, "privacy": {"delta": 0.01, "epsilon": 1e9, "noise_multiplier": 5.0}}

    def strike(party: str, phase: str, done: int) -> bool:
        directory = tmp_path / "run.partial" / "parties" / "hospital-1"
        if (party, phase) != ("hospital-1", "training") or done < 3:
            return False
        # Hold the ledger until hospital-1 waits for it, and so needs nothing of hospital-0 to come to what is in it.
        ledger, parties = directory / "hospital-1-privacy.sqlite3", running_parties()
        held = sqlite3.connect(ledger, isolation_level=None)
        held.execute("BEGIN EXCLUSIVE")
        waits = lambda: str(ledger) in [file.path for file in parties["hospital-1"].open_files()]  # noqa: E731
        eventually(waits, 60.0, "hospital-1 comes to its ledger")
        parties["hospital-0"].suspend()
        ledger.write_text("damaged")
        held.close()
        return True

    message = failing_run(tmp_path / "run", values, strike, record_property)
    ledger = tmp_path / "run.partial" / "parties" / "hospital-1" / "hospital-1-privacy.sqlite3"
    assert message.startswith(f"hospital-1 failed: hospital-1: privacy ledger {ledger} is damaged or was edited")
    log = (tmp_path / "run.failed" / "logs" / "hospital-1.log").read_text()
    assert "is damaged or was edited" in log.splitlines()[-1] and "Traceback" not in log


# ---- the launcher is stopped -------------------------------------------------------------------------------------------


class Command:
    """`mpc-fl train` in a session of its own, as a terminal would start it."""

    def __init__(self, directory: Path) -> None:
        self.out = directory / "run"
        config = directory / "config.yaml"
        config.write_text(yaml.safe_dump(ENDLESS))
        command = [sys.executable, "-m", "mpc_fl", "train", str(config), "--out", str(self.out)]
        self._said = directory / "said"
        with interruptible(), self._said.open("w") as said:
            self.launcher = psutil.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=REPOSITORY, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self._said.read_text()

    @property
    def lines(self) -> list[str]:
        """What it said beside its progress."""
        return [line for line in self.said.splitlines() if not PROGRESS_LINE.fullmatch(line)]

    def wait_for_parties(self) -> list[psutil.Process]:
        """Wait until all parties have been started; the launcher, they and the process they were forked from."""
        helper = 1  # the fork server
        found = lambda: self.launcher.children(recursive=True)  # noqa: E731
        eventually(lambda: len(found()) == helper + len(PARTIES), TO_START, "start of all parties")
        return [self.launcher, *found()]

    def wait_for(self, pattern: str) -> list[psutil.Process]:
        """Wait until a file of that name is there; all processes of the run, the launcher first."""
        partial = self.out.with_name("run.partial")
        eventually(lambda: any(partial.glob(pattern)) or self.launcher.poll() is not None, TO_START, pattern)
        assert self.launcher.poll() is None, self.said
        processes = [self.launcher, *self.launcher.children(recursive=True)]
        assert len(processes) >= 1 + len(PARTIES)
        return processes


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    run = Command(tmp_path)
    yield run
    for process in [*run.launcher.children(recursive=True), run.launcher] if run.launcher.is_running() else []:
        process.kill()
    run.launcher.wait()


@pytest.mark.processes
def test_ctrl_c_stops_every_party(command: Command, record_property: Record) -> None:
    """Ctrl-C reaches all processes of a terminal, here first the parties alone: it is the launcher that decides."""
    for party in command.wait_for_parties()[1:]:
        party.send_signal(signal.SIGINT)
    processes = command.wait_for("parties/aggregator/checkpoint-*.safetensors")
    began = time.monotonic()
    for process in processes * 2:  # twice, as impatient people press it
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGINT)
    assert command.launcher.wait(TO_END) == 128 + signal.SIGINT
    end_of(processes, began, record_property)
    assert command.lines == [
        "mpc-fl: interrupted by SIGINT: nothing was left running; --resume goes on from the last round"
    ]
    assert "Traceback" not in command.said
    only_logs_are_left(command.out)


@pytest.mark.processes
@pytest.mark.slow
def test_a_launcher_stopped_while_parties_start(command: Command, record_property: Record) -> None:
    """The parties were just forked."""
    processes = command.wait_for_parties()
    began = time.monotonic()
    command.launcher.terminate()
    assert command.launcher.wait(TO_END) == 128 + signal.SIGTERM
    end_of(processes, began, record_property)
    # One that was quick may have told of its data before.
    assert command.lines == ["mpc-fl: interrupted by SIGTERM: nothing was left running"]
    assert "Traceback" not in command.said
    assert not command.out.exists() and not command.out.with_name("run.partial").exists()


@pytest.mark.slow
@pytest.mark.processes
def test_parties_end_themselves_when_the_launcher_is_killed(command: Command, record_property: Record) -> None:
    processes = command.wait_for("parties/hospital-1/metrics.jsonl")
    began = time.monotonic()
    command.launcher.kill()
    end_of(processes, began, record_property)
    assert "Traceback" not in command.said
    # Nobody could clean up; the next run must say so and not mix its files with these.
    assert not command.out.exists()
    with pytest.raises(Exception, match=r"run\.partial exists: another run is using it") as refusal:
        with run_directory(command.out):
            pass
    assert refusal.type.__name__ == "ConfigError"


# ---- ports -------------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_named_and_one_just_closed_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LinkError, match=rf"^port {port} for hospital-1 is in use: set runtime\.first_port"):
            local_addresses(["hospital-0", "hospital-1"], port - 1)
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # this side closed first: its port stays in TIME_WAIT
        assert client.recv(1) == b""
        client.close()
    assert local_addresses(["hospital-0"], port) == {"hospital-0": f"127.0.0.1:{port}"}
