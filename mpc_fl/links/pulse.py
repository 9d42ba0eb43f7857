"""Signs of life: a party says that it is there when it has nothing else to say, and notes who does not.

TCP answers for a process that is stopped, and a party may compute for long; so the runtime itself says it, on a thread
that no computation holds up. Every chunk that comes is a sign of life. Nobody is silent who cannot be heard: whose stream is not
read, because this party lets it wait (`mailboxes`). Parties that reach each other through relays hear each other's words about
sealed chunks (`sealed_stream`), through any of them; each relay hears both, and tells one that the other is silent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from mpc_fl.errors import PeerLostError
from mpc_fl.links.conversation import Conversation
from mpc_fl.links.mailboxes import Mailboxes
from mpc_fl.links.outgoing import Outgoing
from mpc_fl.links.peer import Peer
from mpc_fl.links.sealed_stream import SealedStream
from mpc_fl.links.silence import LOOK


class Pulse:
    """This party's signs of life to all peers with a link of their own, and its ear for those of all.

    `silent(peer, why)` is called of a peer that has given none for too long, until that is no longer `alive`; `beside()` after
    each look.
    """

    def __init__(
        self,
        outgoing: Outgoing,
        mailboxes: Mailboxes,
        seconds: float,
        silent: Callable[[Peer, PeerLostError], None],
        beside: Callable[[], None] = lambda: None,
    ) -> None:
        """`seconds`: after which, without having sent anything, this party gives a sign."""
        self._outgoing = outgoing
        self._mailboxes = mailboxes
        self._seconds = seconds
        self._silent, self._beside = silent, beside
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin, on a thread of its own."""
        self._mailboxes.silence.look({})
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def stop(self) -> None:
        """End it."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(LOOK):
            self.beat()
        self._mailboxes.silence.end()

    def beat(self) -> None:
        """Give signs, and look who gave none. Waits for nobody."""
        looked_at = dict[str, Conversation | SealedStream]()
        heard = dict[str, bool | None]()
        relays_unheard = set[str]()  # this party lets them wait
        for peer in self._outgoing.peers.values():
            conversation = peer.conversation
            if conversation is None or conversation.over or not self._mailboxes.alive(peer.name):
                continue
            self._outgoing.give_sign(peer, self._seconds)
            if conversation.taking:
                relays_unheard.add(peer.name)
            looked_at[peer.name], heard[peer.name] = conversation, conversation.heard()
        behind = [peer for peer in self._outgoing.peers.values() if peer.stream and self._mailboxes.alive(peer.name)]
        for peer in behind:  # after the relays: of several that are silent those are named first
            assert peer.stream is not None
            cannot_hear = not relays_unheard.isdisjoint(peer.route.relays)
            looked_at[peer.name], heard[peer.name] = (
                peer.stream,
                peer.stream.heard() or (None if cannot_hear else False),
            )
        silence = self._mailboxes.silence
        for name in silence.look(heard, [peer.name for peer in behind]):
            peer = self._outgoing.peers[name]
            # Else it has just come back, or was lost with its last relay.
            is_same = looked_at[name] in (peer.conversation, peer.stream)
            if is_same and self._mailboxes.alive(name):
                self._silent(peer, self._mailboxes.without_sign(name, silence.limit))
        self._beside()
