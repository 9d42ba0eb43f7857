"""Frames on their way out: into the peer's conversation, or into the stream of sealed chunks that goes through relays."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mpc_fl.errors import LinkError, PeerLostError
from mpc_fl.links.frames import Kind, Payload
from mpc_fl.links.mailboxes import Mailboxes
from mpc_fl.links.peer import Peer
from mpc_fl.links.traffic import TrafficCounter

_LOOK = 0.2  # seconds between looks whether a peer that takes nothing is lost
_LOOK_FOR_ROOM = 0.005  # and whether there is room for what is relayed to it
_LONGEST_STALL = 60.0  # that no chunk leaves: a process that reads takes some of what comes, whatever it computes
_LEAST = 0.1  # seconds that a chunk gets for which there was room just now


class Outgoing:
    """Sends to `peers`. Takes a writer's lock, then that of its stream, then the mailboxes' (`mailboxes`)."""

    def __init__(
        self,
        peers: Mapping[str, Peer],
        relays: Sequence[str],
        mailboxes: Mailboxes,
        counter: TrafficCounter,
        seconds: float,
    ) -> None:
        self.peers = peers
        self.relays = tuple(relays)
        self._mailboxes = mailboxes
        self._counter = counter
        self._seconds = seconds

    def put(self, peer: Peer, kind: Kind, tag: str, payload: Payload, seconds: float | None = None) -> None:
        """Queue a frame; greetings also while the peer comes back after a failure.

        Raises the failure of the link, `LinkError` for a peer that was never connected, or `PeerLostError` when the
        peer has not taken it within `seconds`, by default the receive timeout. One that may be lost is lost then, and has
        less time for each chunk: whoever sends to all must not wait for one that reads nothing, word after word.
        """
        deadline = time.monotonic() + (self._seconds if seconds is None else seconds)
        greeting = kind in (Kind.HELLO, Kind.WELCOME)

        def write(chunk: bytes) -> None:
            self._queue(peer, chunk, deadline, greeting)

        peer.writer.put(kind, tag, payload, write)

    def bring(self, relay: Peer, receiver: str, sealed: bytes) -> bool:
        """Queue what is sealed for `receiver` at a relay; whether there was room for it, and nobody else sent to that relay."""

        def write(chunk: bytes) -> bool:
            conversation = relay.conversation
            return conversation is not None and self._mailboxes.alive(relay.name) and conversation.put(chunk, 0.0)

        return relay.writer.put_at_once(Kind.RELAY, receiver, sealed, write)

    def pass_on(self, peer: Peer, sender: str, sealed: torch.Tensor) -> None:
        """At the relay: queue a sealed chunk of `sender`. Raises as `put`.

        This party's own frames never wait for it: it takes only such places as leave them some, and no lock meanwhile.
        """
        deadline = time.monotonic() + self._seconds
        if self._passed_on(peer, sender, sealed):
            return
        with self._mailboxes.held_up():
            while not self._passed_on(peer, sender, sealed):
                if time.monotonic() > self._mailboxes.silence.moved(deadline):
                    raise self._takes_nothing(peer)
                time.sleep(_LOOK_FOR_ROOM)

    def _passed_on(self, peer: Peer, sender: str, sealed: torch.Tensor) -> bool:
        def write(chunk: bytes) -> None:
            self._queue(peer, chunk, time.monotonic() + _LEAST, False)

        with peer.writer.lock:
            failure, conversation = self._mailboxes.failure(peer.name), peer.conversation
            if failure is None and not self._mailboxes.connected(peer.name):  # its greeting leaves first
                raise LinkError(f"{peer.name} is not connected", "connect before sending")
            if failure is None and conversation is not None and not conversation.has_room_to_spare():
                return False
            peer.writer.put(Kind.RELAY, sender, sealed, write)
        return True

    def _takes_nothing(self, peer: Peer) -> PeerLostError:
        phase = self._counter.phase
        return PeerLostError(peer.name, f"{peer.name} takes no data in phase '{phase}'", f"see the log of {peer.name}")

    def _queue(self, peer: Peer, chunk: bytes, deadline: float, greeting: bool) -> None:
        if self._queued(peer, chunk, 0.0, greeting):
            return
        may_be_lost = self._mailboxes.tolerates(peer.name)
        if may_be_lost:
            deadline = min(deadline, time.monotonic() + _LONGEST_STALL)
        with self._mailboxes.held_up():  # whoever waits for room goes on reading, or two could wait for each other
            while not self._queued(peer, chunk, _LOOK, greeting):
                if time.monotonic() > self._mailboxes.silence.moved(deadline):
                    error = self._takes_nothing(peer)
                    if may_be_lost:
                        self._give_up(peer, error)
                    raise error

    def _give_up(self, peer: Peer, error: PeerLostError) -> None:
        """Half of a frame may have left, so this link is of no use any more; the peer may make another one."""
        self._mailboxes.lose(peer.name, error)
        if peer.conversation is not None:
            peer.conversation.finish()
            peer.conversation.cut()

    def _queued(self, peer: Peer, chunk: bytes, seconds: float, greeting: bool) -> bool:
        """Whether the peer's conversation took the chunk, or nobody needs it any more."""
        failure = self._mailboxes.failure(peer.name)
        if failure is not None and not greeting:
            raise failure
        way = peer.conversation if peer.stream is None else peer.stream
        if way is None:
            raise LinkError(f"{peer.name} is not connected", "connect before sending")
        return self._mailboxes.closed(peer.name) or way.put(chunk, seconds)

    def give_sign(self, peer: Peer, seconds: float) -> None:
        """Say that this party is there to a connected peer to which nothing was queued for `seconds`."""
        conversation = peer.conversation
        if conversation is not None and time.monotonic() - conversation.last_put >= seconds:
            self.put_at_once(peer, Kind.ALIVE, {})

    def put_at_once(self, peer: Peer, kind: Kind, payload: dict[str, Any]) -> None:
        """Queue a control frame for a connected peer with a link of its own, unless that had to wait, or the peer is not there."""

        def write(chunk: bytes) -> bool:
            conversation = peer.conversation  # under the writer's lock: after the greetings of this very conversation
            return conversation is not None and self._mailboxes.connected(peer.name) and conversation.put(chunk, 0.0)

        peer.writer.put_at_once(kind, "", payload, write)

    def begin_again(self, peer: Peer) -> None:
        """Forget the link with a peer that starts again; until it has connected, sending to it fails."""
        self._mailboxes.leave(peer.name)
        with peer.writer.lock:  # free soon: whoever sends meets the failure
            peer.forget_link()
            self._mailboxes.begin_again(peer.name)
