"""Run all parties of a task as separate processes of this machine, watch them, end all of them when one fails.

The launcher runs exactly the programs that `mpc-fl party` runs at a site, each in a process forked from a server that
holds nothing but imported modules (`fork_server`). It talks to them through one pipe each, in JSON, and reads none of their
data. A party whose pipe to the launcher breaks ends itself, so that no orphan outlives a killed launcher.
"""

from __future__ import annotations

import json
import multiprocessing.connection
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mpc_fl.apps.runs.local_parties import place_parties
from mpc_fl.apps.runs.party_starter import PartyStarter, StartedParty, modules_to_share
from mpc_fl.config.config import Config, may_lose_hospitals
from mpc_fl.errors import RunFailedError
from mpc_fl.progress import Progress
from mpc_fl.roles import is_hospital

# All processes have ended within 10 s of a failure: a party takes leave of its peers first, and tells then.
CAUSE_GRACE = 3.0
TERMINATE_GRACE = 3.0
LATECOMER_GRACE = 10.0


@dataclass
class _Party:
    name: str
    process: StartedParty
    pipe: Connection
    finished: bool = False
    error: str | None = None
    blames: str | None = None
    failed_at: float = float("inf")
    open: bool = True
    starts: int = 1


@dataclass
class _Watch:
    """All parties; `start` starts one, `spare` is how many hospitals the run can do without, `restarts` how often each of
    them is started again. `lost` are those that were lost, in order, as often as they were. Parties of a task that is
    `endless` have finished only if somebody else told them to."""

    start: Callable[[str, bool], _Party]
    endless: bool = False
    spare: int = 0
    restarts: int = 0
    parties: list[_Party] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    _given_up: set[str] = field(default_factory=set)
    _finished_at: float | None = None

    def read(self, party: _Party, progress: Progress) -> None:
        try:
            while party.open and party.pipe.poll():
                event = json.loads(party.pipe.recv_bytes())
                if "phase" in event:
                    progress(party.name, event["phase"], event["done"], event["total"])
                elif "error" in event:
                    party.error, party.blames = event["error"], event.get("peer")
                    party.failed_at = event["time"]
                else:
                    party.finished = True
        except (EOFError, OSError):
            party.open = False

    def failures(self) -> list[_Party]:
        """Parties that failed, without hospitals that the run can do without."""
        failed = [party for party in self.parties if party.error is not None or self._died(party)]
        failed += [party for party in self.parties if self.endless and party.finished]
        return [party for party in failed if not (is_hospital(party.name) and self.spare > 0)]

    def do_without(self, progress: Progress) -> None:
        """Start lost hospitals again, or go on without them as far as the quorum allows."""
        for index, party in enumerate(self.parties):
            failed = party.error is not None or self._died(party)
            if not failed or not is_hospital(party.name) or self.spare <= 0 or party.name in self._given_up:
                continue
            if party.process.exitcode is None:
                continue  # it is still taking leave
            self.lost.append(party.name)
            party.pipe.close()
            if party.starts <= self.restarts:
                self.parties[index] = self.start(party.name, True)
                self.parties[index].starts = party.starts + 1
                progress(party.name, "started again", party.starts, self.restarts)
            else:
                self.spare -= 1
                party.finished, party.error, party.open = True, None, False
                self._given_up.add(party.name)
                progress(party.name, "lost", 1, 1)

    def give_up_latecomers(self) -> None:
        """Hospitals that were started again and came too late: all others have finished, nobody answers them any more."""
        late = [party for party in self.parties if not party.finished]
        if not late or any(party.starts == 1 for party in late):
            self._finished_at = None
            return
        self._finished_at = self._finished_at or time.monotonic()
        if time.monotonic() - self._finished_at > LATECOMER_GRACE:
            for party in late:
                party.process.signal(signal.SIGKILL)
                party.finished, party.error, party.open = True, None, False

    @staticmethod
    def _died(party: _Party) -> bool:
        return party.process.exitcode is not None and not party.open and not party.finished


def start_early(config: Config, task: str) -> PartyStarter:
    """A starter for `launch`, begun before this process reads anything secret: both import at the same time."""
    return PartyStarter(modules_to_share(config.with_values(task=task)))


