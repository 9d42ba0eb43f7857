"""What the launcher knows of its parties: what they say over their pipes, who has failed, hangs, or comes too late.

No wait is without an end. Seconds count while the launcher is awake itself:
- a party gives a sign of life every few seconds (`party_process`); without one for `SILENCE` times as long as its peers
  wait for one (`runtime.silence_timeout`), it is killed and has failed
- so has one that was not started within `START_GRACE`
- and one that is still at work `LAST_GRACE` after all others have finished (the results of a run are there before that); a
  hospital that was started again, and comes too late, is ended after `LATECOMER_GRACE`, and the run counts without it
- one that said that it has finished has written all; if its process is still there after `EXIT_GRACE`, it is killed
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from mpc_fl.apps.runs.party_starter import StartedParty
from mpc_fl.links.silence import Silence
from mpc_fl.progress import Progress
from mpc_fl.roles import is_hospital

SILENCE = 1.5
START_GRACE = 300.0
LAST_GRACE = 60.0
LATECOMER_GRACE = 10.0
EXIT_GRACE = 10.0


@dataclass
class WatchedParty:
    """A party's process and what it said. `since`: seconds awake at its start, and again at its last word."""

    name: str
    process: StartedParty
    pipe: Connection
    since: float
    starts: int = 1
    finished: bool = False
    error: str | None = None
    blames: str | None = None
    failed_at: float = float("inf")
    open: bool = True
    heard: bool = True
    abandoned: bool = False

    @property
    def running(self) -> bool:
        """Whether its process was forked and has not ended."""
        return self.process.pid is not None and self.process.exitcode is None

    @property
    def died(self) -> bool:
        """Whether it ended without a word."""
        return self.process.exitcode is not None and not self.open and not self.finished

    @property
    def failed(self) -> bool:
        """Whether it said so, or died."""
        return self.error is not None or self.died

    @property
    def over(self) -> bool:
        """Whether there is nothing to wait for."""
        return self.finished and (self.abandoned or self.process.exitcode is not None)

    def fail(self, why: str) -> None:
        """End it by force: it failed for this reason, if it has told none."""
        if self.error is None:
            self.error, self.blames, self.failed_at = why, None, time.time()
        self.process.signal(signal.SIGKILL)

    def let_go(self) -> None:
        """End it by force: nobody needs it any more."""
        self.process.signal(signal.SIGKILL)
        self.finished, self.error, self.open, self.abandoned = True, None, False, True


@dataclass
class Watch:
    """All parties; `start` starts one, `spare` is how many hospitals the run can do without, `restarts` how often each of
    them is started again. `lost` are those that were lost, in order, as often as they were. Parties of a task that is
    `endless` have finished only if somebody else told them to."""

    start: Callable[[str, bool], StartedParty]
    silence: Silence
    endless: bool = False
    spare: int = 0
    restarts: int = 0
    parties: list[WatchedParty] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    _given_up: set[str] = field(default_factory=set)
    _alone_since: float | None = None

    def begin(self, name: str, again: bool = False) -> WatchedParty:
        """Start a party; `again`: it goes on from its last round."""
        process = self.start(name, again)
        return WatchedParty(name, process, process.pipe, self.silence.awake)

    def read(self, progress: Progress) -> None:
        """Take in what all parties have said."""
        for party in self.parties:
            try:
                while party.open and party.pipe.poll():
                    self._take(party, json.loads(party.pipe.recv_bytes()), progress)
            except (EOFError, OSError):
                party.open = False

    def _take(self, party: WatchedParty, event: dict[str, object], progress: Progress) -> None:
        party.heard = True
        if "phase" in event:
            progress(party.name, str(event["phase"]), int(str(event["done"])), int(str(event["total"])))
        elif "error" in event and party.error is None:
            blamed = event.get("peer")
            party.error, party.blames = str(event["error"]), None if blamed is None else str(blamed)
            party.failed_at = float(str(event["time"]))
        elif "finished" in event:
            party.finished, party.since = True, self.silence.awake

    def failures(self) -> list[WatchedParty]:
        """Parties that failed, without hospitals that the run can do without."""
        failed = [party for party in self.parties if party.failed or (self.endless and party.finished)]
        return [party for party in failed if not (is_hospital(party.name) and self.spare > 0)]

    def do_without(self, progress: Progress) -> None:
        """Start lost hospitals again, or go on without them as far as the quorum allows."""
        for index, party in enumerate(self.parties):
            if not party.failed or not is_hospital(party.name) or self.spare <= 0 or party.name in self._given_up:
                continue
            if party.process.exitcode is None:
                continue  # it is still taking leave
            self.lost.append(party.name)
            party.pipe.close()
            if party.starts <= self.restarts:
                self.parties[index] = self.begin(party.name, again=True)
                self.parties[index].starts = party.starts + 1
                progress(party.name, "started again", party.starts, self.restarts)
            else:
                self.spare -= 1
                party.finished, party.error, party.open = True, None, False
                self._given_up.add(party.name)
                progress(party.name, "lost", 1, 1)

    # ---- who hangs -------------------------------------------------------------------------------------------------

    def end_hanging(self) -> None:
        """See the head of this module."""
        there = [party for party in self.parties if party.running and not party.finished]
        silent = self.silence.look({party.name: party.heard for party in there})
        awake = self.silence.awake
        for party in there:
            party.heard = False
            if party.name in silent:
                party.heard = True  # once is enough
                party.fail(
                    f"no sign of life for {self.silence.limit:.0f} s (its process was stopped, or this machine hangs): it was"
                    " killed, see its log"
                )
        for party in self.parties:
            if party.process.pid is None and party.process.exitcode is None and awake - party.since > START_GRACE:
                party.fail(f"it was not started within {START_GRACE:.0f} s: this machine has too much to do, or hangs")
            if party.finished and not party.over and awake - party.since > EXIT_GRACE:
                party.let_go()
        self._end_last(awake)

    def _end_last(self, awake: float) -> None:
        late = [party for party in self.parties if not party.finished]
        started_again = all(party.starts > 1 for party in late)
        if not late or len(late) == len(self.parties) or not (started_again or len(late) == 1):
            self._alone_since = None
            return
        if self._alone_since is None:
            self._alone_since = awake
        for party in late:
            if started_again and awake - self._alone_since > LATECOMER_GRACE:
                party.let_go()
            elif awake - self._alone_since > LAST_GRACE and party.failed:  # the run can do without it
                self.lost.append(party.name)
                party.let_go()
            elif awake - self._alone_since > LAST_GRACE:
                party.fail(
                    f"it was still at work {LAST_GRACE:.0f} s after all others had finished: it was killed, see its log"
                )
