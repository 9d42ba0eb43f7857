"""Curves of a party for TensorBoard and MLflow (`site.watch`), drawn from its metrics.jsonl while it works.

A thread reads the file again and again; the protocol writes it whether or not anybody reads, and knows of no curves. Where a round
is made anew, its line is taken out of the file and written again, and the curves follow. After a restart they go on where they
were: curves.json beside the file says what was written.

A curve that cannot be written ends no run: the log says why, and the rounds are written when they can be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mpc_fl.apps.runs.curve_writers import (
    CurveWriter,
    MlflowWriter,
    TensorBoardWriter,
    numbers_of,
    require_installed,
)
from mpc_fl.config.config import Config
from mpc_fl.errors import MpcFlError
from mpc_fl.files import read_json_lines, write_json
from mpc_fl.links.party_links import site_directory
from mpc_fl.parsing import parse_json

log = logging.getLogger(__name__)

METRICS_FILE, KEPT_FILE = "metrics.jsonl", "curves.json"
_PERIOD = 1.0  # seconds between two looks
_END_GRACE = 15.0  # seconds that a party waits for the last rounds to be written
_FAILED_GRACE = 1.0  # of one that failed: others wait to hear of that


class CurveFollower:
    """Keeps one writer up with a metrics.jsonl; `follow` may be called at any time, from one thread."""

    def __init__(self, metrics: Path, open_writer: Callable[[], CurveWriter]) -> None:
        """`open_writer` is called when there is something to write; it may raise, and is asked again then."""
        self._metrics, self._open_writer = metrics, open_writer
        self._writer: CurveWriter | None = None
        # Digests of lines by their rounds: of those that were written; before there is a writer, of all that may have been.
        self._written = {number: _digest(line) for number, line in self._lines().items()}

    def _lines(self) -> dict[int, dict[str, Any]]:
        return {line["round"]: line for line in read_json_lines(self._metrics) if type(line.get("round")) is int}

    def follow(self) -> None:
        """Write what is new. Raises what the writer raises; `DataError` for a file that is damaged."""
        lines = self._lines()
        if not lines:
            return
        if self._writer is None:
            self._writer = self._open_writer()
            last, known = int(self._writer.kept["round"]), max(self._written, default=-1)
            if last > known:  # the file has lost rounds since they were written
                self._writer.forget_from(known + 1)
            self._written = {n: digest for n, digest in self._written.items() if n <= int(self._writer.kept["round"])}
        self._forget_changed(self._writer, lines)
        for number in sorted(set(lines) - set(self._written)):
            self._writer.write(number, numbers_of(lines[number]))
            self._written[number] = _digest(lines[number])

    def _forget_changed(self, writer: CurveWriter, lines: Mapping[int, Mapping[str, Any]]) -> None:
        changed = [n for n, digest in self._written.items() if n not in lines or _digest(lines[n]) != digest]
        if not changed:
            return
        first, before = min(changed), int(writer.kept["round"])
        writer.forget_from(first)
        # A writer that had to begin anew wants all rounds again.
        begun_anew = int(writer.kept["round"]) < min(before, first - 1)
        self._written = {} if begun_anew else {n: digest for n, digest in self._written.items() if n < first}

    @property
    def kept(self) -> dict[str, Any] | None:
        """What the writer needs to go on after a restart; None where it has written nothing."""
        return None if self._writer is None else self._writer.kept

    def close(self, complete: bool) -> None:
        """Write what is new, and no more after it. Raises what the writer raises."""
        self.follow()
        if self._writer is not None:
            self._writer.close(complete)


def _digest(line: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).digest()


def require_watchers(config: Config) -> None:
    """Raise `ConfigError` where a package that `site.watch` needs is not installed."""
    for name in config.site.watch:
        require_installed(name)


@contextlib.contextmanager
def curves_of(config: Config, party: str) -> Iterator[None]:
    """Draw the curves of `party` while the block works, as `site.watch` says. Raises `ConfigError` for a missing package."""
    require_watchers(config)
    if not config.site.watch:
        yield
        return
    drawing = _Drawing(config, party)
    try:
        yield
    except BaseException:
        drawing.end(complete=False)
        raise
    drawing.end(complete=True)


class _Drawing:
    """The thread that follows a party's metrics with all its writers."""

    def __init__(self, config: Config, party: str) -> None:
        self._out, self._ended, self._complete = site_directory(config), threading.Event(), False
        kept = _read_kept(self._out / KEPT_FILE)
        self._followers = {
            name: CurveFollower(self._out / METRICS_FILE, _opener(name, config, party, kept.get(name) or {}))
            for name in config.site.watch
        }
        self._kept, self._told = kept, set[str]()
        self._thread = threading.Thread(target=self._run, name="curves", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(_PERIOD):
            self._each(CurveFollower.follow)
        self._each(lambda follower: follower.close(self._complete))

    def _each(self, do: Callable[[CurveFollower], None]) -> None:
        for name, follower in self._followers.items():
            try:
                do(follower)
            except Exception as error:  # noqa: BLE001 - whatever a library or a server says: no run ends for a curve
                why = str(error) if isinstance(error, MpcFlError) else type(error).__name__
                if why not in self._told:
                    log.warning("the curves for %s cannot be written now: %s", name, why)
                    self._told.add(why)
        found = self._kept | {name: of.kept for name, of in self._followers.items() if of.kept is not None}
        if found != self._kept:
            with contextlib.suppress(MpcFlError):  # a full disk: what needs the disk says so
                write_json(self._out / KEPT_FILE, found)
                self._kept = found

    def end(self, complete: bool) -> None:
        """Write the last rounds, and wait for that a little."""
        self._complete = complete
        self._ended.set()
        grace = _END_GRACE if complete else _FAILED_GRACE
        self._thread.join(grace)
        if self._thread.is_alive():
            log.warning("the last rounds are missing in the curves: writing them took longer than %.0f s", grace)


def _opener(name: str, config: Config, party: str, kept: Mapping[str, Any]) -> Callable[[], CurveWriter]:
    out = site_directory(config)
    if name == "tensorboard":
        return lambda: TensorBoardWriter(out / "tensorboard", kept)
    uri = config.site.mlflow_uri or (out / "mlflow").absolute().as_uri()
    return lambda: MlflowWriter(uri, config.name, party, kept)


def _read_kept(path: Path) -> dict[str, Any]:
    """What was kept, of this party's own; nothing where there is none, or it is damaged: then curves begin anew."""
    try:
        kept = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