def launch(config: Config, run_dir: Path, progress: Progress, starter: PartyStarter | None = None) -> list[str]:
    """Run every party of the task to its end, started by `starter` or by one of its own.

    Hospitals that are lost are started again `runtime.restarts` times each; then the run goes on without them as long as
    the quorum holds. Returns the names of lost hospitals, as often as they were lost.

    Raises `RunFailedError` naming the party that failed and why, after all processes have ended (within
    `CAUSE_GRACE` + `TERMINATE_GRACE` seconds, then by force). `KeyboardInterrupt` ends them too and is raised again.
    """
    if starter is None:
        with start_early(config, config.task) as own:
            return launch(config, run_dir, progress, own)
    placed = place_parties(config, run_dir)

    def start(name: str, again: bool) -> _Party:
        values = placed[name].model_dump(mode="json")
        values["site"]["resume"] = values["site"]["resume"] or again
        process = starter.start(name, values)
        return _Party(name, process, process.pipe)

    watch, failures = _Watch(start, endless=config.task == "serve"), list[_Party]()
    if may_lose_hospitals(config):
        watch.spare = config.federation.hospitals - config.federation.quorum_size
        watch.restarts = config.runtime.restarts
    try:
        for name in placed:
            watch.parties.append(start(name, False))
        failures = _watch(watch, progress)
        if any(party.process.lost for party in failures):
            raise starter.failure()
    finally:
        _end_all(watch.parties, _cause(failures) if watch.endless and failures else None)
    if failures:
        raise _explain(failures)
    return watch.lost


def _watch(watch: _Watch, progress: Progress) -> list[_Party]:
    """Wait until all parties have finished or one has failed; the failed ones, with the cause among them if it shows."""
    failed_at: float | None = None
    while True:
        waiting: list[Any] = [party.pipe for party in watch.parties if party.open]
        waiting += [party.process.sentinel for party in watch.parties if party.process.exitcode is None]
        if waiting:
            multiprocessing.connection.wait(waiting, timeout=0.5)
        for party in watch.parties:
            watch.read(party, progress)
        if any(party.process.lost for party in watch.parties):
            return [party for party in watch.parties if party.process.lost]
        watch.do_without(progress)
        watch.give_up_latecomers()
        failures = watch.failures()
        if failures:
            failed_at = failed_at or time.monotonic()
            causes = [party for party in failures if party.blames is None]
            # A loss that one party reports usually has its cause at another: give that one time to say it.
            if causes or not waiting or time.monotonic() - failed_at > CAUSE_GRACE:
                return failures
        elif not waiting:
            return []


def _end_all(parties: list[_Party], because: _Party | None) -> None:
    """End those that are left; `because` of one that ended, which they are told: their sessions shall hear of it."""
    deadline = time.monotonic() + TERMINATE_GRACE
    for party in parties:
        if not party.finished and not (because is not None and _told(party, because)):
            party.process.signal(signal.SIGTERM)
    for party in parties:
        if party.process.pid is not None:  # else it was not even forked
            party.process.join(max(0.1, deadline - time.monotonic()))
            party.process.signal(signal.SIGKILL)
            party.process.join(TERMINATE_GRACE)
            party.process.end_if_lost()
        party.pipe.close()


def _told(party: _Party, because: _Party) -> bool:
    """Tell a party that it shall stop because another has ended; False when it does not listen any more."""
    if party is because:
        return False
    try:
        party.pipe.send_bytes(json.dumps({"ended": because.name, "how": _how(because)}).encode())
    except OSError:
        return False
    return True


def _cause(failures: list[_Party]) -> _Party:
    """A party that failed by itself, or else one that died, before those that report losses; then the earliest."""
    own = [party for party in failures if party.blames is None and party.error is not None]
    dead = [party for party in failures if party.error is None]
    return min(own or dead or failures, key=lambda party: party.failed_at)


def _how(party: _Party) -> str:
    """How a party ended, as all may know it: what it said itself could describe its site."""
    if party.error is not None:
        return f"{party.name} failed"
    if party.finished:
        return f"{party.name} was told to stop (SIGTERM)"
    code = party.process.exitcode
    assert code is not None, "only a process that has ended fails without a word"
    return f"{party.name} was killed by signal {-code}" if code < 0 else f"{party.name} ended with exit status {code}"


def _explain(failures: list[_Party]) -> RunFailedError:
    first, stopped = _cause(failures), "all other parties were stopped"
    if first.error is not None:
        return RunFailedError(f"{_how(first)}: {first.error}")
    if first.finished:
        return RunFailedError(
            _how(first), "none serves without the other, so both were stopped; start mpc-fl serve again"
        )
    if first.process.exitcode in (-signal.SIGKILL, -signal.SIGABRT, -signal.SIGBUS):
        return RunFailedError(_how(first), f"{stopped}; the system does that too when memory runs out")
    return RunFailedError(_how(first), stopped)
