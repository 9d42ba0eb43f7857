"""What a party's connections keep about each peer: the way to it, the present conversation, what is sealed for it.

What came from the peer, and whether it is lost, is in its mailbox (`mailboxes`); its public key among the keys (`keys`).
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Any

from mpc_fl.links.conversation import Conversation
from mpc_fl.links.frames import FrameReader, FrameWriter
from mpc_fl.links.routes import Route
from mpc_fl.links.sealed_stream import SealedStream
from mpc_fl.links.sealing import Sealer, Unsealer

_RECENT = 64  # greetings: several relays bring one at about the same time


@dataclass(frozen=True, repr=False)
class Answered:
    """A greeting of a relayed peer with this public key that came through `relay`, and the answer: the link is made when something
    comes that is sealed for it. Whoever only repeats an old greeting has no key for that."""

    relay: str
    public_key: bytes
    answer: dict[str, Any]
    sealing: tuple[Sealer, Unsealer]


@dataclass
class Peer:
    """The link with one peer. Its conversation is None while nobody dialled, and for a relayed peer.

    The writer's lock guards what sending needs (`conversation`, `stream`, the next sequence); a reader belongs to the
    thread that reads its conversation, or holds the stream's `reading`. `greeting` is the one that this party sent first, which
    an answer must refer to, `start` the fingerprint of the key of the peer's start that was linked last. Of a relayed peer: `asks`
    while that has no answer yet; `called` digests of greetings to one that says it has started anew, while the link before is
    there; `made_by` that of the first greeting that made the link; `answered` what was answered and has made no link yet, by the
    digest of the greeting; `knocks` digests of what this party said to be called; `heard` those of greetings that were accepted,
    and may come through another relay.
    """

    name: str
    route: Route
    writer: FrameWriter
    conversation: Conversation | None = None
    reader: FrameReader = field(default_factory=lambda: FrameReader(greetings_only=True))
    greeting: dict[str, Any] | None = None
    start: str = ""
    asks: bool = False
    called: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=_RECENT))
    made_by: str = ""
    answered: dict[str, Answered] = field(default_factory=dict)
    knocks: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=_RECENT))
    heard: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=_RECENT))
    stream: SealedStream | None = None

    def forget_link(self) -> None:
        """Forget a link that is gone, so that the peer can connect anew. The caller holds the writer's lock."""
        if self.conversation is not None:
            self.conversation.cut()  # the other end may keep it open
        self.conversation, self.reader = None, FrameReader(greetings_only=True)
        self.writer.next_sequence = 0
        if self.stream is not None:
            self.stream.end()
        self.stream, self.asks = None, False
        self.called.clear()

    @property
    def gone(self) -> bool:
        """Whether nothing can come from it any more."""
        return self.conversation is None or self.conversation.over
