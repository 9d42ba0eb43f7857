"""What a party's connections keep about each peer: the way to it, the present conversation, what is sealed for it.

What came from the peer, and whether it is lost, is in its mailbox (`mailboxes`); its public key among the keys (`keys`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mpc_fl.links.frames import FrameReader, FrameWriter
from mpc_fl.links.grpc_streams import Conversation
from mpc_fl.links.routes import Route
from mpc_fl.links.sealed_stream import SealedStream


@dataclass
class Peer:
    """The link with one peer. Its conversation is None while nobody dialled, and for a relayed peer.

    The writer's lock guards what sending needs (`conversation`, `stream`, the next sequence); a reader belongs to the
    thread that reads its conversation, or holds the stream's `reading`. `greeting` is the one that this party sent first, which
    an answer must refer to, `start` the fingerprint of the key of the peer's start that was linked last. Of a relayed peer: `asks`
    while that has no answer yet; `made_by` the digest of the first greeting that made the link; `answered` the digest of the last
    one that this party answered, with `answer`; `heard_before` those accepted.
    """

    name: str
    route: Route
    writer: FrameWriter
    conversation: Conversation | None = None
    reader: FrameReader = field(default_factory=lambda: FrameReader(greetings_only=True))
    greeting: dict[str, Any] | None = None
    start: str = ""
    asks: bool = False
    made_by: str = ""
    answered: str = ""
    answer: dict[str, Any] | None = None
    heard_before: set[str] = field(default_factory=set)
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

    @property
    def gone(self) -> bool:
        """Whether nothing can come from it any more."""
        return self.conversation is None or self.conversation.over
