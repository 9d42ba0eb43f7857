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
_ANSWERING = 8  # threads that always remain to refuse others
_KINDS = 100  # of refusals that are told apart


class Places:
    """The places for `streams` admitted streams, and those beside them for streams that have not greeted.

    Of the latter there are half as many, so that all peers of a large federation may come at once.
    """

    def __init__(self, streams: int) -> None:
        self._streams, self._silent_places = streams, max(_SILENT, streams // 2)
        self.threads = streams + self._silent_places + _ANSWERING
        self._lock = threading.Lock()
        self._tickets = itertools.count()
        self._silent: dict[int, tuple[bytes, Callable[[], object]]] = {}
        self._held: collections.Counter[bytes] = collections.Counter()

    @contextlib.contextmanager
    def silent(self, certificate: bytes, cancel: Callable[[], object], seconds: float) -> Iterator[None]:
        """Wait inside for a stream's greeting. `cancel` ends the stream after `seconds`, or when others need the place."""
        with self._lock:
            ticket = next(self._tickets)
            self._silent[ticket] = (certificate, cancel)
            excess = self._excess(certificate)
        for end in excess:
            end()
        timer = threading.Timer(seconds, cancel)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._lock:
                self._silent.pop(ticket, None)

    def _excess(self, certificate: bytes) -> list[Callable[[], object]]:
        """How to end those that must make room: the oldest of this certificate, or of the one with most."""
        ends: list[Callable[[], object]] = []
        while True:
            counts = collections.Counter(other for other, _ in self._silent.values())
            if counts[certificate] > _SILENT_EACH:
                greedy = certificate
            elif len(self._silent) > self._silent_places:
                greedy = counts.most_common(1)[0][0]
            else:
                return ends
            oldest = next(ticket for ticket, (other, _) in self._silent.items() if other == greedy)
            ends.append(self._silent.pop(oldest)[1])

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
