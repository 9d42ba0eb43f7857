"""How far a command is, on standard error: on a terminal, and in a file or pipe."""

from __future__ import annotations

import os
import pty
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mpc_fl.apps.cli.interrupts import Interrupted
from mpc_fl.apps.cli.options import error_console
from mpc_fl.apps.cli.progress import PROGRESS_LINE, ProgressLines, shown_progress
from mpc_fl.errors import LinkError


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(events: list[tuple[float, str, str, int, int]]) -> list[str]:
    """What is written when parties tell this at these seconds."""
    clock, written = Clock(), list[str]()
    lines = ProgressLines(written.append, clock)
    for clock.now, party, phase, done, total in events:
        lines(party, phase, done, total)
    return written


def test_parties_add_up_and_a_line_comes_every_five_seconds() -> None:
    steps = [(float(second), f"hospital-{second % 2}", "training", second // 2 + 1, 20) for second in range(16)]
    assert lines_of(steps) == [
        "progress: training 6 of 40, 5 s",
        "progress: training 11 of 40, 10 s",
        "progress: training 16 of 40, 15 s",
    ]


def test_a_day_of_rounds_does_not_fill_a_file_and_is_never_silent_for_long() -> None:
    written = lines_of([(float(second), "hospital-0", "training", second, 86_400) for second in range(86_400)])
    assert 1000 < len(written) < 1700  # one a minute
    seconds = [int(line.split()[-2]) for line in written]
    assert max(b - a for a, b in zip(seconds, seconds[1:], strict=False)) <= 60


def test_what_became_of_a_party_is_told_at_once_and_names_it() -> None:
    assert lines_of([(1.0, "hospital-1", "lost", 1, 1), (2.0, "hospital-2", "started again", 1, 3)]) == [
        "progress: hospital-1 lost, 1 s",
        "progress: hospital-2 started again, 2 s",
    ]


def test_lines_have_the_form_that_readers_know_and_no_error_has_it() -> None:
    written = lines_of([(9.0, "hospital-0", "load data", 1, 2), (9.0, "hospital-1", "lost", 1, 1)])
    assert len(written) == 2 and all(PROGRESS_LINE.fullmatch(line) for line in written)
    assert not PROGRESS_LINE.fullmatch(f"mpc-fl: {LinkError('progress: x, 3 s')}")


def test_a_quick_command_writes_nothing_into_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress() as progress:
        for done in range(20):
            progress("hospital-0", "training", done, 20)
    assert capsys.readouterr() == ("", "")


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, work: Callable[[], None]) -> str:
    """All that `work` writes to standard error where that is a terminal."""
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        work()
        terminal.flush()
        written = os.read(ours, 1 << 16)
    os.close(ours)
    return written.decode()


def screen_of(written: str) -> list[str]:
    """The lines that are left on a terminal which knows what rich sends: colours, erase a line, go up one, go to its start."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[\d*A", part):
            row = max(0, row - int(part[2:-1] or 1))
        elif not part.startswith("\x1b") and part != "\r":
            lines[row] += part
    return [line.strip() for line in lines if line.strip()]


def test_on_a_terminal_each_phase_has_a_bar_in_which_parties_add_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def work() -> None:
        with shown_progress() as progress:
            for party in ("hospital-0", "hospital-1"):
                progress(party, "connect", 1, 1)
                progress(party, "training", 3, 20)
            progress("hospital-0", "training", 5, 20)

    left = [line.split() for line in screen_of(on_a_terminal(monkeypatch, tmp_path, work))]
    assert [(line[0], line[-2]) for line in left] == [("connect", "2/2"), ("training", "8/40")]


@pytest.mark.parametrize("error", [LinkError("hospital-1 is gone", "look"), Interrupted(15)], ids=["failed", "signal"])
def test_on_a_terminal_an_error_is_the_only_line_that_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    def work() -> None:
        try:
            with shown_progress() as progress:
                progress("hospital-0", "connect", 0, 1)
                progress("hospital-0", "training", 1, 20)
                raise error
        except (LinkError, Interrupted) as found:
            error_console().print(f"mpc-fl: {found}", style="red", markup=False, soft_wrap=True)

    written = on_a_terminal(monkeypatch, tmp_path, work)
    assert "training" in written  # it was there
    assert screen_of(written) == [f"mpc-fl: {error}"]


def test_an_error_before_the_first_step_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LinkError), shown_progress():
        raise LinkError("no")
    assert capsys.readouterr() == ("", "")


def test_an_interrupt_says_what_can_be_done_with_what_is_left() -> None:
    assert str(Interrupted(2)) == "interrupted by SIGINT: nothing was left running"
    error = Interrupted(15)
    error.then = "--resume goes on from the last round"
    assert str(error) == ("interrupted by SIGTERM: nothing was left running; --resume goes on from the last round")
