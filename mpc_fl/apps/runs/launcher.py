"""Run all parties of a task as separate processes of this machine, watch them, end all of them when one fails.

The launcher runs exactly the programs that `mpc-fl party` runs at a site, each in a process forked from a server that
holds nothing but imported modules (`fork_server`). It talks to them through one pipe each, in JSON, and reads none of their
data; how long it waits for whom is in `watch`. A party whose pipe to the launcher breaks ends itself, so that no orphan outlives a
killed launcher.
"""

from __future__ import annotations

import json
import multiprocessing.connection
import signal
import time
from pathlib import Path
from typing import Any

from mpc_fl.apps.runs.local_parties import place_parties
from mpc_fl.apps.runs.party_starter import PartyStarter, StartedParty, modules_to_share
from mpc_fl.apps.runs.watch import SILENCE, Watch, WatchedParty
from mpc_fl.chosen_names import told_by_name
from mpc_fl.config.config import Config, connect_seconds, greeting_seconds, may_lose_hospitals
from mpc_fl.errors import RunFailedError
from mpc_fl.links.silence import AtFirst, Silence
from mpc_fl.progress import Progress

# All processes have ended within 10 s of a failure: a party takes leave of its peers first, and tells then.
CAUSE_GRACE = 3.0
TERMINATE_GRACE = 3.0
_LOOK = 0.5


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

    def start(name: str, again: bool) -> StartedParty:
        values = placed[name].model_dump(mode="json")
        values["site"]["resume"] = values["site"]["resume"] or again
        return starter.start(name, values)

    at_first = AtFirst(SILENCE * greeting_seconds(config), connect_seconds(config))
    silence = Silence(SILENCE * config.runtime.silence_timeout, at_first=at_first)
    watch = Watch(start, silence, endless=config.task == "serve")
    failures = list[WatchedParty]()
    if may_lose_hospitals(config):
        watch.spare = config.federation.hospitals - config.federation.quorum_size
        watch.restarts = config.runtime.restarts
    try:
        for name in placed:
            watch.parties.append(watch.begin(name))
        failures = _watch(watch, progress)
        if any(party.process.lost for party in failures):
            raise starter.failure()
    finally:
        _end_all(watch.parties, _cause(failures) if watch.endless and failures else None)
    if failures:
        with told_by_name(config.federation.chosen_names):
            raise _explain(failures)
    return watch.lost


def _watch(watch: Watch, progress: Progress) -> list[WatchedParty]:
    """Wait until all parties have finished or one has failed; the failed ones, with the cause among them if it shows."""
    failed_at: float | None = None
    while True:
        waiting: list[Any] = [party.pipe for party in watch.parties if party.open]
        waiting += [party.process.sentinel for party in watch.parties if party.process.exitcode is None]
        if waiting:
            multiprocessing.connection.wait(waiting, timeout=_LOOK)
        watch.read(progress)
        if any(party.process.lost for party in watch.parties):
            return [party for party in watch.parties if party.process.lost]
        watch.end_hanging()
        watch.do_without(progress)
        failures = watch.failures()
        if failures:
            failed_at = failed_at or time.monotonic()
            causes = [party for party in failures if party.blames is None]
            # A loss that one party reports usually has its cause at another: give that one time to say it.
            if causes or not waiting or time.monotonic() - failed_at > CAUSE_GRACE:
                return failures
        elif all(party.over for party in watch.parties):
            return []


def _end_all(parties: list[WatchedParty], because: WatchedParty | None) -> None:
    """End those that are left; `because` of one that ended, which they are told: their sessions shall hear of it."""
    deadline = time.monotonic() + TERMINATE_GRACE
    for party in parties:
        if not party.finished and not (because is not None and _told(party, because)):
            party.process.signal(signal.SIGTERM)
    forked = [party.process for party in parties if party.process.pid is not None]
    for process in forked:
        process.join(max(0.1, deadline - time.monotonic()))
        process.signal(signal.SIGKILL)
    deadline = time.monotonic() + TERMINATE_GRACE
    for process in forked:
        process.join(max(0.1, deadline - time.monotonic()))
        process.end_if_lost()
    for party in parties:
        party.pipe.close()


def _told(party: WatchedParty, because: WatchedParty) -> bool:
    """Tell a party that it shall stop because another has ended; False when it does not listen any more."""
    if party is because:
        return False
    try:
        party.pipe.send_bytes(json.dumps({"ended": because.name, "how": _how(because)}).encode())
    except OSError:
        return False
    return True


def _cause(failures: list[WatchedParty]) -> WatchedParty:
    """A party that failed by itself, or else one that died, before losses that others report, of these before all that of a
    party that says nothing itself; then the earliest."""
    own = [party for party in failures if party.blames is None and party.error is not None]
    dead = [party for party in failures if party.error is None]
    speaking = {party.name for party in failures}
    silent = [party for party in failures if party.blames not in speaking]
    return min(own or dead or silent or failures, key=lambda party: party.failed_at)


def _how(party: WatchedParty) -> str:
    """How a party ended, as all may know it: what it said itself could describe its site."""
    if party.error is not None:
        return f"{party.name} failed"
    if party.finished:
        return f"{party.name} was told to stop (SIGTERM)"
    code = party.process.exitcode
    assert code is not None, "only a process that has ended fails without a word"
    return f"{party.name} was killed by signal {-code}" if code < 0 else f"{party.name} ended with exit status {code}"


def _explain(failures: list[WatchedParty]) -> RunFailedError:
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
