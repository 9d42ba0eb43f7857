"""Links through relays, at their two ends: how they are made and made anew, and what comes through them.

Neither end can dial the other. The `first` greets through its relays, the other answers; both greetings are signed end to end
(`handshake`), so that all that follows is sealed with keys that no relay has (`sealing`). The same greeting may come through
several relays: it is answered alike. The `second` says, signed, that it has no link ("knock": it has started, or has lost the one
that such a greeting made), and the first greets it anew. As long as there is no link both repeat that. So a link outlives its
relay, and no word of a relay alone ends it or makes it anew.

A relay may keep what was signed, and bring it later, of a start or a run that is over. So nothing that can be repeated ends a
link that is there. The second takes a link for made when something comes that is sealed for it: that takes the key of the greeting.
To a knock of another start the first replies with a greeting that names it ("called"), which the second answers if it said that.
Another session or configuration in a greeting ends nobody: whoever has one finds that out on its own link with the relay.

A false greeting is refused and counted, as on a stream of its own. A chunk that does not open ends no link: its relay may have
changed it, and another one brings it again. A chunk that opens, and is wrong, ends the link with whoever sealed it.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Protocol

import torch

from mpc_fl.errors import BrokenLinkError, DisagreementError, HandshakeError, ProtocolError
from mpc_fl.links.frames import Frame, Kind
from mpc_fl.links.greetings import Greeter
from mpc_fl.links.handshake import greeting_digest
from mpc_fl.links.losses import Known, not_relayable
from mpc_fl.links.mailboxes import Mailboxes
from mpc_fl.links.outgoing import Outgoing
from mpc_fl.links.peer import Answered, Peer
from mpc_fl.links.places import Refusals
from mpc_fl.links.relay import GONE, SILENT, START
from mpc_fl.links.sealed_stream import SealedStream
from mpc_fl.links.sealing import Sealer, Unsealer
from mpc_fl.links.silence import SIGN
from mpc_fl.links.ways import Ways

log = logging.getLogger(__name__)

_KNOCK = "knock "  # then the digest of the greeting that made the link that is lost, or nothing
_CALLED = "called "  # then the digest of the knock
_MOST_ANSWERED = 16  # greetings of one peer, none of which has made a link


class Arrivals(Protocol):
    """What is handed on: a relayed link's frames and its accepted greeting (`connections`)."""

    def deliver(self, peer: Peer, frame: Frame) -> bool:
        """Take a frame that came sealed from `peer`."""

    def accept(self, peer: Peer, public_key: bytes) -> None:
        """The greeting of `peer` holds; this is its key."""


