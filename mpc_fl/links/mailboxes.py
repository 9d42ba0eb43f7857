"""What has arrived from each peer and who is lost: the only place where a protocol waits, always with a deadline.

Every change (a message, a loss, a peer that connected, an interruption) wakes all who wait, and each looks whether it
concerns them. Losing a party ends every wait, except that the loss of a tolerated one, once all have been connected,
ends only the waits for that one.

How much a peer may leave unread, and whose stream is read no further meanwhile, is `readers`.

Lock order of this package: `Connections` (who may make a link anew), `Relay` (greetings kept), the writers of frames (of
the receiver, then of the relay to it), and last the one lock of the mailboxes, under which none but that of `silence` is taken.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager

from mpc_fl.errors import SAME_VERSION, MpcFlError, PeerLostError, PeerRefusedError, ProtocolError, RefusedLinkError
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.inbox import EndedTags
from mpc_fl.links.losses import (
    Known,
    Loss,
    as_heard,
    first_named,
    gave_up,
    gives_up,
    is_explained,
    late,
    never_came,
    not_relayable,
    without_sign,
)
from mpc_fl.links.mailbox import Mailbox
from mpc_fl.links.readers import Readers
from mpc_fl.links.settings import Timeouts, Tolerance
from mpc_fl.links.silence import AtFirst, Silence
from mpc_fl.links.traffic import TrafficCounter


class Mailboxes:
    """This party's mailboxes, one per peer. `peers` says through which relays each is reached, none when directly.

    `silence` counts how long peers give no sign of life (`pulse` looks); no wait counts a standstill of this party itself."""

    def __init__(
        self,
        peers: Mapping[str, Sequence[str]],
        timeouts: Timeouts,
        tolerance: Tolerance,
        counter: TrafficCounter,
    ) -> None:
        self._relays = {name: tuple(relays) for name, relays in peers.items()}
        self.timeouts = timeouts
        self._tolerance = tolerance
        self._counter = counter
        self._boxes = {name: Mailbox() for name in peers}
        self._ended_tags = EndedTags()
        self._losses = 0  # so far
        self._changed = threading.Condition()
        self.readers = Readers(self._changed, tolerance.unread)
        self._started = False
        self._closing = False
        self._interruption: BaseException | None = None
        self.silence = Silence(timeouts.silence, at_first=AtFirst(timeouts.silence_at_first, timeouts.connect))

    # ---- what connections say --------------------------------------------------------------------------------------

    def connect(self, peer: str) -> None:
        """The peer's greeting was accepted."""
        with self._changed:
            box = self._boxes[peer]
            box.connected, box.loss = True, None
            self._changed.notify_all()

    def file(self, sender: str, frame: Frame) -> bool:
        """Keep a message, or note how its sender ended; False after the last frame that matters.

        Pauses, then, while too much of the sender is unread and this party computes. Raises `ProtocolError` for a frame
        that has no place after the greetings, and for one too many.
        """
        if frame.kind in (Kind.TENSOR, Kind.OBJECT):
            self._keep(sender, frame)
            return True
        if frame.kind == Kind.ABORT and isinstance(frame.payload, dict):
            failure = as_heard(sender, frame.payload)
            if gives_up(frame.payload) and self.silence.stood_still():
                self.interrupt(failure)
            self.lose(sender, failure, Known.TOLD)
            return False
        if frame.kind == Kind.BYE:
            with self._changed:
                self._boxes[sender].closed = True
                behind = [name for name in self._behind(sender) if name in self._tolerance.peers]
                self._mark_lost(behind, self.lost(sender, "it has ended, and relays no more"), Known.VANISHED)
                self._changed.notify_all()
            return False
        if frame.kind in (Kind.RELAY, Kind.RELAY_GREETING):
            raise not_relayable(sender)
        raise ProtocolError("a greeting came twice", SAME_VERSION)

    def _keep(self, sender: str, frame: Frame) -> None:
        with self._changed:
            box = self._boxes[sender]
            if self._closing or frame.tag in self._ended_tags:
                return
            # One frame alone may be as large as it likes: a protocol may be about to ask for it.
            alone = box.inbox.unread == 0
            box.inbox.put(frame)
            self._changed.notify_all()
            self.readers.pause(sender, box, alone, bool(self._relays[sender]), self._reads_no_more)

    def _reads_no_more(self) -> bool:
        return self._closing or self._interruption is not None

    def lose(self, peer: str, failure: MpcFlError, known: Known = Known.VANISHED) -> None:
        """Note why a peer is lost, and with the last relay to them those behind it; the first reason stays.

        Once all have been connected, one that may be lost is no more than that, whatever it or this party refuses.
        """
        with self._changed:
            if self._started and peer in self._tolerance.peers and not isinstance(failure, PeerLostError):
                failure = RefusedLinkError(peer, failure.what, failure.fix)
            self._mark_lost([peer], failure, known)
            self._mark_lost(self._behind(peer), failure, known)
            self._changed.notify_all()

    def _mark_lost(self, names: Collection[str], failure: MpcFlError, known: Known) -> None:
        for box in (self._boxes[name] for name in names):
            if not self._closing and not box.closed and box.loss is None:
                self._losses += 1
                box.loss = Loss(failure, known, self._losses)

    def _behind(self, relay: str) -> list[str]:
        """Whom this party reached through `relay`, and has no other relay to any more."""

        def usable(name: str) -> bool:
            return self._boxes[name].loss is None and not self._boxes[name].closed

        return [name for name, relays in self._relays.items() if relay in relays and not any(map(usable, relays))]

    def learn_relays(self, peer: str, relays: Sequence[str]) -> None:
        """A peer is reached through these."""
        with self._changed:
            self._relays[peer] = tuple(relays)

    def note_refused(self, name: str, why: str) -> None:
        """Somebody with a certificate of this name was refused; the true one may still come."""
        with self._changed:
            if name in self._boxes:
                self._boxes[name].refused = why

    def forget(self, tag: str) -> None:
        """Drop what has arrived of a tag, or of a scope (that ends with a slash), and what still comes of it."""
        with self._changed:
            self._ended_tags.add(tag)
            for box in self._boxes.values():
                box.inbox.forget(tag)
            self._changed.notify_all()

    def lost(self, peer: str, how: str) -> PeerLostError:
        """The error that says in which phase a peer was lost, and how."""
        return PeerLostError(peer, f"lost {peer} in phase '{self._counter.phase}' ({how})", f"see the log of {peer}")

    def without_sign(self, peer: str, seconds: float) -> PeerLostError:
        """The error of a peer that is silent."""
        return without_sign(peer, seconds, self._counter.phase)

    def leave(self, peer: str) -> None:
        """From here on sending to the peer fails: it starts again (`begin_again` follows)."""
        with self._changed:
            box = self._boxes[peer]
            box.loss = box.loss or Loss(self.lost(peer, "it started again"), Known.VANISHED, self._losses)

    def begin_again(self, peer: str) -> None:
        """Forget what came from a peer that starts again; it counts as lost until it connects."""
        with self._changed:
            box = self._boxes[peer]
            box.starts += 1
            box.inbox.clear()
            box.connected = False
            self._changed.notify_all()

    def close(self) -> None:
        """This party ends: whoever is lost from now on is no loss, and what is unread nobody will take."""
        with self._changed:
            self._closing = True
            for box in self._boxes.values():
                box.inbox.clear()
            self._changed.notify_all()

    # ---- what connections ask --------------------------------------------------------------------------------------

    @property
    def peers(self) -> list[str]:
        """Names of the peers, in the order given."""
        return list(self._boxes)

    @property
    def started(self) -> bool:
        """Whether all peers have been connected once."""
        return self._started

    def connected(self, peer: str) -> bool:
        """Whether the peer's greeting was accepted, of its present start."""
        with self._changed:
            return self._boxes[peer].connected

    def closed(self, peer: str) -> bool:
        """Whether the peer has ended well."""
        with self._changed:
            return self._boxes[peer].closed

    def failure(self, peer: str) -> MpcFlError | None:
        """Why the peer is lost, None when it is not."""
        with self._changed:
            return self._boxes[peer].failure

    def alive(self, peer: str) -> bool:
        """Whether the peer is connected and, as far as this party knows, still there."""
        with self._changed:
            box = self._boxes[peer]
            return box.connected and box.failure is None and not box.closed

    def tolerates(self, peer: str) -> bool:
        """Whether this party goes on when the peer is lost."""
        return peer in self._tolerance.peers

    def may_return(self, peer: str) -> bool:
        """Whether a peer that was connected, or is lost, may make its link anew."""
        with self._changed:
            return self._started and peer in self._tolerance.peers and not self._boxes[peer].closed

    def came_back(self, peer: str) -> bool:
        """Whether the peer has made its link anew."""
        with self._changed:
            return self._boxes[peer].starts > 0

    def awaits_return(self, peer: str) -> bool:
        """Whether this party would take the peer back, and does not end itself."""
        with self._changed:
            return self.may_return(peer) and not self._closing

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def held_up(self) -> AbstractContextManager[None]:
        """Inside, a thread of this party waits for others in another way than here: no reader pauses."""
        return self.readers.held_up()

    def await_all_connected(self) -> None:
        """Wait for all peers; with `goes_on_without`, at the deadline tolerated ones may be missing, or be lost before.

        Raises the failure of a peer, or `PeerLostError` that names those missing at the deadline. Of a peer whose link just ended
        it waits for what explains that, as long as a party that fails stays to say so: whoever refuses one ends, too.
        """
        deadline, patience = time.monotonic() + self.timeouts.connect, 0.0
        with self._changed:
            while True:
                first = first_named(self._losses_that_end_waits())
                if first is not None and not is_explained(first) and self._interruption is None:
                    now = time.monotonic()
                    patience = patience or min(deadline, now + self.timeouts.linger_after_error)
                    if now < patience:
                        self.readers.wait(patience - now)
                        continue
                self._raise_first_failure()
                missing = [
                    name
                    for name, box in self._boxes.items()
                    if not box.connected and box.failure is None and name not in self._tolerance.later
                ]
                remaining = self._remaining(deadline)
                tolerated = self._tolerance.goes_on_without and self._tolerance.peers.issuperset(missing)
                if not missing or (remaining <= 0 and tolerated):
                    self._started = True
                    return
                if remaining <= 0:
                    raise never_came({name: self._boxes[name].refused for name in missing}, self.timeouts.connect)
                self.readers.wait(remaining)

    def take(self, sender: str, tag: str, deadline: float | None = None, void: str | None = None) -> Frame:
        """The next frame of `tag` from `sender`, awaited until `deadline` (of `time.monotonic`) or the receive timeout.

        Raises `PeerLostError` when the sender is late, has ended or started again, or the failure that ends the wait;
        `SumLostError` when an object of the tag `void` has come instead.
        """
        began = time.monotonic()
        seconds = self.timeouts.receive if deadline is None else max(0.0, deadline - began)
        with self._changed:
            box = self._boxes[sender]
            waited = tag not in box.inbox
            if waited:
                self._await_message(sender, (tag, void), began + seconds, seconds)
            frame = box.inbox.take(tag)
            self.readers.made_room()
            self._counter.of(sender).take(frame.size, time.monotonic() - began if waited else None)
        return frame

    def was_asked_for(self, frame: Frame) -> None:
        """A frame was what this party expected, of the size that it expected: what may stay unread grows with such frames."""
        with self._changed:
            self.readers.was_asked_for(frame)

    def _await_message(self, sender: str, tags: tuple[str, str | None], deadline: float, seconds: float) -> None:
        box, (tag, void) = self._boxes[sender], tags
        start = box.starts
        while tag not in box.inbox:
            self._raise_first_failure(sender)
            if box.starts != start:
                raise self.lost(sender, "it started again")
            if box.closed:
                raise self.lost(sender, "it had finished already")
            if void is not None and void in box.inbox:  # it stays there, for what is awaited next
                raise gave_up(sender, box.inbox.first(void).payload)
            remaining = self._remaining(deadline)
            if remaining <= 0:
                self._raise_suspicion(sender)
                raise late(sender, tag, seconds, self._counter.phase)
            self.readers.wait(remaining)

    def _remaining(self, deadline: float) -> float:
        """Seconds until a deadline. Nobody is late for the time that this party itself stood still."""
        remaining = deadline - time.monotonic()
        return remaining if remaining > 0 else self.silence.moved(deadline) - time.monotonic()

    def _raise_suspicion(self, awaited: str) -> None:
        """At a deadline: whoever is late may itself wait for one that has been silent for a while."""
        if suspect := self.silence.suspect(self._needed(awaited)):
            raise self.without_sign(*suspect)

    def await_any(self, tags: Mapping[str, str], deadline: float, void: str | None = None) -> str | None:
        """The first of these peers of which a message of its tag has arrived, or one of the tag `void`, or that is lost; `None` at
        the deadline."""
        with self._changed:
            while True:
                self._raise_first_failure()
                for name, tag in tags.items():
                    box = self._boxes[name]
                    has_given_up = void is not None and void in box.inbox
                    if tag in box.inbox or has_given_up or box.failure is not None or box.closed:
                        return name
                remaining = self._remaining(deadline)
                if remaining <= 0:
                    return None
                self.readers.wait(remaining)

    def await_change(self, seconds: float) -> None:
        """Wait until something arrives, is lost or connects, for at most `seconds`."""
        with self._changed:
            self.readers.wait(seconds)

    def await_farewells(self, peers: Collection[str], gone: Callable[[str], bool]) -> None:
        """Stay, at most for the receive timeout, until of several peers each has ended or is `gone`."""
        deadline = time.monotonic() + self.timeouts.receive
        with self._changed:
            while len(peers) > 1 and any(not self._boxes[peer].closed and not gone(peer) for peer in peers):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return
                self.readers.wait(min(remaining, 0.5))

    def waiting(self, sender: str, tag: str) -> bool:
        """Whether a message of `tag` from `sender` has arrived."""
        with self._changed:
            return tag in self._boxes[sender].inbox

    def require_all(self) -> None:
        """Raise what a wait would raise now."""
        with self._changed:
            self._raise_first_failure()

    def interrupt(self, error: BaseException) -> None:
        """End all waits of this party with `error`, those that come too."""
        with self._changed:
            self._interruption = error
            self._changed.notify_all()

    def _ends_waits(self, name: str, failure: MpcFlError | None, awaited: str | None) -> bool:
        """Whether a peer's failure does; before all have been connected, what a tolerated one refused, or was refused for."""
        if failure is None or name not in self._tolerance.peers or name == awaited:
            return failure is not None
        return not (
            self._started or (self._tolerance.goes_on_without and isinstance(failure, PeerLostError | PeerRefusedError))
        )

    def _raise_first_failure(self, awaited: str | None = None) -> None:
        """The failure that explains most (`losses.Known`)."""
        if self._interruption is not None:
            raise self._interruption
        if first := first_named(self._losses_that_end_waits(awaited)):
            raise first.failure

    def _losses_that_end_waits(self, awaited: str | None = None) -> list[Loss | None]:
        return [box.loss for name, box in self._boxes.items() if self._ends_waits(name, box.failure, awaited)]

    def _needed(self, awaited: str | None) -> list[str]:
        """Whose loss ends a wait for `awaited`."""
        may_be_lost = self._started or self._tolerance.goes_on_without
        ignored = self._tolerance.peers - {awaited} if may_be_lost else frozenset[str]()
        return [name for name in self._boxes if name not in ignored]
