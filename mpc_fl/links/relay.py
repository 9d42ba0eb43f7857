"""A relay's part in links between two parties that can only dial out: it passes on greetings and sealed chunks, and reads none.

What one of two ends sends wrongly must not cost the other its link with the relay, nor a third party its own: the relay
answers for who sent something, each end checks what it says (`relayed_links`). What it cannot pass on it drops, and says to the
sender that it has no link with the receiver; whether that is so each end finds out by itself (`ways`).
"""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import torch

from mpc_fl.errors import LinkError
from mpc_fl.links.frames import MAX_GREETING, Frame, Kind
from mpc_fl.links.losses import not_relayable
from mpc_fl.links.mailboxes import Mailboxes
from mpc_fl.links.outgoing import Outgoing
from mpc_fl.links.peer import Peer
from mpc_fl.links.places import Refusals
from mpc_fl.links.traffic import TrafficCounter

log = logging.getLogger(__name__)

# What a relay says of a party: it has no link with it, or hears nothing from it; and of which start of that party, by its key's
# fingerprint, "" where it never had a link with it.
GONE, SILENT, START = "gone", "silent", "start"


class Relay:
    """What the party `name` does as a relay, if it is one. Its lock guards greetings kept for peers that are not connected yet."""

    def __init__(self, name: str, outgoing: Outgoing, mailboxes: Mailboxes, counter: TrafficCounter) -> None:
        self.relays = name in outgoing.relays
        self._outgoing = outgoing
        self._peers = outgoing.peers
        self._mailboxes = mailboxes
        self._counter = counter
        self._lock = threading.Lock()
        self._refusals = Refusals(log)  # an end may send without end what its receiver never gets
        self._kept: dict[str, dict[str, dict[str, Any]]] = {}  # of each receiver, the last greeting of each sender

    def after_connecting(self, peer: Peer) -> None:
        """A link with `peer` was made: send what was kept for it."""
        with self._lock:
            kept = self._kept.pop(peer.name, {})
        for greeting in kept.values():
            self._tell(peer, greeting)

    def tell_lost(self, lost: Peer, how: str, start: str) -> None:
        """Let those that reach a peer through this relay know that this start of it is gone, or silent. Waits for nobody."""
        if not self.relays or not lost.route.only_dials:
            return
        for other in self._peers.values():  # whoever can be dialled is a relay itself, or needs none
            if other is not lost and other.route.only_dials and self._mailboxes.alive(other.name):
                self._outgoing.put_at_once(other, Kind.RELAY_GREETING, {how: lost.name, START: start})

    def _tell(self, peer: Peer, message: dict[str, Any]) -> None:
        """Send `peer` what concerns another. Its loss is reported where this party waits for it, not to the other."""
        try:
            self._outgoing.put(peer, Kind.RELAY_GREETING, "", message)
        except LinkError:
            self._count(f"a greeting for {peer.name} could not be passed on")

    def _count(self, about: str) -> None:
        self._refusals.count(about, about, logging.INFO)

    def close(self) -> None:
        """Log what was refused more than once."""
        self._refusals.close()

    def pass_greeting_on(self, origin: Peer, greeting: Any) -> None:
        """A greeting of `origin` for another: it is sent, or kept until that one is there.

        Raises `ProtocolError` for one that may not be relayed.
        """
        target = self._require_relayable(origin, greeting.get("name"), greeting.get("to"))
        is_one = all(isinstance(value, str) for value in greeting.values())  # else it is no greeting anywhere
        if not is_one or len(json.dumps(greeting)) > MAX_GREETING:  # written anew, letters may be longer than they came
            raise not_relayable(origin.name)
        with self._lock:
            if not self._mailboxes.connected(target.name):
                self._kept.setdefault(target.name, {})[origin.name] = greeting
                return
        self._tell(target, greeting)

    def pass_on(self, origin: Peer, frame: Frame) -> None:
        """A sealed chunk of `origin` for another. Raises `ProtocolError` for one that may not be relayed."""
        assert isinstance(frame.payload, torch.Tensor)
        target = self._require_relayable(origin, origin.name, frame.tag)
        self._counter.of(origin.name).bytes_relayed += frame.size
        start = target.start  # another one that is linked meanwhile is not meant
        try:
            self._outgoing.pass_on(target, origin.name, frame.payload)
        except LinkError:  # the loss of the receiver is reported where this party waits for it
            self._count(f"a sealed chunk for {target.name} could not be passed on")
            # One that has not come yet is not gone, and may have been reached through another relay before. A chunk is sent again.
            if start or self._mailboxes.failure(target.name) is not None:
                self._outgoing.put_at_once(origin, Kind.RELAY_GREETING, {GONE: target.name, START: start})

    def _require_relayable(self, origin: Peer, sender: Any, receiver: Any) -> Peer:
        target = self._peers.get(receiver) if isinstance(receiver, str) else None
        if not self.relays or sender != origin.name or target is None or target is origin:
            raise not_relayable(origin.name)
        if target.name in self._outgoing.relays:  # it would take this party for the one that sent it
            raise not_relayable(origin.name)
        return target
