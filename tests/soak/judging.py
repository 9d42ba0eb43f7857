"""What is right after an injection: pure functions from what was seen to complaints. No complaint: nothing bad."""

from __future__ import annotations

import re
import signal as signals
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mpc_fl.apps.cli.progress import PROGRESS_LINE
from tests.soak.plan import (
    ASKING,
    FORK_SERVER,
    KILL,
    LAUNCHER,
    SHORT_STOP,
    SILENCE_TIMEOUT,
    STOP,
    STOP_AND_CONT,
    TERM,
    VARIANTS,
    Injection,
)

TO_END = 30.0  # seconds until a failed run has ended: 10 as the launcher promises, on a machine that does other things
TO_GO_ON = (
    150.0  # all that a run which loses a hospital may wait for: connecting, an answer, one that is late at the end
)
_PARTY = re.compile(r"\b(?:hospital-\d+|aggregator|dealer|model-owner)\b")
_LINK_OF_A_CHAIN = re.compile(r"(hospital-\d+|aggregator|dealer|model-owner) (?:failed|stopped): ")
_NOT_FOR_USERS = ("Traceback (most recent call last)", "a defect", "Logging error", "unexpected ")
_OF_SERVICE = ("model-owner", "dealer")
INTERRUPTED = "mpc-fl: interrupted by SIGTERM: nothing was left running"
_CAN_GO_ON = "; --resume goes on from the last round"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (-N: by signal N), all of its standard error, seconds after the strike."""

    code: int
    said: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What a user reads, without lines of progress."""
        return [line for line in self.said.splitlines() if not PROGRESS_LINE.fullmatch(line)]


def blamed(line: str) -> str | None:
    """The party that a line of the command gives as the cause: the last of a chain, else the first that it names.

    "hospital-0 failed: aggregator stopped: hospital-1 is late" gives hospital-1.
    """
    rest, last = line.removeprefix("mpc-fl: "), None
    while link := _LINK_OF_A_CHAIN.match(rest):
        last, rest = link.group(1), rest[link.end() :]
    named = _PARTY.search(rest)
    return named.group(0) if named else last


def one_line(ended: Ended) -> list[str]:
    """A command that failed says why in exactly one line."""
    if len(ended.lines) == 1 and ended.lines[0].startswith("mpc-fl: "):
        return []
    return [f"exit code {ended.code} with {len(ended.lines)} lines: {' | '.join(ended.lines)}"]


def must_complete(injection: Injection) -> bool:
    """Whether nothing may have come of it: the run goes on, or did not notice."""
    if injection.victim == FORK_SERVER:
        return injection.signal != KILL  # it does not see TERM
    if injection.signal == STOP_AND_CONT and (injection.pause <= SHORT_STOP or injection.victim == LAUNCHER):
        return True
    return injection.victim in VARIANTS[injection.variant].may_lose


def seconds_allowed(injection: Injection, usual: float) -> float:
    """From the strike to the end of the command, of a run that takes `usual` seconds when nobody disturbs it."""
    if injection.signal == TERM and injection.victim == LAUNCHER:
        return TO_END
    silence = 1.5 * SILENCE_TIMEOUT if injection.signal in (STOP, STOP_AND_CONT) else 0.0
    goes_on = TO_GO_ON if injection.victim in VARIANTS[injection.variant].may_lose else TO_END
    return injection.pause + silence + goes_on + 3 * usual


def judge_command(injection: Injection, ended: Ended) -> list[str]:
    """The command that was struck, or whose party was. What it left behind is judged elsewhere."""
    if injection.victim == LAUNCHER and injection.signal in (KILL, TERM):
        return _judge_ended_launcher(injection, ended)
    if ended.code == 0:
        return [f"exit code 0 and says: {line}" for line in ended.lines if line.startswith("mpc-fl: ")]
    if must_complete(injection):
        return [f"exit code {ended.code} where the run should have gone on: {' | '.join(ended.lines)}"]
    return one_line(ended) or judge_blame(injection, ended.lines[0])


def _judge_ended_launcher(injection: Injection, ended: Ended) -> list[str]:
    number = getattr(signals, f"SIG{injection.signal}")
    if ended.code in (0, -number) and not ended.lines:
        return []  # over already; or killed, by TERM before it listened
    if (
        injection.signal == TERM
        and ended.code == 128 + number
        and ended.lines in ([INTERRUPTED], [INTERRUPTED + _CAN_GO_ON])
    ):
        return []
    return [f"exit code {ended.code} after SIG{injection.signal}: {' | '.join(ended.lines)}"]


def judge_blame(injection: Injection, line: str) -> list[str]:
    """Whether a line names the one that was struck and nobody else."""
    if injection.victim == FORK_SERVER:
        right = "the process that parties are forked from was killed by signal 9" in line
    else:
        right = blamed(line) == injection.victim
    return [] if right else [f"does not name {injection.victim}: {line}"]


def judge_asking(injection: Injection, ended: Ended) -> list[str]:
    """A hospital that asks a service of which something was struck: it has its answers, or knows why not."""
    if ended.code == 0:
        return []
    if must_complete(injection):
        return [f"the hospital that asks ended with {ended.code}: {' | '.join(ended.lines)}"]
    if injection.victim == ASKING and injection.signal in (KILL, TERM):
        return [f"of the hospital that asks: {what}" for what in _judge_ended_launcher(injection, ended)]
    if found := one_line(ended):
        return [f"of the hospital that asks: {what}" for what in found]
    line = ended.lines[0]
    if injection.victim in (LAUNCHER, FORK_SERVER) or "did not connect" in line:
        right = blamed(line) in _OF_SERVICE  # both have ended
    elif injection.victim == ASKING:
        right = "hospital-0" in line
    else:
        right = blamed(line) == injection.victim
    return [] if right else [f"the hospital that asks is not told of {injection.victim}: {line}"]


def judge_lost(injection: Injection, lost: Iterable[str]) -> list[str]:
    """A run that completed may have lost only the one that was struck, and only by what takes long enough."""
    unharmed = injection.signal == STOP_AND_CONT and injection.pause <= SHORT_STOP
    allowed = set() if unharmed else {injection.victim}
    return [f"lost {name} as well" for name in sorted(set(lost) - allowed)]


def judge_logs(logs: Mapping[str, str]) -> list[str]:
    """No log and no standard error shows what is not meant for users; `logs` by their names."""
    return [
        f"{name}: {line}"
        for name, text in logs.items()
        for line in text.splitlines()
        if any(sign in line for sign in _NOT_FOR_USERS)
    ]