class RelayedLinks:
    """This party's links with peers behind relays. Its lock guards who greets or is heard: several relays may bring a greeting.

    Nothing waits for a relay while it is held, or on the thread that looks for signs of life: what does not leave is repeated.
    """

    def __init__(self, greeter: Greeter, outgoing: Outgoing, mailboxes: Mailboxes, arrivals: Arrivals) -> None:
        self._name = greeter.name
        self._relays = outgoing.relays
        self._greeter = greeter
        self._outgoing = outgoing
        self._peers = outgoing.peers
        self._mailboxes = mailboxes
        self._arrivals = arrivals
        self._ways = Ways(outgoing, mailboxes)
        self._refusals = Refusals(log)
        self._lock = threading.RLock()
        self._asked = 0.0  # when, of `time.monotonic`
        self._closing = False

    # ---- making links ----------------------------------------------------------------------------------------------

    def after_connecting(self, peer: Peer) -> None:
        """A link was made: if `peer` is a relay, ask for links through it with those that there is none with."""
        if peer.name in self._relays and not peer.route.relayed:
            for other in self._peers.values():
                if peer.name in other.route.relays:
                    self._ask(other, [peer])

    def after_losing(self, peer: Peer) -> None:
        """A link ended: if `peer` was a relay, another one takes its place."""
        if peer.name in self._relays:
            self._ways.wake()

    def learn(self, peer: Peer) -> None:
        """`peer` has said that relays lead to it: ask for a link."""
        self._ask(peer, self._ways.through(peer))

    def beat(self) -> None:
        """Each second: what is due to peers that are linked, and from time to time a greeting for those that are not."""
        self._ways.beat()
        if time.monotonic() - self._asked < SIGN or self._closing:
            return
        self._asked = time.monotonic()
        for peer in self._peers.values():
            if peer.route.relayed:
                self._ask(peer, self._ways.through(peer))

    def _ask(self, peer: Peer, through: list[Peer]) -> None:
        """Greet a peer that there is no link with, or say that there is none; nothing where it may not come back."""
        name = peer.name
        with self._lock:  # of the present link nobody may say that it is lost
            if self._mailboxes.closed(name) or self._mailboxes.alive(name) or self._closing or not through:
                return
            lost = self._mailboxes.failure(name) is not None
            if lost and not self._mailboxes.awaits_return(name):
                return
            if peer.route.how == "relay, second":
                knock = self._greeter.greet(name, _KNOCK + peer.made_by)
                peer.knocks.append(greeting_digest(knock))
                self._send(through, knock)
                return
            if not peer.asks:
                if lost:
                    self._outgoing.begin_again(peer)
                peer.greeting, peer.asks = self._greeter.greet(name), True
            assert peer.greeting is not None
            self._send(through, peer.greeting)

    def _send(self, through: list[Peer], greeting: dict[str, Any]) -> None:
        for relay in through:
            self._outgoing.put_at_once(relay, Kind.RELAY_GREETING, greeting)

    def close(self) -> None:
        """End all of them, and log what was refused more than once."""
        for peer in self._peers.values():
            if peer.stream is not None:
                peer.stream.end()
        self._refusals.close()

    def await_arrival(self, seconds: float) -> None:
        """No link is made from now on; wait until what was sent has arrived."""
        self._closing = True
        self._ways.await_arrival(seconds)

    # ---- greetings -------------------------------------------------------------------------------------------------

    def take_greeting(self, relay: Peer, greeting: Any) -> None:
        """Check a greeting that came through a relay, answer it if it came first, or refuse it; or hear who is lost to the relay.

        Raises `ProtocolError` for what no relay may send.
        """
        if relay.name not in self._relays:
            raise not_relayable(relay.name)
        for how in (GONE, SILENT):
            if set(greeting) == {how, START}:
                self._hear_of_loss(relay, how, greeting[how], greeting[START])
                return
        name = greeting.get("name")
        sender = self._peers.get(name) if isinstance(name, str) else None
        if greeting.get("to") != self._name or sender is None or sender is relay:
            raise not_relayable(relay.name)
        try:
            with self._lock:
                self._hear(relay, sender, greeting, greeting_digest(greeting))
        except HandshakeError as error:
            if isinstance(error, DisagreementError):
                self._mailboxes.note_refused(sender.name, error.what)
            kind = f"refused a greeting of {sender.name} that came through {relay.name}"
            self._refusals.count(kind, f"{kind}: {error}")

    def _hear_of_loss(self, relay: Peer, how: str, name: Any, start: Any) -> None:
        """What a relay says of another start than that of the present link is of one before: it came late."""
        lost = self._peers.get(name) if isinstance(name, str) else None
        if lost is None or not lost.route.relayed:
            return
        if how == SILENT:
            failure, known = self._mailboxes.without_sign(lost.name, self._mailboxes.silence.limit), Known.SILENT
        else:
            failure, known = self._mailboxes.lost(lost.name, "it has no link with a relay any more"), Known.VANISHED
        with self._lock:  # no link with another start is made meanwhile
            if start in ("", lost.start):
                self._ways.lose_through(lost, relay.name, failure, known)

    def _hear(self, relay: Peer, sender: Peer, greeting: dict[str, Any], said: str) -> None:
        """Raises `HandshakeError` for a greeting that does not hold."""
        if not sender.route.relayed:  # it joins later, and is not known to use relays yet: it says that again
            kind = f"{sender.name} greets through {relay.name}, and has not announced that it is reached so"
            self._refusals.count(kind, kind, logging.INFO)
            return
        if said in sender.heard:  # through another relay
            return
        refers_to = str(greeting.get("answers")).partition(":")[0]
        if sender.route.how == "relay, second":
            if said in sender.answered:
                self._send([relay], sender.answered[said].answer)
                return
            public_key = self._greeter.check_relayed(sender.name, greeting, self._may_refer_to(sender, refers_to))
            self._answer(relay, sender, public_key, said)
        elif refers_to.startswith(_KNOCK):
            public_key = self._greeter.check_relayed(sender.name, greeting, refers_to)
            sender.heard.append(said)
            self._hear_knock(sender, public_key, said, refers_to.removeprefix(_KNOCK))
        else:
            self._hear_answer(relay, sender, greeting, (refers_to, said))

    def _may_refer_to(self, sender: Peer, said: str) -> str:
        """What a greeting may refer to: nothing, or what this start has said since it has no link."""
        if not said.startswith(_CALLED):
            return ""
        if said.removeprefix(_CALLED) not in sender.knocks or self._mailboxes.alive(sender.name):
            raise HandshakeError(f"{sender.name} was not called")
        return said

    def _hear_knock(self, sender: Peer, public_key: bytes, said: str, lost: str) -> None:
        """`sender` has no link: it is another start of it, or has lost the one that is here. Else that was said before this one."""
        name = sender.name
        if self._mailboxes.connected(name):
            same = self._greeter.keys.is_of(name, public_key)
            if same and lost != sender.made_by:
                return
            if not self._mailboxes.may_return(name):
                raise HandshakeError(f"{name} is connected already")
            if not same and self._mailboxes.alive(name):  # of the next start, or of one that is over
                greeting = self._greeter.greet(name, _CALLED + said)
                sender.called.append(greeting_digest(greeting))
                self._send(self._ways.through(sender), greeting)
                return
            self._outgoing.begin_again(sender)
        self._ask(sender, self._ways.through(sender))

    def _hear_answer(self, relay: Peer, sender: Peer, greeting: dict[str, Any], digests: tuple[str, str]) -> None:
        """`digests`: of the greeting that is answered, and of the answer."""
        asked, said = digests
        if asked not in sender.called and not (sender.asks and asked == greeting_digest(sender.greeting or {})):
            raise HandshakeError(f"{sender.name} answers what was not asked, or was answered before")
        public_key = self._greeter.check_relayed(sender.name, greeting, asked)
        if self._mailboxes.connected(sender.name):
            if not self._mailboxes.may_return(sender.name):
                raise HandshakeError(f"{sender.name} is connected already")
            self._outgoing.begin_again(sender)
        sealing = self._sealing(sender.name, public_key, f"{asked} {said}")
        sender.heard.append(said)
        self._make(relay.name, sender, public_key, asked, sealing)

    def _answer(self, relay: Peer, sender: Peer, public_key: bytes, said: str) -> None:
        if self._mailboxes.connected(sender.name) and not self._mailboxes.may_return(sender.name):
            raise HandshakeError(f"{sender.name} is connected already")
        answer = self._greeter.greet(sender.name, said)
        sealing = self._sealing(sender.name, public_key, f"{said} {greeting_digest(answer)}")
        while len(sender.answered) >= _MOST_ANSWERED:
            del sender.answered[next(iter(sender.answered))]
        sender.answered[said] = Answered(relay.name, public_key, answer, sealing)
        self._send([relay], answer)

    def _make_answered(self, sender: Peer, sealed: bytes) -> None:
        """If this is the first that comes sealed for a link whose greeting was answered, that link is made, and none before it."""
        with self._lock:
            opened = (said for said, link in sender.answered.items() if link.sealing[1].begins(sealed))
            made_by = next(opened, None)
            if made_by is None:
                return
            link = sender.answered[made_by]
            for said in [*sender.answered]:
                sender.heard.append(said)
                del sender.answered[said]
                if said == made_by:
                    break
            if self._mailboxes.may_return(sender.name):
                self._outgoing.begin_again(sender)
            elif self._mailboxes.connected(sender.name):
                return
            self._make(link.relay, sender, link.public_key, made_by, link.sealing)

    def _make(
        self, relay: str, sender: Peer, public_key: bytes, made_by: str, sealing: tuple[Sealer, Unsealer]
    ) -> None:
        """The link is made by the first greeting of this digest."""
        sender.made_by, sender.asks, stream = made_by, False, SealedStream(*sealing)
        with stream.reading:  # what comes of it through another relay waits until all is ready
            sender.stream = stream
            self._arrivals.accept(sender, public_key)
            self._ways.open(sender, stream, relay)

    def _sealing(self, peer: str, public_key: bytes, made_by: str) -> tuple[Sealer, Unsealer]:
        """For a link that the greetings of these two digests made. Raises `HandshakeError` for a key of small order."""
        keys, mine = self._greeter.keys, self._name
        sealer = Sealer(keys.sealing_key(peer, public_key, mine, peer, made_by), mine, peer)
        return sealer, Unsealer(keys.sealing_key(peer, public_key, peer, mine, made_by), peer, mine)

    # ---- sealed chunks ---------------------------------------------------------------------------------------------

    def take_sealed(self, relay: Peer, frame: Frame) -> None:
        """Open a sealed chunk, or have it sent again. Raises `ProtocolError` for one that no relay may send."""
        assert isinstance(frame.payload, torch.Tensor)
        sender = self._peers.get(frame.tag)
        if relay.name not in self._relays or sender is None or sender is relay:
            raise not_relayable(relay.name)
        sealed = frame.payload.numpy().tobytes()
        if sender.answered:
            self._make_answered(sender, sealed)
        stream, reader = sender.stream, sender.reader
        if stream is None or self._mailboxes.failure(sender.name) is not None:
            return  # of the link before, or of nobody who greeted
        with stream.reading:
            try:
                chunk = stream.take(sealed, relay.name)
            except ProtocolError as error:
                kind = f"refused what {relay.name} brought as of {sender.name}"
                self._refusals.count(kind, f"{kind}: {error}")
                return
            if chunk is None:
                if stream.is_word(sealed):
                    self._ways.came(sender, relay.name)
                return
            self._ways.came(sender, relay.name)
            try:
                opened = reader.feed(chunk)
                expected = opened is not None and not self._mailboxes.closed(sender.name)
                if opened is not None and expected and not self._arrivals.deliver(sender, opened):
                    stream.say()  # it waits for that before it goes
            except ProtocolError as error:
                log.warning("refused a frame from %s that came through %s: %s", sender.name, relay.name, error)
                self._mailboxes.lose(sender.name, BrokenLinkError(sender.name, error.what, error.fix))
