"""What a party has of one peer: what arrived and was not taken, and whether the peer is there. Not locked: `mailboxes` does."""

from __future__ import annotations

from dataclasses import dataclass, field

from mpc_fl.errors import MpcFlError
from mpc_fl.links.inbox import Inbox
from mpc_fl.links.losses import Loss


@dataclass
class Mailbox:
    """What has arrived from one peer and not been taken; whether it is there, has ended well, or is lost.

    `refused`: why somebody was that came with a certificate of this name.
    """

    inbox: Inbox = field(default_factory=Inbox)
    connected: bool = False
    closed: bool = False
    loss: Loss | None = None
    refused: str = ""
    starts: int = 0

    @property
    def failure(self) -> MpcFlError | None:
        """Why the peer is lost."""
        return None if self.loss is None else self.loss.failure
