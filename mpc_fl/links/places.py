"""Who may hold a stream at a party that listens: few for whoever has not greeted, and never all for one certificate.

A stream holds a thread. TLS has shown whose certificate is at its other end, so streams are counted by certificate. One that
says nothing makes room as soon as another of the same certificate needs it: the oldest ends, and whoever has something to
say has said it by then. One that was admitted stays, but no certificate gets more than half of all places.

Also here: how refusals are logged, the first of a kind and then counts, because an attacker writes the log otherwise.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator

from mpc_fl.errors import RefusedError

_SILENT_EACH, _SILENT = 3, 16  # streams without a greeting: of one certificate, and in all at least
_UNKNOWN = 256  # connections that have not been let in yet, at least
_KINDS = 100  # of refusals that are told apart


class _Waiting:
    """Those that have not said yet what they want, each `of` somebody: at most `each` of one, and `most` in all.

    Whoever comes is let in; the oldest makes room, of the one with most. Not locked.
    """

    def __init__(self, each: int, most: int) -> None:
        self._each, self._most = each, most
        self._tickets = itertools.count()
        self._present: dict[int, tuple[bytes, Callable[[], object]]] = {}

    def enter(self, of: bytes, cancel: Callable[[], object]) -> tuple[int, list[Callable[[], object]]]:
        """A ticket to leave with, and how to end those that must make room."""
        ticket = next(self._tickets)
        self._present[ticket] = (of, cancel)
        ends: list[Callable[[], object]] = []
        while True:
            counts = collections.Counter(other for other, _ in self._present.values())
            if counts[of] > self._each:
                greedy = of
            elif len(self._present) > self._most:
                greedy = counts.most_common(1)[0][0]
            else:
                return ticket, ends
            oldest = next(ticket for ticket, (other, _) in self._present.items() if other == greedy)
            ends.append(self._present.pop(oldest)[1])

    def leave(self, ticket: int) -> None:
        """It has said what it wants, or has ended."""
        self._present.pop(ticket, None)


class Places:
    """The places for `streams` admitted streams, and those beside them for streams that have not greeted.

    Of the latter there are half as many, so that all peers of a large federation may come at once. Connections that have not been
    let in yet, whoever they are of, are counted by the machine that they come from.
    """

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._lock = threading.Lock()
        self._silent = _Waiting(_SILENT_EACH, max(_SILENT, streams // 2))
        self._unknown = _Waiting(max(_UNKNOWN, 2 * streams), max(_UNKNOWN, 2 * streams))
        self._held: collections.Counter[bytes] = collections.Counter()

    @contextlib.contextmanager
    def unknown(self, machine: bytes, cancel: Callable[[], object]) -> Iterator[None]:
        """Let a connection in inside, or refuse it. `cancel` ends it when others need the place."""
        with self._waiting(self._unknown, machine, cancel):
            yield

    @contextlib.contextmanager
    def silent(self, certificate: bytes, cancel: Callable[[], object]) -> Iterator[None]:
        """Wait inside for a stream's greeting. `cancel` ends the stream when others need the place."""
        with self._waiting(self._silent, certificate, cancel):
            yield

    @contextlib.contextmanager
    def _waiting(self, waiting: _Waiting, of: bytes, cancel: Callable[[], object]) -> Iterator[None]:
        with self._lock:
            ticket, excess = waiting.enter(of, cancel)
        for end in excess:
            end()
        try:
            yield
        finally:
            with self._lock:
                waiting.leave(ticket)

    @contextlib.contextmanager
    def held(self, certificate: bytes) -> Iterator[None]:
        """Hold a place inside. Raises `RefusedError` when there is none, or none for this certificate."""
        with self._lock:
            if self._held[certificate] >= self._streams // 2 or self._held.total() >= self._streams:
                raise RefusedError("all places for links are taken", "come back in a minute")
            self._held[certificate] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[certificate] -= 1
                if not self._held[certificate]:
                    del self._held[certificate]


class Refusals:
    """Logs refusals at `log`: the first of a kind, then the 10th, the 100th and so on; `close` says how many there were."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()

    def count(self, kind: str, line: str, level: int = logging.WARNING) -> None:
        """One more of `kind`; `line` tells of this one."""
        with self._lock:
            known = kind in self._counts or len(self._counts) < _KINDS
            kind = kind if known else "others"
            self._counts[kind] += 1
            count = self._counts[kind]
        if count == 1:
            self._log.log(level, "%s", line)
        elif count >= 10 and set(str(count)[1:]) == {"0"} and str(count)[0] == "1":
            self._log.log(level, "%s (number %d of this kind)", line, count)

    def close(self) -> None:
        """Log what was refused more than once."""
        with self._lock:
            often = [(kind, count) for kind, count in self._counts.items() if count > 1]
            self._counts.clear()
        for kind, count in often:
            self._log.warning("in all %d times: %s", count, kind)
