"""A stream of sealed chunks between two parties that reach each other through relays, of which any may lose or change some.

A sender keeps each chunk until its receiver has it; a receiver takes chunks in their order, passes over what it has, and says
from time to time how many it has ("word"), which is its sign of life, too. Where one is missing or does not open it asks for
all from that one on, naming the relay that brought what came instead, and the sender sends them again, as they were sealed, by
another way. So a relay can keep chunks from arriving, and no more. Sends nothing itself (`ways` does), and takes no lock but
its own.
"""

from __future__ import annotations

import collections
import struct
import threading
import time
from collections.abc import Callable

from mpc_fl.errors import SAME_VERSION, ProtocolError
from mpc_fl.links.sealing import WORDS, Sealer, Unsealer

_WORD = struct.Struct(
    "<Q"
)  # how many chunks were taken; then through which relay those that follow did not come as they should
_LONGEST_NAME = 256
_MOST_KEPT, _MOST_KEPT_BYTES = 1024, 16 << 20  # of chunks that the receiver may not have yet: eight of 2 MB
_SAY_AFTER, _SAY_AFTER_BYTES = 64, 1 << 20  # chunks taken, and their bytes, after which the receiver says so at once
_ASK_AGAIN = 1.0  # seconds after which the same chunk is asked for once more


class SealedStream:
    """Both directions of one link. `reading` is held by whoever takes a chunk and what it completes: several relays bring them."""

    def __init__(self, sealer: Sealer, unsealer: Unsealer, clock: Callable[[], float] = time.monotonic) -> None:
        self.reading = threading.Lock()
        self.over = False
        self._sealer, self._unsealer, self._clock = sealer, unsealer, clock
        self._changed = threading.Condition()
        self._kept: collections.deque[bytes] = collections.deque()  # from chunk number `_first` on
        self._kept_bytes = self._first = self._next = 0
        self._progress = clock()  # when the receiver had more last, or was sent something again
        self._refused = ""
        self._taken = self._unsaid = self._unsaid_bytes = 0
        self._last_word = WORDS - 1
        self._said = clock()
        self._word_due, self._heard = True, False
        self._asks = (-1, 0.0)  # for which chunk, and when
        self._asks_now = ""

    # ---- the sender ------------------------------------------------------------------------------------------------

    def put(self, chunk: bytes, seconds: float) -> bool:
        """Seal a chunk and keep it to be sent; False where for `seconds` there was no room for it."""
        with self._changed:
            if not self._changed.wait_for(self._has_room, seconds):
                return False
            if not self._kept:
                self._progress = self._clock()
            self._kept.append(self._sealer.seal(chunk))
            self._kept_bytes += len(self._kept[-1])
            self._changed.notify_all()
            return True

    def _has_room(self) -> bool:
        return not self.over and len(self._kept) < _MOST_KEPT and self._kept_bytes < _MOST_KEPT_BYTES

    def next_chunk(self) -> tuple[int, bytes] | None:
        """The chunk to be sent next, with its number; None when all were sent."""
        with self._changed:
            place = self._next - self._first
            return (self._next, self._kept[place]) if place < len(self._kept) else None

    def was_sent(self, number: int) -> None:
        """A chunk has left."""
        with self._changed:
            if self._next == number:  # else all were to be sent again meanwhile
                self._next += 1

    def send_again(self) -> None:
        """Begin again with the first chunk that the receiver may not have."""
        with self._changed:
            self._next, self._progress = self._first, self._clock()
            self._changed.notify_all()

    def stuck(self, seconds: float) -> bool:
        """Whether the receiver has taken nothing of what is kept for it for so long."""
        with self._changed:
            return bool(self._kept) and self._clock() - self._progress >= seconds

    def refused_through(self) -> str:
        """The relay through which chunks did not arrive as they should, as the receiver has said since the last call; or ""."""
        with self._changed:
            refused, self._refused = self._refused, ""
            return refused

    @property
    def all_arrived(self) -> bool:
        """Whether the receiver has all chunks."""
        with self._changed:
            return not self._kept

    # ---- the receiver ----------------------------------------------------------------------------------------------

    def take(self, sealed: bytes, relay: str) -> bytes | None:
        """What comes through `relay`: the next chunk, opened; None for a word, and for what is not next.

        Raises `ProtocolError` for what does not open; its place is asked for again.
        """
        with self._changed:
            number = self._unsealer.number_of(sealed)
            try:
                if number >= WORDS:
                    self._hear(number, self._unsealer.unseal(sealed))
                    return None
                if number != self._taken:
                    if number > self._taken:
                        self._ask_again(relay)
                    return None
                chunk = self._unsealer.unseal(sealed)
            except ProtocolError:
                self._ask_again(relay)
                raise
            self._taken += 1
            self._unsaid += 1
            self._unsaid_bytes += len(chunk)
            self._heard = True
            if self._unsaid >= _SAY_AFTER or self._unsaid_bytes >= _SAY_AFTER_BYTES:
                self._say()
            return chunk

    def is_word(self, sealed: bytes) -> bool:
        """Whether it is, or says that it is, a word and no chunk."""
        return self._unsealer.number_of(sealed) >= WORDS

    def _hear(self, number: int, word: bytes) -> None:
        if number <= self._last_word:
            return  # it came by another way, or again
        if not _WORD.size <= len(word) <= _WORD.size + _LONGEST_NAME:
            raise ProtocolError("a word about sealed chunks is none", SAME_VERSION)
        self._last_word, self._heard = number, True
        (taken,) = _WORD.unpack_from(word)
        refused = word[_WORD.size :].decode("utf-8", "replace")
        if taken > self._sealer.chunks:
            raise ProtocolError("more sealed chunks were taken than there are", SAME_VERSION)
        while self._first < taken:
            self._kept_bytes -= len(self._kept.popleft())
            self._first += 1
            self._progress = self._clock()
        self._next = max(self._next, self._first)
        if refused and taken == self._first and self._kept:
            self._refused = refused
        self._changed.notify_all()

    def _ask_again(self, relay: str) -> None:
        asked, since = self._asks
        if asked == self._taken and self._clock() - since < _ASK_AGAIN:
            return
        self._asks, self._asks_now = (self._taken, self._clock()), relay
        self._say()

    def _say(self) -> None:
        self._word_due = True
        self._changed.notify_all()

    def say(self) -> None:
        """Let the sender know at once what was taken."""
        with self._changed:
            self._say()

    def say_after(self, seconds: float) -> None:
        """Let the sender know what was taken, or that this end is there if it has heard nothing for so long."""
        with self._changed:
            if self._unsaid or self._clock() - self._said >= seconds:
                self._say()

    def word(self) -> bytes | None:
        """The word that is due, sealed; None without one."""
        with self._changed:
            if not self._word_due:
                return None
            word = self._sealer.seal_word(_WORD.pack(self._taken) + self._asks_now.encode())
            self._word_due, self._asks_now = False, ""
            self._unsaid = self._unsaid_bytes = 0
            self._said = self._clock()
            return word

    def heard(self) -> bool:
        """Whether something of the other end has come since the last call that had not come before."""
        with self._changed:
            heard, self._heard = self._heard, False
            return heard

    # ---- both ------------------------------------------------------------------------------------------------------

    def await_work(self, seconds: float) -> None:
        """Wait until there is a word or a chunk to send, or the link is over, for at most `seconds`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.over or self._word_due or self._next - self._first < len(self._kept), seconds
            )

    def end(self) -> None:
        """The link is over: nothing is sent any more."""
        with self._changed:
            self.over = True
            self._kept.clear()
            self._changed.notify_all()
