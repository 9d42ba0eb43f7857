"""What a party keeps about each of its peers: the way to it, its keys, what came from it, how it ended."""

from __future__ import annotations

import collections
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from mpc_fl.errors import LinkError, MpcFlError, PeerLostError
from mpc_fl.links.frames import Frame, FrameReader
from mpc_fl.links.grpc_streams import Conversation
from mpc_fl.links.routes import Route
from mpc_fl.links.sealing import Sealer, Unsealer


@dataclass
class Peer:
    """One peer as a party's links see it. Its conversation is None while nobody dialled, and for a relayed peer."""

    name: str
    route: Route
    conversation: Conversation | None = None
    reader: FrameReader = field(default_factory=FrameReader)
    next_sequence: int = 0
    send_lock: threading.RLock = field(default_factory=threading.RLock)
    inbox: dict[str, collections.deque[Frame]] = field(
        default_factory=lambda: collections.defaultdict(collections.deque)
    )
    greeting: dict[str, Any] | None = None
    public_key: bytes | None = None
    sealer: Sealer | None = None
    unsealer: Unsealer | None = None
    connected: bool = False
    closed: bool = False
    failure: MpcFlError | None = None
    starts: int = 0
    waiting_greetings: list[dict[str, Any]] = field(default_factory=list)

    def begin_again(self, failure: MpcFlError) -> None:
        """Forget a link that is gone, so that the peer can connect anew; until it has, sending to it is the failure."""
        self.failure = self.failure or failure
        with self.send_lock:  # free soon: whoever sends meets the failure
            self.starts += 1
            self.conversation, self.reader, self.next_sequence = None, FrameReader(), 0
            self.inbox.clear()
            self.sealer = self.unsealer = None
            self.connected = False

    @property
    def relayed(self) -> bool:
        """Whether what goes to it goes through the relay."""
        return self.route.how.startswith("relay")

    @property
    def gone(self) -> bool:
        """Whether nothing can come from it any more."""
        return self.conversation is None or self.conversation.over

    def put_chunk(self, chunk: bytes, deadline: float, phase: str, greeting: bool = False) -> None:
        """Queue a chunk; greetings also while the peer comes back after a failure.

        Raises the failure of the link, or `PeerLostError` when the peer takes nothing for too long.
        """
        while True:
            if self.failure is not None and not greeting:
                raise self.failure
            if self.conversation is None:
                raise LinkError(f"{self.name} is not connected", "connect before sending")
            if self.conversation.put(chunk, 0.2) or self.closed:
                return
            if time.monotonic() > deadline:
                raise PeerLostError(
                    self.name, f"{self.name} takes no data in phase '{phase}'", f"see the log of {self.name}"
                )
