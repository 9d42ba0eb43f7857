"""The ways to peers behind relays: through which relay chunks go now, when another one is taken, and when there is none left.

A party brings all chunks for such a peer to one relay, and words about them (`sealed_stream`) to several, so that no relay alone
can make a peer seem lost. It takes the next relay when the present one is lost, says that it has no link with the peer, or
brings nothing: the peer takes no chunk for a while (`Timeouts.another_relay`), or asks for some again. What the peer may
not have is sent again there. A peer is lost when all relays say that they do not reach it, or none is left, or it has given no
sign of life through any.

One thread for each such peer, which waits for nobody but its stream.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field

from mpc_fl.errors import PeerLostError
from mpc_fl.links.losses import Known
from mpc_fl.links.mailboxes import Mailboxes
from mpc_fl.links.outgoing import Outgoing
from mpc_fl.links.peer import Peer
from mpc_fl.links.sealed_stream import SealedStream
from mpc_fl.links.silence import SIGN

log = logging.getLogger(__name__)

_AT_ONCE = 3  # relays that words go through
_LOOK = 1.0  # seconds between looks of a thread that has nothing to send
_LOOK_FOR_ROOM = 0.005  # seconds between looks whether a relay takes a chunk
_FAREWELL = 2.0  # seconds without progress after which nobody waits for last chunks to arrive


@dataclass
class _Way:
    """`relay`: where chunks go now; `without`: the relays that say that they have no link with the peer, and why."""

    relay: str
    without: dict[str, tuple[PeerLostError, Known]] = field(default_factory=dict)


class Ways:
    """A party's ways to its relayed peers. Its lock guards them, and is held for itself alone."""

    def __init__(self, outgoing: Outgoing, mailboxes: Mailboxes) -> None:
        self._outgoing = outgoing
        self._peers = outgoing.peers
        self._mailboxes = mailboxes
        self._lock = threading.Lock()
        self._ways: dict[str, _Way] = {}

    def open(self, peer: Peer, stream: SealedStream, relay: str) -> None:
        """A link with `peer` was made, whose greeting came through `relay`: what is put into its stream leaves from now on."""
        with self._lock:
            self._ways[peer.name] = _Way(relay)
        threading.Thread(target=self._send, args=(peer, stream), name=f"to-{peer.name}", daemon=True).start()

    def through(self, peer: Peer) -> list[Peer]:
        """The relays that words and greetings for a peer go through, of those that are there; first the one of its chunks.

        Where there are more, greetings go through others each time, so that no three keep two parties apart.
        """
        with self._lock:
            way = self._ways.get(peer.name)
            without, chunks = (dict(way.without), way.relay) if way is not None else ({}, "")
        alive = [name for name in peer.route.relays if self._mailboxes.alive(name)]
        if self._mailboxes.alive(peer.name):
            alive.sort(key=lambda name: (name in without, name != chunks))
        elif len(alive) > _AT_ONCE:
            begin = int(time.monotonic() / SIGN) % len(alive)
            alive = [*alive[begin:], *alive[:begin]]
        return [self._peers[name] for name in alive[:_AT_ONCE]]

    # ---- what is sent ----------------------------------------------------------------------------------------------

    def _send(self, peer: Peer, stream: SealedStream) -> None:
        while not stream.over:
            stream.await_work(_LOOK)
            if (word := stream.word()) is not None and not self._say(peer, word):
                stream.say()  # every relay was busy
                time.sleep(_LOOK_FOR_ROOM)
            if self._mailboxes.failure(peer.name) is not None:
                stream.end()
                return
            relay, following = self._relay_now(peer, stream), stream.next_chunk()
            if following is None:
                continue
            number, chunk = following
            if relay is not None and self._outgoing.bring(relay, peer.name, chunk):
                stream.was_sent(number)
            else:
                time.sleep(_LOOK_FOR_ROOM)

    def _say(self, peer: Peer, word: bytes) -> bool:
        brought = [self._outgoing.bring(relay, peer.name, word) for relay in self.through(peer)]
        return any(brought)

    def _relay_now(self, peer: Peer, stream: SealedStream) -> Peer | None:
        with self._lock:
            present = self._ways[peer.name].relay
        if not self._mailboxes.alive(present):
            self.take_another(peer, stream, "it is lost")
        elif stream.refused_through() == present:  # else it was sent again by another way already
            self.take_another(peer, stream, "chunks were lost or changed")
        with self._lock:
            present = self._ways[peer.name].relay
        return self._peers[present] if self._mailboxes.alive(present) else None

    def take_another(self, peer: Peer, stream: SealedStream, why: str) -> None:
        """Go on through the next relay that is there, if there is one; what the peer may not have is sent again."""
        with self._lock:
            way, order = self._ways.get(peer.name), peer.route.relays
            if way is None:
                return
            place = order.index(way.relay) + 1 if way.relay in order else 0
            alive = [name for name in (*order[place:], *order[:place]) if self._mailboxes.alive(name)]
            chosen = next((name for name in alive if name not in way.without), alive[0] if alive else way.relay)
            before, way.relay = way.relay, chosen
        if before != chosen:
            log.warning(
                "what goes to %s goes through %s from now on, no more through %s: %s", peer.name, chosen, before, why
            )
        stream.send_again()

    def beat(self) -> None:
        """Each second: words that are due, and streams that do not get on."""
        patience = self._mailboxes.timeouts.another_relay
        for peer in self._peers.values():
            stream = peer.stream
            if stream is None or stream.over:
                continue
            stream.say_after(SIGN)
            if stream.stuck(patience):
                self.take_another(peer, stream, f"nothing arrived for {patience:.0f} s")

    def wake(self) -> None:
        """A relay was lost: whoever used it looks for another one."""
        for peer in self._peers.values():
            if peer.stream is not None:
                peer.stream.say()

    # ---- what relays bring and say -----------------------------------------------------------------------------------

    def came(self, peer: Peer, relay: str) -> None:
        """Something of `peer` came through a relay, and was its own."""
        with self._lock:
            if (way := self._ways.get(peer.name)) is not None:
                way.without.pop(relay, None)

    def lose_through(self, peer: Peer, relay: str, failure: PeerLostError, known: Known) -> None:
        """A relay says that it has no link with `peer` any more. It is lost where no other relay has."""
        with self._lock:
            way, stream = self._ways.get(peer.name), peer.stream
            if way is None or stream is None or stream.over:
                return
            if relay not in way.without:
                log.info("%s says that it does not reach %s", relay, peer.name)
            way.without[relay] = (failure, known)
            used = way.relay == relay
            left = [name for name in peer.route.relays if self._leads_somewhere(name) and name not in way.without]
        if not left:
            self._mailboxes.lose(peer.name, failure, known)
        elif used:
            self.take_another(peer, stream, f"it has no link with {peer.name}")

    def _leads_somewhere(self, relay: str) -> bool:
        """Whether a relay is there, or may be yet: until all are linked one that comes late can still lead to a peer."""
        if self._mailboxes.connected(relay) or self._mailboxes.started:
            return self._mailboxes.alive(relay)
        return self._mailboxes.failure(relay) is None

    def await_arrival(self, seconds: float) -> None:
        """Wait until all relayed peers that are there have what was sent, at most so long, and not without progress."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(map(self._lacks_something, self._peers.values())):
            time.sleep(_LOOK_FOR_ROOM)

    def _lacks_something(self, peer: Peer) -> bool:
        stream = peer.stream
        if stream is None or stream.over or stream.all_arrived or stream.stuck(_FAREWELL):
            return False
        return self._mailboxes.alive(peer.name) and bool(self.through(peer))
