"""Greetings as connections and relay exchange them: this party's own, and what a peer's must hold (`handshake`)."""

from __future__ import annotations

from typing import Any

from mpc_fl.crypto.certificates import Identity
from mpc_fl.errors import DisagreementError, HandshakeError, printable
from mpc_fl.links.frames import FrameReader, Kind
from mpc_fl.links.handshake import Agreement, check_greeting, make_greeting
from mpc_fl.links.keys import PairwiseKeys
from mpc_fl.links.mailboxes import Mailboxes

_LONGEST_NAME = 64


def first_greeting(reader: FrameReader, names: set[str], chunk: bytes) -> dict[str, Any]:
    """The greeting in a stream's first chunk, from the holder of a certificate of `names`; not checked any further.

    `reader` reads greetings only. Raises `HandshakeError`, or `ProtocolError` for bytes that are no greeting.
    """
    frame = reader.feed(chunk)
    if frame is None or frame.kind != Kind.HELLO or not isinstance(frame.payload, dict):
        raise HandshakeError("the first frame is not a greeting")
    name = frame.payload.get("name")
    if not isinstance(name, str) or name not in names:
        used = printable(str(name), _LONGEST_NAME)
        raise HandshakeError(f"the certificate of {', '.join(sorted(names)) or 'nobody'} was used as '{used}'")
    return frame.payload


class Greeter:
    """Makes this party's greetings and checks those of its peers."""

    def __init__(self, identity: Identity, agreement: Agreement, keys: PairwiseKeys, mailboxes: Mailboxes) -> None:
        self.name = identity.name
        self.identity = identity
        self.keys = keys
        self._agreement = agreement
        self._mailboxes = mailboxes

    def greet(self, peer: str, answers: str = "") -> dict[str, Any]:
        """A signed greeting for `peer`; `answers` is the digest of the one it answers."""
        return make_greeting(self.identity, self._agreement, peer, self.keys.public_key, answers)

    def check(self, peer: str, greeting: Any, answers: str = "") -> bytes:
        """The peer's public key. A genuine peer that runs something else ends this party too, a false one does not.

        Raises `HandshakeError`.
        """
        try:
            return self.check_relayed(peer, greeting, answers)
        except DisagreementError as error:
            self._mailboxes.lose(peer, error)
            raise

    def check_relayed(self, peer: str, greeting: Any, answers: str = "") -> bytes:
        """The same of a greeting that a relay brought: it may be one of an earlier run, so that it disagrees ends nothing.

        Raises `HandshakeError`.
        """
        return check_greeting(greeting, peer, self.identity, self._agreement, answers)
