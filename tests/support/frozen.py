"""Parties as their sites run them, each a process, of which one stops itself (SIGSTOP) on entering a phase."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil

from mpc_fl.config.config import Config, parse_config
from tests.support.deviating import run_and_report
from tests.support.harness import SPAWN
from tests.support.waiting import eventually

TO_START = 150.0  # until a run on a busy machine is under way


def stop_on_entering(phase: str) -> None:
    """Of this process, the first time."""
    from mpc_fl.links.links import Links

    enter_phase, entered_before = Links.set_phase, set[str]()

    def stop_in_phase(links: Links, entered: str) -> None:
        enter_phase(links, entered)
        if entered == phase and phase not in entered_before:
            entered_before.add(phase)
            os.kill(os.getpid(), signal.SIGSTOP)

    Links.set_phase = stop_in_phase  # type: ignore[method-assign]


def _party(name: str, values: dict[str, Any], phase: str | None, results: Any) -> None:
    from mpc_fl.apps.runs.party_process import set_up_log

    config = parse_config(values, name)
    if phase is not None:
        stop_on_entering(phase)
    set_up_log(config.site.log)
    run_and_report(name, config, results)


def await_stopped(process: Any) -> None:
    """Wait until a process has stopped itself; fail when it has ended before."""
    stopped = lambda: process.is_alive() and psutil.Process(process.pid).status() == psutil.STATUS_STOPPED  # noqa: E731
    eventually(lambda: stopped() or not process.is_alive(), TO_START, f"{process.name} stops itself")
    assert stopped(), f"{process.name} ended before"


class Sites:
    """All parties of a run on this machine, without a launcher; `victim` stops on entering `phase`."""

    def __init__(self, config: Config, directory: Path, victim: str, phase: str) -> None:
        from mpc_fl.apps.runs.local_parties import place_parties

        self.victim, self.results = victim, SPAWN.Queue()
        self.said: dict[str, str] = {}
        self.processes: dict[str, Any] = {}
        for name, placed in place_parties(config, directory).items():
            values = placed.model_dump(mode="json")
            arguments = (name, values, phase if name == victim else None, self.results)
            self.processes[name] = SPAWN.Process(target=_party, args=arguments, name=name)
            self.processes[name].start()

    def __enter__(self) -> Sites:
        return self

    def __exit__(self, *_unused: object) -> None:
        for process in self.processes.values():
            if process.is_alive():
                process.kill()  # of one that is stopped, too
            process.join()

    def await_stopped(self) -> None:
        """The victim has come to its phase."""
        await_stopped(self.processes[self.victim])

    def send(self, name: str, number: int) -> None:
        os.kill(self.processes[name].pid, number)

    def await_words(self, count: int, seconds: float = 120.0) -> dict[str, str]:
        """What the next so many parties say last; of all so far."""
        for _ in range(count):
            name, said = self.results.get(timeout=seconds)
            self.said[name] = said
        return self.said
