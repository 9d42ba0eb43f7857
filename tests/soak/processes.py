"""Commands of the product as processes of this machine: start them, find their parties, strike, and see who is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.soak.judging import Ended
from tests.soak.plan import FORK_SERVER

_MARK = "MPC_FL_SOAK"
_LOOK = 0.01


class Command:
    """`mpc-fl ARGUMENTS` with its output in files of `directory`; its processes bear the mark of that directory."""

    def __init__(self, directory: Path, name: str, arguments: list[str]) -> None:
        self.said, self.printed = directory / f"{name}.stderr", directory / f"{name}.stdout"
        environment = {**os.environ, _MARK: str(directory), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
        with self.said.open("w") as error, self.printed.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mpc_fl", *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=error, env=environment,
            )  # fmt: skip

    def ended(self, seconds: float) -> Ended | None:
        """How it ended, or None if it has not within so many seconds."""
        began = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(seconds)
            return Ended(code, self.said.read_text(errors="replace"), time.monotonic() - began)
        return None

    def party(self, name: str) -> psutil.Process | None:
        """Its party of this name, or the process that parties are forked from, while it is there."""
        try:
            children = psutil.Process(self.process.pid).children()
            if name == FORK_SERVER:
                return children[0] if children else None
            parties = [party for server in children for party in server.children()]
            return next((party for party in parties if party.name() == name), None)
        except psutil.NoSuchProcess:
            return None

    def await_party(self, name: str, seconds: float) -> psutil.Process | None:
        """The same once it is there; None if the command ends before or it does not come within so many seconds."""
        deadline = time.monotonic() + seconds
        while (found := self.party(name)) is None and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(_LOOK)
        return found


def send(process: psutil.Process, number: int) -> bool:
    """Send a signal; whether there was somebody to get it."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        process.send_signal(number)
        return True
    except psutil.NoSuchProcess:
        return False


def marked(directory: Path) -> list[psutil.Process]:
    """All processes that were started by commands of this directory, whoever their parent is now."""
    mark, found = f"{_MARK}={directory}".encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(psutil.Process(int(entry.name)))
    return found


def left_after(directory: Path, seconds: float) -> list[str]:
    """Who is still there when so many seconds have passed at most; they are ended by force."""
    deadline = time.monotonic() + seconds
    while (left := marked(directory)) and time.monotonic() < deadline:
        time.sleep(0.1)
    names = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(f"{process.name()} ({process.pid}, {process.status()})")
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(left, timeout=5)
    return names
