"""Links over the network: mutually authenticated streams of TLS, each party a process (or a session) of its own."""

from __future__ import annotations

from collections.abc import Sequence

from mpc_fl.crypto.certificates import Identity
from mpc_fl.links.connections import Connections
from mpc_fl.links.conversation import Conversation
from mpc_fl.links.frames import FrameWriter, Kind, Observer, Payload
from mpc_fl.links.greetings import Greeter
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.keys import PairwiseKeys
from mpc_fl.links.links import Links
from mpc_fl.links.mailboxes import Mailboxes
from mpc_fl.links.outgoing import Outgoing
from mpc_fl.links.peer import Peer
from mpc_fl.links.settings import NOBODY_LOST, Reach, Timeouts, Tolerance
from mpc_fl.links.traffic import TrafficCounter


class NetworkLinks(Links):
    """This party's links to its peers over the network. Entering them serves, dials and waits for all peers."""

    def __init__(
        self,
        identity: Identity,
        agreement: Agreement,
        reach: Reach,
        timeouts: Timeouts,
        tolerance: Tolerance = NOBODY_LOST,
        observer: Observer | None = None,
    ) -> None:
        counter = TrafficCounter("connect")
        keys = PairwiseKeys(identity.name, agreement)
        relays = {name: route.relays for name, route in reach.peers.items()}
        mailboxes = Mailboxes(relays, timeouts, tolerance, counter)
        super().__init__(identity.name, mailboxes, keys, counter)
        peers = {name: Peer(name, route, FrameWriter(name, counter)) for name, route in reach.peers.items()}
        greeter = Greeter(identity, agreement, keys, mailboxes)
        self._listen = reach.listen
        self._outgoing = Outgoing(peers, reach.relays, mailboxes, counter, timeouts.receive)
        self._connections = Connections(greeter, self._outgoing, mailboxes, counter, timeouts, observer)

    def admit(self, names: set[str], chunk: bytes) -> Conversation:
        """Answer the first chunk of a stream that a server shared by many sessions took (`Connections.admit`)."""
        return self._connections.admit(names, chunk)

    def learn_address(self, peer: str, address: str) -> None:
        """Dial a peer there, from now on and again, where this party is the one that dials."""
        self._connections.learn_address(peer, address)

    def learn_relays(self, peer: str, relays: Sequence[str]) -> None:
        """Await a peer that can only dial out, or reach it through these."""
        self._connections.learn_relays(peer, relays)

    def _open(self) -> None:
        self._connections.open(self._listen)

    def _close(self, error: BaseException | None) -> None:
        self._connections.close(error, self._stays_for)

    def _send(self, receiver: str, kind: Kind, tag: str, payload: Payload) -> None:
        self._outgoing.put(self._outgoing.peers[receiver], kind, tag, payload, self._seconds)
