"""One end of a stream between two parties: chunks go out through a bounded queue and come in through a callback.

What carries the chunks is the matter of `streams`, what they mean that of `connections`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from mpc_fl.errors import MpcFlError, ProtocolError

log = logging.getLogger(__name__)

_OUTGOING_CHUNKS = 4  # of 2 MB, for each peer


class EndedStream(Exception):  # noqa: N818 - a peer that says why it ends the stream, or a broken connection, is no error here
    """What a stream's chunks end with unless they simply stop. `failure`: what the peer said; None where it just broke."""

    def __init__(self, failure: MpcFlError | None) -> None:
        super().__init__()
        self.failure = failure


class Rest(bytes):
    """What has not left yet of a chunk that has begun to leave."""


class Conversation:
    """One end of a stream. `take(chunk)` is called for each chunk that arrives, `ended(failure)` once at the end.

    `take` returns False after the last chunk that matters; what it raises ends the stream. `ended` gets None when the stream
    simply stopped: whether that was to be expected is the caller's matter. `room(length)` says where the next `length` bytes
    belong, if that is known before they come: `take` then gets that very memory.
    """

    def __init__(
        self,
        take: Callable[[bytes | memoryview], bool],
        ended: Callable[[MpcFlError | None], None],
        room: Callable[[int], memoryview | None] = lambda length: None,
    ) -> None:
        self._take = take
        self._ended = ended
        self._room = room
        self._wanted = True
        self._outgoing: queue.Queue[bytes | None] = queue.Queue(_OUTGOING_CHUNKS)
        self._last_chunk = threading.Lock()  # held while a chunk leaves at once, and to find that none follows
        self._leave_at_once: Callable[[bytes], Rest] | None = None
        self._over = threading.Event()
        self._finishing = threading.Event()
        self._all_left = threading.Event()
        self._heard = self.taking = False  # `taking`: whether a chunk of the peer is being taken
        self.last_put = float("-inf")  # when a chunk was queued last, of `time.monotonic`
        self.reached = False  # whether a chunk has left: there was somebody to send it to
        self.refusal: MpcFlError | None = None

    @property
    def over(self) -> bool:
        """Whether nothing can come in any more."""
        return self._over.is_set()

    def put(self, chunk: bytes, seconds: float) -> bool:
        """Send a chunk as far as that waits for nobody, and queue the rest; False when the queue stayed full for `seconds`."""
        if not self._left_at_once(chunk):
            try:
                self._outgoing.put(chunk, timeout=seconds)
            except queue.Full:
                return False
        self.last_put = time.monotonic()
        return True

    def leave_at_once(self, send: Callable[[bytes], Rest]) -> None:
        """From now on whoever puts a chunk first lets it leave as far as `send` can without waiting, which returns the rest."""
        self._leave_at_once = send

    def _left_at_once(self, chunk: bytes) -> bool:
        """Whether the chunk has begun to leave, on the thread that puts it: no other one needs to wake up for it.

        Only where none is under way before it; whoever puts chunks does so one after the other (`frames.FrameWriter`).
        """
        with self._last_chunk:
            if self._leave_at_once is None or self._outgoing.unfinished_tasks or self.over or self._finishing.is_set():
                return False
            if rest := self._leave_at_once(chunk):
                self._outgoing.put_nowait(rest)
            self.reached = True
            return True

    def has_room_to_spare(self) -> bool:
        """Whether a chunk more leaves room for another."""
        return self._outgoing.qsize() < _OUTGOING_CHUNKS // 2

    def heard(self) -> bool:
        """Whether the peer has said something since the last call, or could not: while a chunk of it is being taken.

        That takes long where this party lets a peer wait (`mailboxes`).
        """
        heard, self._heard = self._heard or self.taking, False
        return heard

    def finish(self) -> None:
        """Say that no chunk follows; those queued still leave."""
        self._finishing.set()
        self._wake_sender()

    def _wake_sender(self) -> None:
        with contextlib.suppress(queue.Full):  # then it does not wait
            self._outgoing.put_nowait(None)

    def room_for(self, length: int) -> memoryview | None:
        """Where the next `length` bytes that arrive belong; None where nobody knows yet, or nothing is taken any more."""
        return self._room(length) if self.wanted else None

    @property
    def wanted(self) -> bool:
        """Whether what arrives is taken."""
        return self._wanted and not self._over.is_set()

    def chunks_to_send(self) -> Iterator[bytes]:
        """What leaves: until `finish`, or until the stream is over."""
        try:
            while not self._nothing_follows():
                chunk = self._outgoing.get()
                if chunk is not None:
                    yield chunk
                    self.reached = True
                self._outgoing.task_done()
        finally:
            self._all_left.set()

    def _nothing_follows(self) -> bool:
        with self._last_chunk:
            return self._outgoing.empty() and (self.over or self._finishing.is_set())

    def receive(self, chunks: Iterator[bytes | memoryview]) -> None:
        """Read to the end of the stream, on a thread of its own. Whatever happens there, `ended` is told."""
        failure: MpcFlError | None = None
        try:
            for chunk in chunks:  # read on after the last one: the stream ends when both sides have finished
                self.taking = True
                if self._wanted and (self._over.is_set() or not self._take(chunk)):
                    self._wanted = False
                    self.finish()  # the peer has said its last word, and stays until this side has ended, too
                self._heard, self.taking = True, False
        except MpcFlError as error:
            failure = self.refusal = error
        except EndedStream as end:
            failure = end.failure
        except Exception as error:  # noqa: BLE001 - a thread that dies in silence leaves a link nobody reads
            log.error("unexpected %s while reading a frame at %s", type(error).__name__, place(error))
            failure = self.refusal = ProtocolError(
                f"unexpected {type(error).__name__} while reading a frame (a defect)"
            )
        self.cut()
        self._ended(failure)

    def cut(self) -> None:
        """Take nothing more, whatever the peer still sends."""
        self._over.set()
        self._wake_sender()

    def wait(self, seconds: float | None) -> bool:
        """Wait until nothing can come in any more; False when it took longer than `seconds`."""
        return self._over.wait(seconds)

    def wait_until_left(self, seconds: float) -> bool:
        """Wait until, after `finish`, all chunks have left; False when it took longer than `seconds`."""
        return self._all_left.wait(seconds)


def place(error: BaseException) -> str:
    """File and line: an error's message could quote what was received."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "an unknown place"
