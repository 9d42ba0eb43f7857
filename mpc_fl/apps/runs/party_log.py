"""A party's log: one line per event, to a file or to standard error, also of what fails in threads of libraries.

A log that cannot be written (a full disk, a closed terminal) neither ends a party nor prints anything: what needs the disk says so.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

from mpc_fl.chosen_names import NO_NAMES, ChosenNames
from mpc_fl.errors import ConfigError, printable
from mpc_fl.exhaustion import exhaustion, unwritable

_TIME = re.compile(rb"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}")  # how every line of a log begins
_TIME_BYTES = 19


class _Lines(logging.Formatter):
    """One line per event, without tracebacks: those of libraries quote what they were called with.

    Names of files, patients and parties come from others: a line break in one would begin a line that nobody wrote. Parties are
    told of by the names that their sites chose.
    """

    def __init__(self, names: ChosenNames) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._names = names

    def format(self, record: logging.LogRecord) -> str:
        """In one line, without what moves the cursor of a terminal."""
        text = self._names.in_text(super().format(record))
        return printable(text, len(text))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - a name of logging
        """Type and place alone."""
        frames = traceback.extract_tb(ei[2])
        return (
            f"{type(ei[1]).__name__} at {frames[-1].filename}:{frames[-1].lineno}" if frames else type(ei[1]).__name__
        )


class PartyLog(logging.StreamHandler[TextIO]):
    """Where this process logs. A log that cannot be written is no reason to fail; `lost` says why, for whoever ends well."""

    lost: str | None = None

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - a name of logging
        """Remember why. Standard error gets nothing: it may be what is full."""
        error = sys.exc_info()[1]
        self.lost = self.lost or (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def log_nowhere() -> None:
    """Drop what this process logs, also where a library has sent logs to standard error when it was imported."""
    logging.basicConfig(handlers=[logging.NullHandler()], force=True)


def set_up_log(path: Path | None, names: ChosenNames = NO_NAMES) -> None:
    """Send this process's log to a file, or to standard error, with parties called by `names`.

    Raises `MpcFlError` when the file cannot be opened.
    """
    stream = sys.stderr
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _require_log(path)
            stream = path.open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise unwritable(path, error) from None
    handler = PartyLog(stream)
    handler.setFormatter(_Lines(names))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    threading.excepthook = lambda failed: _log_failure(failed.exc_value, failed.thread)
    before = sys.unraisablehook
    sys.unraisablehook = lambda failed: (
        _log_failure(failed.exc_value, None) if isinstance(failed.exc_value, Exception) else before(failed)
    )


def _require_log(path: Path) -> None:
    """Raise `ConfigError` for a file that is there and no log: a configuration of others could name a script, or a key."""
    if not path.is_file():  # to be made, or a device or pipe
        return
    with path.open("rb") as file:
        beginning = file.read(_TIME_BYTES)
    if beginning and _TIME.fullmatch(beginning) is None:
        raise ConfigError(f"site.log {path} exists and is no log of mpc-fl", "name a new file; nothing was written")


def _log_failure(error: BaseException | None, thread: threading.Thread | None) -> None:
    """What ended a thread, or was raised where nobody can hear it: for the log, not for the terminal."""
    if error is None or isinstance(error, SystemExit):
        return
    found, where = exhaustion(error), "a library" if thread is None else f"thread {thread.name}"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    logging.getLogger("mpc_fl").error("%s failed: %s%s", where, found or type(error).__name__, place)


def say_lost_log(path: Path | None) -> None:
    """One line on standard error, at the end of a party that did its work, where its log is not whole."""
    lost = next((log.lost for log in logging.getLogger().handlers if isinstance(log, PartyLog) and log.lost), None)
    if lost and path is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"mpc-fl: the log {path} is not whole: {lost}\n")
