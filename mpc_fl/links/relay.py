"""Links through a relay: greetings and sealed chunks between two parties that can only dial out.

One class for both roles: the relay passes on what its peers may send each other, the two ends check greetings end to end
and seal all that follows (`sealing`), so that the relay reads and changes nothing.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Protocol

import torch

from mpc_fl.errors import LinkError, ProtocolError
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.greetings import Greeter
from mpc_fl.links.handshake import greeting_digest
from mpc_fl.links.mailboxes import Mailboxes, not_relayable
from mpc_fl.links.outgoing import Outgoing
from mpc_fl.links.peer import Peer
from mpc_fl.links.sealing import Sealer, Unsealer
from mpc_fl.links.traffic import TrafficCounter

log = logging.getLogger(__name__)


class Arrivals(Protocol):
    """What the relay hands on: a relayed link's frames and its accepted greeting (`connections`)."""

    def deliver(self, peer: Peer, frame: Frame) -> bool:
        """Take a frame that came sealed from `peer`."""

    def accept(self, peer: Peer, public_key: bytes) -> None:
        """The greeting of `peer` holds; this is its key."""


class Relay:
    """A party's part in relayed links. Its lock guards the greetings kept for peers that are not connected yet."""

    def __init__(
        self, greeter: Greeter, outgoing: Outgoing, mailboxes: Mailboxes, counter: TrafficCounter, arrivals: Arrivals
    ) -> None:
        self._name = greeter.name
        self._relay = outgoing.relay
        self._greeter = greeter
        self._outgoing = outgoing
        self._peers = outgoing.peers
        self._mailboxes = mailboxes
        self._counter = counter
        self._arrivals = arrivals
        self._lock = threading.Lock()
        self._kept: dict[str, list[dict[str, Any]]] = {}

    # ---- when a link is made ---------------------------------------------------------------------------------------

    def after_connecting(self, peer: Peer) -> None:
        """A direct or relayed link was made: send what was kept for it, and greet those behind this party's relay."""
        with self._lock:
            kept = self._kept.pop(peer.name, [])
        for greeting in kept:
            self._outgoing.put(peer, Kind.RELAY_GREETING, "", greeting)
        if peer.name == self._relay:
            for other in self._peers.values():
                if other.route.how == "relay, first":
                    self._greet_through(peer, other)
        if self._relay == self._name and self._mailboxes.started:
            # Those who greet it through this relay do not see that it came back.
            for other in self._peers.values():
                if other is not peer and self._reachable(other):
                    self._outgoing.put(other, Kind.RELAY_GREETING, "", {"returned": peer.name})

    def _reachable(self, peer: Peer) -> bool:
        return self._mailboxes.connected(peer.name) and self._mailboxes.failure(peer.name) is None

    def _greet_through(self, relay: Peer, other: Peer) -> None:
        other.greeting = self._greeter.greet(other.name)
        self._outgoing.put(relay, Kind.RELAY_GREETING, "", other.greeting)

    # ---- greetings -------------------------------------------------------------------------------------------------

    def take_greeting(self, origin: Peer, greeting: Any) -> None:
        """At the relay: pass a greeting on. At its receiver: check it, answer it if it came first.

        Raises `ProtocolError` for one that may not be relayed or was not expected, `HandshakeError` for a false one.
        """
        if origin.name == self._relay and set(greeting) == {"returned"}:
            self._greet_returned(origin, str(greeting["returned"]))
        elif str(greeting.get("to")) != self._name:
            self._pass_greeting_on(origin, greeting)
        else:
            self._answer_greeting(origin, greeting)

    def _greet_returned(self, relay: Peer, name: str) -> None:
        returned = self._peers.get(name)
        if returned is None or returned.route.how != "relay, first" or not self._mailboxes.tolerates(name):
            return
        self._outgoing.begin_again(returned)
        self._greet_through(relay, returned)

    def _pass_greeting_on(self, origin: Peer, greeting: dict[str, Any]) -> None:
        target = self._require_relayable(origin, greeting.get("name"), str(greeting.get("to")))
        with self._lock:
            if not self._mailboxes.connected(target.name):
                kept = self._kept.setdefault(target.name, [])
                if len(kept) >= len(self._peers):
                    raise ProtocolError(f"{origin.name} sent too many greetings", "restart the run")
                kept.append(greeting)
                return
        self._outgoing.put(target, Kind.RELAY_GREETING, "", greeting)

    def _answer_greeting(self, origin: Peer, greeting: dict[str, Any]) -> None:
        sender = self._peers.get(str(greeting.get("name")))
        if sender is not None and sender.route.how == "relay, second" and self._mailboxes.may_return(sender.name):
            self._outgoing.begin_again(sender)
        expected = sender is not None and sender.route.relayed and origin.name == self._relay
        if sender is None or not expected or self._mailboxes.connected(sender.name):
            raise ProtocolError("a greeting came through the relay that was not expected", "restart the run")
        if sender.route.how == "relay, first":
            public_key = self._greeter.check(sender.name, greeting, greeting_digest(sender.greeting or {}))
        else:
            public_key = self._greeter.check(sender.name, greeting)
            answer = self._greeter.greet(sender.name, greeting_digest(greeting))
            self._outgoing.put(origin, Kind.RELAY_GREETING, "", answer)
        self._seal(sender, public_key)
        self._arrivals.accept(sender, public_key)

    def _seal(self, peer: Peer, public_key: bytes) -> None:
        keys, mine = self._greeter.keys, self._name
        peer.sealer = Sealer(keys.sealing_key(peer.name, public_key, mine, peer.name), mine, peer.name)
        peer.unsealer = Unsealer(keys.sealing_key(peer.name, public_key, peer.name, mine), peer.name, mine)

    # ---- sealed chunks ---------------------------------------------------------------------------------------------

    def take_sealed(self, origin: Peer, frame: Frame) -> None:
        """A sealed chunk: open it when it came from the relay, pass it on when this party is the relay.

        Raises `ProtocolError` for one that may not be relayed, was not expected, or does not open.
        """
        assert isinstance(frame.payload, torch.Tensor)
        if origin.name != self._relay:
            target = self._require_relayable(origin, origin.name, frame.tag)
            self._counter.of(origin.name).bytes_relayed += frame.size
            try:
                self._outgoing.put(target, Kind.RELAY, origin.name, frame.payload)
            except LinkError:  # the loss of the receiver is reported where this party waits for it
                log.info("a sealed chunk for %s could not be passed on", target.name)
            return
        sender = self._peers.get(frame.tag)
        if sender is None or sender.unsealer is None:
            raise ProtocolError("a sealed chunk came through the relay that was not expected", "restart the run")
        opened = sender.reader.feed(sender.unsealer.unseal(frame.payload.numpy().tobytes()))
        if opened is not None:
            self._arrivals.deliver(sender, opened)

    def _require_relayable(self, origin: Peer, sender: Any, receiver: str) -> Peer:
        target = self._peers.get(receiver)
        if self._relay != self._name or sender != origin.name or target is None or target is origin:
            raise not_relayable(origin.name)
        return target
