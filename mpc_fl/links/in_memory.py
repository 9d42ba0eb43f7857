"""Links between threads of one process, for tests of protocols: the network's twin without network and certificates.

Every message is encoded and decoded (`frames`) and lies in the same mailboxes (`mailboxes`), under fresh X25519 keys; so
refusals, deadlines, losses, come-backs and counts are those of the network, but for what certificates and sockets add (a
party that runs something else, a peer that takes nothing or gives no sign of life, bytes of the greetings). A sender's
thread delivers itself: what was sent has arrived.

A test can be the adversary. `InMemoryNetwork.watch` shows every frame on its way, `drop` ends a party at a chosen point
as a killed process ends, and a party that deviates sends whatever it likes with `InMemoryLinks.send_frame` and
`send_chunk`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from mpc_fl.errors import SAME_VERSION, BrokenLinkError, HandshakeError, LinkError, MpcFlError, ProtocolError
from mpc_fl.links.frames import Frame, FrameReader, FrameWriter, Kind, Observer, Payload, encode_frame
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.keys import PairwiseKeys
from mpc_fl.links.links import Links
from mpc_fl.links.losses import parting_message
from mpc_fl.links.mailboxes import Mailboxes
from mpc_fl.links.settings import NOBODY_LOST, Timeouts, Tolerance
from mpc_fl.links.traffic import TrafficCounter

log = logging.getLogger(__name__)

# `watcher(sender, receiver, frame)`: called on the sender's thread before the receiver gets the frame.
Watcher = Callable[[str, str, Frame], None]


class DroppedError(BaseException):
    """This party was dropped: its thread ends as a killed process does, so no protocol may catch this."""


class _Direction:
    """One way of one link. `over`: whatever still comes is not read; `replaced`: by the link of a party come back."""

    def __init__(self, receiver: InMemoryLinks, writer: FrameWriter) -> None:
        self.receiver = receiver
        self.writer = writer
        self.reader = FrameReader()
        self.over = False
        self.replaced = False


@dataclass(frozen=True)
class _Ends:
    """What a party keeps of its link with one peer."""

    outgoing: _Direction
    incoming: _Direction

    def end(self) -> None:
        self.outgoing.over = self.incoming.over = True


class InMemoryNetwork:
    """Where the parties of one process meet. All of them run the same thing: `agreement` enters their seeds.

    Its lock guards who is there. It comes before the locks of `mailboxes`; nobody who holds one of those takes it, but a
    watcher may, on the thread of a sender that holds its writer's lock.
    """

    def __init__(self, names: Sequence[str], agreement: Agreement, timeouts: Timeouts) -> None:
        self.names = list(names)
        self.agreement = agreement
        self.timeouts = timeouts
        self.watchers: list[Watcher] = []
        self._lock = threading.RLock()
        self._present: dict[str, InMemoryLinks] = {}

    def links(
        self,
        name: str,
        tolerance: Tolerance = NOBODY_LOST,
        observer: Observer | None = None,
        timeouts: Timeouts | None = None,
    ) -> InMemoryLinks:
        """The links of a new start of party `name`. Entering them after an earlier start is a come-back.

        `timeouts` are those of the network unless they are said.
        """
        if name not in self.names:
            raise LinkError(f"{name} takes no part in this run", f"the parties are {', '.join(self.names)}")
        return InMemoryLinks(self, name, tolerance, observer, timeouts or self.timeouts)

    def watch(self, watcher: Watcher) -> None:
        """Show `watcher` every frame from here on. It may drop parties: a frame of or to one of them then vanishes."""
        self.watchers.append(watcher)

    def drop(self, name: str) -> None:
        """End a party that is there as a killed process ends: without a farewell; its links fail from here on."""
        with self._lock:
            dropped = self._present.pop(name, None)
            if dropped is not None:
                dropped.vanish()

    def enter(self, comer: InMemoryLinks) -> None:
        """Link a party with all that are present. Raises `HandshakeError` when one of them does not take it back."""
        with self._lock:
            for name, present in list(self._present.items()):
                if name != comer.name and not comer.dropped:
                    present.meet(comer)
            if not comer.dropped:
                self._present[comer.name] = comer

    def leave(self, links: InMemoryLinks) -> None:
        """A party has said how it ends."""
        with self._lock:
            if self._present.get(links.name) is links:
                del self._present[links.name]


class InMemoryLinks(Links):
    """One party's links to the others of an `InMemoryNetwork`; see there for how they are made."""

    def __init__(
        self,
        network: InMemoryNetwork,
        name: str,
        tolerance: Tolerance,
        observer: Observer | None,
        timeouts: Timeouts,
    ) -> None:
        peers = [peer for peer in network.names if peer != name]
        counter = TrafficCounter("connect")
        mailboxes = Mailboxes(dict.fromkeys(peers, ()), timeouts, tolerance, counter)
        super().__init__(name, mailboxes, PairwiseKeys(name, network.agreement), counter)
        self._network = network
        self._observer = observer
        self._ends: dict[str, _Ends] = {}
        self._dropped = threading.Event()

    @property
    def dropped(self) -> bool:
        """Whether this party is no more."""
        return self._dropped.is_set()

    # ---- what a deviating party may do -----------------------------------------------------------------------------

    def send_frame(self, receiver: str, kind: Kind, tag: str, payload: Payload, sequence: int | None = None) -> None:
        """Send a frame of any kind, `tag` as it stands, out of sequence if a number is given. For adversaries in tests."""
        if sequence is None:
            self._send(receiver, kind, tag, payload)
            return
        for chunk in encode_frame(kind, tag, sequence, payload):
            self.send_chunk(receiver, chunk)

    def send_chunk(self, receiver: str, chunk: bytes) -> None:
        """Send bytes that need not be a frame. For adversaries in tests."""
        direction = self._reach(receiver)
        with direction.writer.lock:
            self._write(direction, chunk)

    # ---- links -----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._network.enter(self)

    def meet(self, comer: InMemoryLinks) -> None:
        """Make the link with a party that has come, with a greeting each way. Raises `HandshakeError`."""
        before = self._ends.get(comer.name)
        if before is not None:
            if not self._mailboxes.may_return(comer.name):
                raise HandshakeError(
                    f"{self.name} refused {comer.name}: {comer.name} is connected already", "compare the two sides"
                )
            self._mailboxes.leave(comer.name)
            before.end()
            before.outgoing.replaced = True
            self._mailboxes.begin_again(comer.name)
        there = _Direction(self, FrameWriter(self.name, comer._counter))
        back = _Direction(comer, FrameWriter(comer.name, self._counter))
        self._ends[comer.name], comer._ends[self.name] = _Ends(back, there), _Ends(there, back)
        self._greet(comer)  # the comer is ready before the first message of `self` can reach it
        comer._greet(self)

    def _greet(self, peer: InMemoryLinks) -> None:
        direction = self._ends[peer.name].outgoing
        greeting = {"name": self.name, "to": peer.name, "public_key": self._keys.public_key.hex()}
        direction.writer.put(Kind.HELLO, "", greeting, lambda chunk: self._write(direction, chunk))

    def _reach(self, receiver: str) -> _Direction:
        """The way to a peer that is there. Raises like sending over the network does."""
        if self.dropped:
            raise DroppedError(self.name)
        failure = self._mailboxes.failure(receiver)
        if failure is not None:
            raise failure
        if receiver not in self._ends or not self._mailboxes.connected(receiver):
            raise LinkError(f"{receiver} is not connected", "connect before sending")
        return self._ends[receiver].outgoing

    def _send(self, receiver: str, kind: Kind, tag: str, payload: Payload) -> None:
        direction = self._reach(receiver)

        def write(chunk: bytes) -> None:
            if direction.replaced:
                raise self._mailboxes.lost(receiver, "it started again")
            self._reach(receiver)  # it may be lost within the frame
            self._write(direction, chunk)

        direction.writer.put(kind, tag, payload, write)

    def _write(self, direction: _Direction, chunk: bytes) -> None:
        """Read a chunk at the receiver. One that breaks the rules ends the link, and both ends know why."""
        if direction.over:
            return
        try:
            frame = direction.reader.feed(chunk)
            if frame is None:
                return
            for watcher in self._network.watchers:
                watcher(self.name, direction.receiver.name, frame)
            if not direction.over:
                with self._mailboxes.held_up():  # the receiver may let its senders wait
                    direction.over = not direction.receiver._take(self.name, frame)
        except ProtocolError as error:
            log.warning("refused a frame from %s: %s", self.name, error)
            direction.over = True
            direction.receiver._end_refused(self, error.what, error.fix)
            self._end_refused(direction.receiver, error.what)

    def _take(self, sender: str, frame: Frame) -> bool:
        """Give a frame to whom it concerns; False when it is the last. Raises `ProtocolError`."""
        if self._mailboxes.connected(sender):
            if self._observer is not None:
                self._observer(sender, frame)
            return self._mailboxes.file(sender, frame)
        if frame.kind != Kind.HELLO or not isinstance(frame.payload, dict):
            raise ProtocolError("a link did not begin with a greeting", SAME_VERSION)
        public_key = bytes.fromhex(str(frame.payload["public_key"]))
        X25519PublicKey.from_public_bytes(public_key)
        self._keys.learn(sender, public_key)
        self._mailboxes.connect(sender)
        return True

    def _end_refused(self, peer: InMemoryLinks, why: str, fix: str = "") -> None:
        self._lose(peer, BrokenLinkError(peer.name, why, fix))

    # ---- parting ---------------------------------------------------------------------------------------------------

    def vanish(self) -> None:
        """This party is no more (`InMemoryNetwork.drop`): its waits end, its peers lose it."""
        self._dropped.set()
        self._mailboxes.interrupt(DroppedError(self.name))
        for ends in self._ends.values():
            peer = ends.outgoing.receiver
            peer._lose(self, peer._mailboxes.lost(self.name, "the link ended without a farewell"))

    def _lose(self, peer: InMemoryLinks, failure: MpcFlError) -> None:
        """Lose a peer, unless it has come back since."""
        ends = self._ends[peer.name]
        if ends.outgoing.receiver is peer:
            ends.end()
            self._mailboxes.lose(peer.name, failure)

    def _close(self, error: BaseException | None) -> None:
        self._mailboxes.close()
        if not self.dropped:
            kind, payload = parting_message(error)
            for peer in self.peers:
                if self._mailboxes.alive(peer):
                    try:
                        self._send(peer, kind, "", payload)
                    except (LinkError, ProtocolError):
                        log.info("%s could not be told that %s ends", peer, self.name)
        self._network.leave(self)
