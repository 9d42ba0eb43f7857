"""How much a peer may leave unread, and when the reader of its stream pauses. Not locked: `mailboxes` does.

What a peer may leave unread is bounded (`settings.Unread`). Above `pause` its stream is read no further, so that it has
to wait, but only while this party waits for nobody: then it computes, and ends that by itself. As soon as any of its threads
waits, for a message of whomever or for room to send, all streams are read on; so of those that wait for each other in a
circle nobody has paused, and no pause can be part of a deadlock. Beyond `most` it is read no further even then, and the link
with it ends after `patience`, unless something of it is taken: no protocol has so much under way. What comes through a relay
shares its stream with the relay's own words, so there this holds while the party computes, too.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from mpc_fl.errors import SAME_VERSION, ProtocolError
from mpc_fl.links.frames import Frame
from mpc_fl.links.inbox import memory_of
from mpc_fl.links.mailbox import Mailbox
from mpc_fl.links.settings import Unread

_FRAMES_AHEAD = 4  # of the largest that this party has asked for
_SLICE = 5.0  # seconds between looks of a reader that pauses


class Readers:
    """The threads that read what peers send, of which `pausing` pause, and the `waiting` ones of this party, for which they do not.

    `changed` is the condition of the mailboxes; whoever calls holds its lock, but for `held_up`. `largest_taken`: bytes of memory
    of the largest frame that this party has asked for.
    """

    def __init__(self, changed: threading.Condition, bounds: Unread) -> None:
        self._changed, self._bounds = changed, bounds
        self.waiting = self.pausing = self.largest_taken = 0

    def wait(self, seconds: float) -> None:
        """Let go of the lock until something changes. Meanwhile no reader pauses."""
        self._begin_to_wait()
        try:
            self._changed.wait(seconds)
        finally:
            self.waiting -= 1

    def _begin_to_wait(self) -> None:
        self.waiting += 1
        if self.pausing and self.waiting == 1:
            self._changed.notify_all()

    @contextlib.contextmanager
    def held_up(self) -> Iterator[None]:
        """Inside, a thread of this party waits for others in another way than here: no reader pauses."""
        with self._changed:
            self._begin_to_wait()
        try:
            yield
        finally:
            with self._changed:
                self.waiting -= 1

    def made_room(self) -> None:
        """Something was taken: a reader that pauses looks again."""
        if self.pausing:
            self._changed.notify_all()

    def was_asked_for(self, frame: Frame) -> None:
        """What may stay unread grows with this frame."""
        self.largest_taken = max(self.largest_taken, memory_of(frame))

    def pause(self, sender: str, box: Mailbox, alone: bool, relayed: bool, is_over: Callable[[], bool]) -> None:
        """On the thread that reads what `sender` sends, when a frame of it was put in its `box`, `alone` or beside others.

        Returns when the next one may be read, or nothing is read any more (`is_over`). Raises `ProtocolError` for a frame too many.
        """
        self.pausing += 1
        try:
            self._pause(sender, box, alone, relayed, is_over)
        finally:
            self.pausing -= 1

    def _pause(self, sender: str, box: Mailbox, alone: bool, relayed: bool, is_over: Callable[[], bool]) -> None:
        bounds, start, deadline = self._bounds, box.starts, None
        while box.inbox.unread > bounds.pause and not is_over():
            if box.failure is not None or box.starts != start:
                return
            if not self.waiting and not relayed:
                deadline = None
            elif alone or box.inbox.unread <= max(bounds.most, _FRAMES_AHEAD * self.largest_taken):
                return
            elif deadline is None:
                deadline = time.monotonic() + bounds.patience
            elif time.monotonic() > deadline:
                raise ProtocolError(
                    f"{sender} sent {box.inbox.unread >> 20} MiB that nobody has asked for", SAME_VERSION
                )
            self._changed.wait(min(_SLICE, bounds.patience))
