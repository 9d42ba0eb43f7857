"""How far a command is, on standard error: bars on a terminal, a line now and then where it goes to a file or a pipe.

A command that fails leaves its error as the only line on a terminal: the bars are wiped away. Elsewhere what was written stays, so
lines of progress are few, have a form of their own (`PROGRESS_LINE`) and never stand for an error.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mpc_fl.apps.cli.options import error_console
from mpc_fl.chosen_names import NO_NAMES, ChosenNames

if TYPE_CHECKING:
    from rich.progress import TaskID

    from mpc_fl.progress import Progress

# For whoever reads standard error of a command: "progress: training 12 of 50, 34 s".
PROGRESS_LINE = re.compile(r"progress: .+, \d+ s")
_LEAST_GAP, _MOST_GAP = 5.0, 60.0  # seconds between two lines
_GAP_SHARE = 0.05  # of the time so far: a run of a day does not fill a file
_AT_ONCE = ("lost", "started again")  # phases that say what became of a party


class ProgressLines:
    """Writes a line when a phase has come further, at most one in 5 seconds, later one in a minute; a loss at once."""

    def __init__(
        self,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        names: ChosenNames = NO_NAMES,
    ) -> None:
        """`clock` in seconds; the first line comes after 5 of them. `names` are what parties are called."""
        self._write, self._clock, self._names = write, clock, names
        self._began = self._last = clock()
        self._phases = _Phases()

    def __call__(self, party: str, phase: str, done: int, total: int) -> None:
        """A party has done so much of a phase."""
        now, (of_all, in_all) = self._clock(), self._phases.take(party, phase, done, total)
        if phase in _AT_ONCE:
            self._write(f"progress: {self._names.shown(party)} {phase}, {now - self._began:.0f} s")
        elif now - self._last >= min(_MOST_GAP, max(_LEAST_GAP, _GAP_SHARE * (now - self._began))):
            self._last = now
            self._write(f"progress: {phase} {of_all} of {in_all}, {now - self._began:.0f} s")


class _Phases:
    """What parties have done of each phase, together."""

    def __init__(self) -> None:
        self._states: dict[str, dict[str, tuple[int, int]]] = {}

    def take(self, party: str, phase: str, done: int, total: int) -> tuple[int, int]:
        """Steps done and steps in all of that phase, of all parties that have begun it."""
        parts = self._states.setdefault(phase, {})
        parts[party] = (done, total)
        return sum(part[0] for part in parts.values()), sum(part[1] for part in parts.values())


@contextmanager
def shown_progress(names: ChosenNames = NO_NAMES) -> Iterator[Progress]:
    """A callback that shows on standard error how far a command is; nothing before the first step.

    `names` are what parties are called.
    """
    if sys.stderr.isatty() and (console := error_console()).is_interactive:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bars, tasks, phases = Progress(*columns, console=console), dict[str, "TaskID"](), _Phases()

        def draw(party: str, phase: str, done: int, total: int) -> None:
            bars.start()
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase)
            of_all, in_all = phases.take(party, phase, done, total)
            bars.update(tasks[phase], completed=of_all, total=in_all)

        try:
            yield draw
        except BaseException:
            bars.live.transient = True  # wiped away: what is said next stands alone
            raise
        finally:
            if tasks:
                bars.stop()
    else:
        yield ProgressLines(_write_line, names=names)


def _write_line(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
