"""`mpc-fl serve` never stays half: whichever of its two goes, both end, and everybody is told which one went and how."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpc_fl.config.loading import load_config
from mpc_fl.roles import DEALER, MODEL_OWNER
from tests.support.harness import SPAWN
from tests.support.served import Service, asking_party, configuration, make_service_directory
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes
TO_START = 120.0  # on a busy machine


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("service")
    make_service_directory(path, configuration())
    (path / "config.yaml").write_text(configuration().to_yaml())
    return path


@contextmanager
def served(directory: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """`mpc-fl serve` on this machine."""
    command = ["serve", directory / "config.yaml", "--model", directory / "model.safetensors", "--out", out]
    program = [sys.executable, "-m", "mpc_fl", *map(str, command)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()  # parties end themselves


def half_of(process: subprocess.Popen[str], name: str) -> psutil.Process:
    (found,) = [child for child in psutil.Process(process.pid).children(recursive=True) if child.name() == name]
    return found


class Asking:
    """A hospital in a session, which goes on when it is told to."""

    def __init__(self, out: Path) -> None:
        self.told, self.barrier = SPAWN.Queue(), SPAWN.Barrier(2)
        site = {"identity": str(out / "parties" / "hospital-1" / "identity"), "out": str(out / "hospital-1")}
        config = load_config(out / "federation.yaml").with_values(task="serve", site=site, inference={"limit": 3})
        arguments = ("hospital-1", config.model_dump(mode="json"), self.told, self.barrier, None, None)
        self.process = SPAWN.Process(target=asking_party, args=arguments, name="hospital-1")
        self.process.start()

    def connected(self) -> bool:
        return bool(self.barrier.n_waiting == 1)

    def line(self) -> str:
        """What its user reads in the end."""
        self.barrier.wait(60)
        return str(self.told.get(timeout=60)[1])


@pytest.mark.parametrize(
    ("name", "number", "how"),
    [
        (DEALER, signal.SIGTERM, "was told to stop (SIGTERM): none serves without the other, so both were stopped"),
        pytest.param(DEALER, signal.SIGKILL, "was killed by signal 9", marks=pytest.mark.slow),
        pytest.param(MODEL_OWNER, signal.SIGTERM, "was told to stop (SIGTERM): none", marks=pytest.mark.slow),
        (MODEL_OWNER, signal.SIGKILL, "was killed by signal 9"),
        pytest.param(DEALER, signal.SIGHUP, "was killed by signal 1", marks=pytest.mark.slow),
    ],
)
def test_both_halves_end_and_hospitals_hear_which_one_went(
    name: str, number: signal.Signals, how: str, directory: Path, tmp_path: Path
) -> None:
    with served(directory, tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("The model file could not be checked: ")
        assert process.stdout.readline() == "Hospitals get the label alone.\n"
        halves = [half_of(process, half) for half in (DEALER, MODEL_OWNER)]
        asking = Asking(tmp_path)
        try:
            eventually(asking.connected, TO_START, "the hospital is in a session")
            half_of(process, name).send_signal(number)
            complained = process.stderr.read()
            assert process.wait(60) == 11
            assert complained.startswith(f"mpc-fl: {name} {how}") and complained.count("\n") == 1
            assert psutil.wait_procs(halves, timeout=60)[1] == []
            line = asking.line()
        finally:
            asking.process.kill()
            asking.process.join(60)
    assert name in line and "\n" not in line
    others = {DEALER, MODEL_OWNER} - {name}
    assert not any(f"{other} is being shut down" in line for other in others), line


def test_a_half_that_cannot_start_ends_the_other(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "parties" / DEALER).mkdir(parents=True)
    (tmp_path / "parties" / DEALER / "service.sqlite3").write_text("no database")
    with served(directory, tmp_path) as process:
        _, complained = process.communicate(timeout=TO_START)
    assert process.returncode == 11
    assert complained.startswith("mpc-fl: dealer failed: ") and complained.count("\n") == 1


def test_a_dealer_that_goes_away_is_missed_and_sessions_work_again_when_it_is_back(
    directory: Path,
) -> None:
    """Each with a machine of its own: the model owner stays up."""
    limits: dict[str, Any] = {"images_per_minute": 1000, "images_per_day": 1000}
    service = Service(directory, configuration(), limits)
    log = directory / MODEL_OWNER / "log"
    try:
        assert service.ask("hospital-0", 1, "before")[0] == ""
        service.end_party(DEALER, signal.SIGKILL)
        line, results = service.ask("hospital-0", 1, "without")
        assert "dealer did not connect within 20 s" in line and not results
        eventually(lambda: "dealer is away: " in log.read_text(), 60, "the model owner misses its dealer")
        service.start_party(DEALER)
        line, results = service.ask("hospital-0", 2, "after")
        assert (line, len(results)) == ("", 2)
        assert "dealer is back" in log.read_text()
    finally:
        for process in service.asking:
            process.kill()
        service.end(signal.SIGKILL)
