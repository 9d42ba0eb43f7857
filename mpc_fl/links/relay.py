"""Links through a relay: greetings and sealed chunks between two parties that can only dial out.

One class for both roles: the relay passes on what its peers may send each other, the two ends check greetings end to end
and seal all that follows (`sealing`), so that the relay reads and changes nothing.

What one of two ends sends wrongly must not cost the other its link with the relay, nor a third party its own: the relay
answers for who sent something, each end checks what it says. So a false greeting is refused and logged, as on a stream of
its own, a link is made anew only for a greeting that was checked, and a sealed chunk that is wrong ends the link of those two.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Protocol

import torch

from mpc_fl.errors import BrokenLinkError, HandshakeError, LinkError, ProtocolError
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.greetings import Greeter
from mpc_fl.links.handshake import greeting_digest
from mpc_fl.links.losses import Known, not_relayable
from mpc_fl.links.mailboxes import Mailboxes
from mpc_fl.links.outgoing import Outgoing
from mpc_fl.links.peer import Peer
from mpc_fl.links.places import Refusals
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
        self._refusals = Refusals(log)  # one of two ends may send without end what the other refuses, or never gets
        self._kept: dict[str, dict[str, dict[str, Any]]] = {}  # of each receiver, the last greeting of each sender

    # ---- when a link is made ---------------------------------------------------------------------------------------

    def after_connecting(self, peer: Peer) -> None:
        """A direct or relayed link was made: send what was kept for it, and greet those behind this party's relay."""
        with self._lock:
            kept = self._kept.pop(peer.name, {})
        for greeting in kept.values():
            self._tell(peer, greeting)
        if peer.name == self._relay:
            for other in self._peers.values():
                if other.route.how == "relay, first":
                    self._greet_through(peer, other)
        if self._relay == self._name and self._mailboxes.came_back(peer.name):
            # Those who greet it through this relay do not see that it came back, unless they have just greeted it.
            for other in self._peers.values():
                if other is not peer and other.name not in kept and self._reachable(other):
                    self._tell(other, {"returned": peer.name})

    def tell_silent(self, silent: Peer) -> None:
        """At the relay: let those that hear a peer through it alone know that it gives no sign of life. Waits for nobody."""
        for other in self._peers.values():
            if self._relay == self._name and other is not silent and self._reachable(other):
                self._outgoing.put_at_once(other, Kind.RELAY_GREETING, {"silent": silent.name})

    def _reachable(self, peer: Peer) -> bool:
        return self._mailboxes.connected(peer.name) and self._mailboxes.failure(peer.name) is None

    def _tell(self, peer: Peer, message: dict[str, Any]) -> None:
        """Send `peer` what concerns another. Its loss is reported where this party waits for it, not to the other."""
        try:
            self._outgoing.put(peer, Kind.RELAY_GREETING, "", message)
        except LinkError:
            about = f"a greeting for {peer.name} could not be passed on"
            self._refusals.count(about, about, logging.INFO)

    def _greet_through(self, relay: Peer, other: Peer) -> None:
        other.greeting = self._greeter.greet(other.name)
        self._outgoing.put(relay, Kind.RELAY_GREETING, "", other.greeting)

    def close(self) -> None:
        """Log what was refused more than once."""
        self._refusals.close()

    # ---- greetings -------------------------------------------------------------------------------------------------

    def take_greeting(self, origin: Peer, greeting: Any) -> None:
        """At the relay: pass a greeting on. At its receiver: check it, answer it if it came first, or refuse it.

        Raises `ProtocolError` for one that may not be relayed: then it is `origin` that sent it.
        """
        if origin.name == self._relay and set(greeting) == {"returned"}:
            self._greet_returned(origin, greeting["returned"])
        elif origin.name == self._relay and set(greeting) == {"silent"}:
            self._lose_silent(greeting["silent"])
        elif greeting.get("to") != self._name:
            self._pass_greeting_on(origin, greeting)
        else:
            self._answer_greeting(origin, greeting)

    def _lose_silent(self, name: Any) -> None:
        lost = self._peers.get(name) if isinstance(name, str) else None
        if lost is not None and lost.route.relayed:
            silent = self._mailboxes.without_sign(lost.name, self._mailboxes.silence.limit)
            self._mailboxes.lose(lost.name, silent, Known.SILENT)

    def _greet_returned(self, relay: Peer, name: Any) -> None:
        returned = self._peers.get(name) if isinstance(name, str) else None
        if returned is None or returned.route.how != "relay, first" or not self._mailboxes.tolerates(returned.name):
            return
        self._outgoing.begin_again(returned)
        self._greet_through(relay, returned)

    def _pass_greeting_on(self, origin: Peer, greeting: dict[str, Any]) -> None:
        target = self._require_relayable(origin, greeting.get("name"), greeting.get("to"))
        if not all(isinstance(value, str) for value in greeting.values()):  # what is no greeting anywhere
            raise not_relayable(origin.name)
        with self._lock:
            if not self._mailboxes.connected(target.name):
                self._kept.setdefault(target.name, {})[origin.name] = greeting
                return
        self._tell(target, greeting)

    def _answer_greeting(self, origin: Peer, greeting: dict[str, Any]) -> None:
        if origin.name != self._relay:
            raise not_relayable(origin.name)
        name = greeting.get("name")
        sender = self._peers.get(name) if isinstance(name, str) else None
        if sender is None or not sender.route.relayed:
            raise ProtocolError("a greeting came through the relay that was not expected", "restart the run")
        said, first = greeting_digest(greeting), sender.route.how == "relay, first"
        answered = greeting_digest(sender.greeting or {}) if first else ""
        try:
            public_key = self._greeter.check(sender.name, greeting, answered)
            self._require_new(sender, said)
            answer = None if first else self._greeter.greet(sender.name, said)
            made_by = f"{answered} {said}" if answer is None else f"{said} {greeting_digest(answer)}"
            sealing = self._sealing(sender.name, public_key, made_by)
        except HandshakeError as error:
            kind = f"refused a greeting of {sender.name} that came through {origin.name}"
            self._refusals.count(kind, f"{kind}: {error}")
            return
        if answer is not None:
            if self._mailboxes.may_return(sender.name):
                self._outgoing.begin_again(sender)
            self._outgoing.put(origin, Kind.RELAY_GREETING, "", answer)
        sender.sealer, sender.unsealer = sealing
        sender.greeted = said
        self._arrivals.accept(sender, public_key)

    def _require_new(self, sender: Peer, said: str) -> None:
        """Raise `HandshakeError` for a genuine greeting that was said before, or by whom this party cannot take back."""
        if sender.greeted == said:
            raise HandshakeError(f"{sender.name} said that before")
        returns = sender.route.how == "relay, second" and self._mailboxes.may_return(sender.name)
        if self._mailboxes.connected(sender.name) and not returns:
            raise HandshakeError(f"{sender.name} is connected already")

    def _sealing(self, peer: str, public_key: bytes, made_by: str) -> tuple[Sealer, Unsealer]:
        """For a link that the greetings of these two digests made. Raises `HandshakeError` for a key of small order."""
        keys, mine = self._greeter.keys, self._name
        sealer = Sealer(keys.sealing_key(peer, public_key, mine, peer, made_by), mine, peer)
        return sealer, Unsealer(keys.sealing_key(peer, public_key, peer, mine, made_by), peer, mine)

    # ---- sealed chunks ---------------------------------------------------------------------------------------------

    def take_sealed(self, origin: Peer, frame: Frame) -> None:
        """A sealed chunk: open it when it came from the relay, pass it on when this party is the relay.

        Raises `ProtocolError` for one that may not be relayed: then it is `origin` that sent it.
        """
        assert isinstance(frame.payload, torch.Tensor)
        if origin.name != self._relay:
            target = self._require_relayable(origin, origin.name, frame.tag)
            self._counter.of(origin.name).bytes_relayed += frame.size
            try:
                self._outgoing.pass_on(target, origin.name, frame.payload)
            except LinkError:  # the loss of the receiver is reported where this party waits for it
                about = f"a sealed chunk for {target.name} could not be passed on"
                self._refusals.count(about, about, logging.INFO)
            return
        sender = self._peers.get(frame.tag)
        if sender is None or not sender.route.relayed:
            raise ProtocolError("a sealed chunk came through the relay that was not expected", "restart the run")
        if sender.unsealer is None:
            return  # of the link before, or of nobody who greeted
        if self._mailboxes.failure(sender.name) is not None or self._mailboxes.closed(sender.name):
            return
        try:
            opened = sender.reader.feed(sender.unsealer.unseal(frame.payload.numpy().tobytes()))
            if opened is not None:
                self._arrivals.deliver(sender, opened)
        except ProtocolError as error:
            log.warning("refused a frame from %s that came through %s: %s", sender.name, origin.name, error)
            self._mailboxes.lose(sender.name, BrokenLinkError(sender.name, error.what, error.fix))

    def _require_relayable(self, origin: Peer, sender: Any, receiver: Any) -> Peer:
        target = self._peers.get(receiver) if isinstance(receiver, str) else None
        if self._relay != self._name or sender != origin.name or target is None or target is origin:
            raise not_relayable(origin.name)
        return target
