"""Connections over streams of TLS: dial, admit, greet, dial again, let come back, part.

One stream per pair of parties. Who has an address is dialled; of two that have one the later in the list dials; two
parties that can only dial out reach each other through relays (`relay`, `relayed_links`). A link begins with one signed
greeting from each side (`handshake`). A tolerated peer that comes back (after a restart, with new keys) has its link made again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from mpc_fl.errors import (
    SAME_VERSION,
    BrokenLinkError,
    HandshakeError,
    LinkError,
    MpcFlError,
    PeerLostError,
    PeerRefusedError,
    ProtocolError,
)
from mpc_fl.links.conversation import Conversation
from mpc_fl.links.dialling import Dialling
from mpc_fl.links.frames import Frame, FrameReader, Kind, Observer
from mpc_fl.links.greetings import Greeter, first_greeting
from mpc_fl.links.handshake import greeting_digest
from mpc_fl.links.losses import Known, giving_up, parting_message, stood_still
from mpc_fl.links.mailboxes import Mailboxes
from mpc_fl.links.outgoing import Outgoing
from mpc_fl.links.peer import Peer
from mpc_fl.links.pulse import Pulse
from mpc_fl.links.relay import GONE, SILENT, Relay
from mpc_fl.links.relayed_links import RelayedLinks
from mpc_fl.links.routes import Route, relayed_route
from mpc_fl.links.settings import LONGEST_GREETING, Timeouts
from mpc_fl.links.silence import SIGN
from mpc_fl.links.stream_server import StreamServer
from mpc_fl.links.streams import wait_for_all
from mpc_fl.links.traffic import TrafficCounter

log = logging.getLogger(__name__)

_FAREWELL = 2.0
_REDIAL = 1.0
_LOOK = 0.1
_FOR_THE_SILENT = 0.5  # seconds for what a silent peer is told to reach its machine


class Connections:
    """This party's conversations. Its lock guards who may make a link anew: two streams of one peer cannot both win.

    Each stream is read by a thread of its own, which files what arrives in the mailboxes.
    """

    def __init__(
        self,
        greeter: Greeter,
        outgoing: Outgoing,
        mailboxes: Mailboxes,
        counter: TrafficCounter,
        timeouts: Timeouts,
        observer: Observer | None,
    ) -> None:
        self._name = greeter.name
        self._greeter = greeter
        self._outgoing = outgoing
        self._peers = outgoing.peers
        self._mailboxes = mailboxes
        self._timeouts = timeouts
        self._observer = observer
        self._relay = Relay(greeter.name, outgoing, mailboxes, counter)
        self._relayed = RelayedLinks(greeter, outgoing, mailboxes, self)
        self._pulse = Pulse(outgoing, mailboxes, SIGN, self._give_up, self._relayed.beat)
        self._lock = threading.Lock()
        self._began = 0.0  # of `time.monotonic`
        self._told: set[str] = set()
        self._server: StreamServer | None = None
        self._diallings: dict[str, Dialling] = {}  # of each peer that this party dials, the last
        self._given_up: list[Conversation] = []
        self._parting: tuple[Kind, dict[str, Any]] | None = None

    # ---- making links ----------------------------------------------------------------------------------------------

    def open(self, listen: str | None) -> None:
        """Serve `listen` and dial. Raises `LinkError` when the port is in use or not allowed."""
        self._began = time.monotonic()
        if listen is not None:
            streams, timeout = 2 * len(self._peers) + 4, min(self._timeouts.connect, LONGEST_GREETING)
            refused = self._mailboxes.note_refused
            self._server = StreamServer(self._greeter.identity, listen, self.admit, streams, timeout, refused)
        for peer in self._peers.values():
            if peer.route.how == "dial" and peer.route.address:
                self._dial(peer)
        self._pulse.start()

    def learn_address(self, name: str, address: str) -> None:
        """A peer to be dialled has said its address; a link that is there stays."""
        peer = self._peers[name]
        with self._lock:
            if peer.route.how != "dial" or peer.route.address == address or self._parting is not None:
                return
            peer.route = replace(peer.route, address=address)
            is_first = peer.conversation is None
        if is_first:  # else it is dialled there when that link ends
            self._dial(peer)

    def learn_relays(self, name: str, relays: Sequence[str]) -> None:
        """A peer has said that it can only dial out: it is awaited, or where this party cannot be dialled either, reached through
        those of `relays` that are relays here."""
        peer, usable = self._peers[name], [relay for relay in relays if relay in self._outgoing.relays]
        with self._lock:
            if peer.route.relayed or peer.route.address or self._parting is not None:
                return
            if self._server is not None:
                peer.route = Route("await", only_dials=True)
            elif usable:
                peer.route = relayed_route(self._name, name, usable)
                self._mailboxes.learn_relays(name, peer.route.relays)
            else:
                return
        self._relayed.learn(peer)

    def _dial(self, peer: Peer) -> None:
        peer.greeting = self._greeter.greet(peer.name)
        conversation = self._converse(peer)
        self._outgoing.put(peer, Kind.HELLO, "", peer.greeting)
        if (before := self._diallings.get(peer.name)) is not None:
            before.close()  # the other end may keep it open, each time that it lets this party dial again
        self._diallings[peer.name] = Dialling(self._greeter.identity, peer.name, peer.route.address, conversation)

    def _converse(self, peer: Peer) -> Conversation:
        """A new conversation with a peer. One that it replaces has no more say."""

        def take(chunk: bytes | memoryview) -> bool:
            if peer.conversation is not conversation:
                return False
            frame = peer.reader.feed(chunk)
            return frame is None or self.deliver(peer, frame)

        def room(length: int) -> memoryview | None:
            return peer.reader.room(length) if peer.conversation is conversation else None

        def ended(failure: MpcFlError | None) -> None:
            with self._lock:
                if peer.conversation is not conversation:
                    return
                start = peer.start
            if isinstance(failure, HandshakeError) and conversation.refusal is failure:
                what = f"{self._name} refused {peer.name}: {failure.what}"
                failure = PeerRefusedError(peer.name, what, f"see the log of {peer.name}")
            elif isinstance(failure, HandshakeError):
                failure = HandshakeError(f"{peer.name} refused {self._name}: {failure.what}", "compare the two sides")
            elif isinstance(failure, ProtocolError):
                failure = BrokenLinkError(peer.name, failure.what, failure.fix)
            reason = failure or self._mailboxes.lost(peer.name, "the link ended without a farewell")
            seconds = self._mailboxes.silence.stood_still()
            parted = self._mailboxes.closed(peer.name) or self._mailboxes.failure(peer.name) is not None
            if failure is None and not parted and seconds:  # the peer gave this party up, and so do others
                reason = stood_still(self._name, seconds, peer.name)
                self._mailboxes.interrupt(reason)
            self._mailboxes.lose(peer.name, reason)
            self._note_lost(peer, GONE, start)
            self._dial_again(peer)

        conversation = peer.conversation = Conversation(take, ended, room)
        return conversation

    def _give_up(self, peer: Peer, silent: PeerLostError) -> None:
        """A peer has given no sign of life for too long: it is lost like any other, and told if it ever wakes up."""
        log.warning("%s", silent)
        start = peer.start
        self._outgoing.put_at_once(peer, *giving_up(silent))
        if peer.conversation is not None:
            peer.conversation.finish()
            peer.conversation.cut()
            self._given_up.append(peer.conversation)
        self._mailboxes.lose(peer.name, silent, Known.SILENT)
        if peer.stream is not None:
            peer.stream.end()
        self._note_lost(peer, SILENT, start)
        self._dial_again(peer)

    def _note_lost(self, peer: Peer, how: str, start: str) -> None:
        self._relay.tell_lost(peer, how, start)
        self._relayed.after_losing(peer)

    def _dial_again(self, peer: Peer) -> None:
        """A tolerated peer that this party dials may come back; the dialling goes on until it does or the run ends.

        Not before all have been connected: until then nobody may make a link anew.
        """
        lost = peer.conversation

        def again() -> None:
            if peer.conversation is not lost:
                return  # it has come back
            if self._mailboxes.awaits_return(peer.name):
                self._outgoing.begin_again(peer)
                self._dial(peer)
            else:
                self._dial_again(peer)

        may_return = isinstance(self._mailboxes.failure(peer.name), PeerLostError) and self._parting is None
        if peer.route.how == "dial" and may_return and self._mailboxes.tolerates(peer.name):
            timer = threading.Timer(_REDIAL, again)
            timer.daemon = True
            timer.start()

    def admit(self, names: set[str], chunk: bytes) -> Conversation:
        """Answer the first chunk of a stream that somebody dialled, with a certificate of `names`.

        Called by this party's own server, or by one that many sessions share. Raises `HandshakeError` or
        `ProtocolError`.
        """
        reader = FrameReader(greetings_only=True)
        greeting = first_greeting(reader, names, chunk)
        name = greeting["name"]
        peer = self._peers.get(name)
        if peer is None:
            raise HandshakeError(f"{name} takes no part in this run")
        if peer.route.how != "await":
            raise HandshakeError(f"{name} should wait to be dialled by {self._name}, or use the relay")
        public_key = self._greeter.check(name, greeting)
        with self._lock:
            if peer.conversation is not None:
                if not self._mailboxes.may_return(name):
                    raise HandshakeError(f"{name} is connected already")
                # It comes back: the other end of the link before is gone, whether this side has noticed or not.
                self._outgoing.begin_again(peer)
            conversation = self._converse(peer)
            peer.reader = reader
        self._outgoing.put(peer, Kind.WELCOME, "", self._greeter.greet(name, greeting_digest(greeting)))
        self.accept(peer, public_key)
        if self._parting is not None:
            self._say_farewell(peer, *self._parting)
        return conversation

    def accept(self, peer: Peer, public_key: bytes) -> None:
        """The greeting of `peer`, direct or relayed, holds: it is connected, and this is its X25519 key."""
        peer.reader.trust()
        self._greeter.keys.learn(peer.name, public_key)
        self._mailboxes.connect(peer.name)
        peer.start = self._greeter.keys.fingerprint(peer.name)
        self._relay.after_connecting(peer)
        self._relayed.after_connecting(peer)

    # ---- frames ----------------------------------------------------------------------------------------------------

    def deliver(self, peer: Peer, frame: Frame) -> bool:
        """Give a frame to whom it concerns; False when it ends the link. Raises `ProtocolError`, `HandshakeError`."""
        if frame.kind == Kind.ALIVE and self._mailboxes.connected(peer.name):
            return True  # that it came is all (`pulse`)
        if self._observer is not None:
            self._observer(peer.name, frame)
        if not self._mailboxes.connected(peer.name):
            if frame.kind != Kind.WELCOME or peer.route.how != "dial":
                raise ProtocolError("a link did not begin with a greeting", SAME_VERSION)
            digest = greeting_digest(peer.greeting or {})
            self.accept(peer, self._greeter.check(peer.name, frame.payload, digest))
        elif frame.kind == Kind.RELAY:
            (self._relay.pass_on if self._relay.relays else self._relayed.take_sealed)(peer, frame)
        elif frame.kind == Kind.RELAY_GREETING:
            (self._relay.pass_greeting_on if self._relay.relays else self._relayed.take_greeting)(peer, frame.payload)
        else:
            return self._mailboxes.file(peer.name, frame)
        return True

    # ---- parting ---------------------------------------------------------------------------------------------------

    def close(self, error: BaseException | None, stays_for: Collection[str]) -> None:
        """Say how this party ends, let what is queued leave, cut the rest. A relay stays for those of its peers that need it."""
        if error is None and self._relay.relays:
            awaited = [name for name, peer in self._peers.items() if peer.route.only_dials and name in stays_for]
            self._mailboxes.await_farewells(awaited, lambda name: self._peers[name].gone)
        self._mailboxes.close()
        self._parting = parting_message(error)
        linger = self._timeouts.linger if error is None else self._timeouts.linger_after_error
        for relayed in (True, False):  # first through relays: their own links must still be open for that
            for peer in self._peers.values():
                if peer.route.relayed == relayed and self._can_be_told(peer):
                    self._say_farewell(peer, *self._parting)
            if relayed:
                self._relayed.await_arrival(linger)
        if isinstance(error, MpcFlError) and not self._mailboxes.started:
            self._await_untold()
        self._pulse.stop()
        talking = [
            peer.conversation
            for peer in self._peers.values()
            if peer.conversation is not None and (self._mailboxes.connected(peer.name) or not self._mailboxes.started)
        ]
        for conversation in talking:
            conversation.finish()
        wait_for_all(talking, linger)
        for conversation in talking:
            conversation.cut()
        for conversation in self._given_up:
            conversation.wait_until_left(_FOR_THE_SILENT)
        for dialling in self._diallings.values():
            dialling.close()
        if self._server is not None:
            self._server.stop()
        self._relay.close()
        self._relayed.close()

    def _await_untold(self) -> None:
        """Stay until those who have not come yet have come and heard why: a party that finds nobody cannot say who failed."""
        while time.monotonic() < self._began + self._timeouts.untold and any(
            map(self._is_untold, self._peers.values())
        ):
            time.sleep(_LOOK)

    def _is_untold(self, peer: Peer) -> bool:
        if self._mailboxes.failure(peer.name) is not None or self._mailboxes.closed(peer.name):
            return False
        if peer.route.how == "await":
            return self._server is not None and peer.name not in self._told
        return peer.conversation is not None and not (peer.conversation.reached or peer.conversation.over)

    def _can_be_told(self, peer: Peer) -> bool:
        """Whether it is there, or may be: whom this party has greeted may have accepted that, its answer on the way.

        Such a peer goes on already. Left without a word it would take this party for the one that failed.
        """
        if peer.conversation is None or peer.conversation.over or peer.route.how != "dial":
            return self._mailboxes.alive(peer.name)
        return self._mailboxes.failure(peer.name) is None and not self._mailboxes.closed(peer.name)

    def _say_farewell(self, peer: Peer, kind: Kind, payload: dict[str, Any]) -> None:
        try:
            self._outgoing.put(peer, kind, "", payload, _FAREWELL)
            self._told.add(peer.name)
        except (LinkError, ProtocolError):
            log.info("%s could not be told that %s ends", peer.name, self._name)
